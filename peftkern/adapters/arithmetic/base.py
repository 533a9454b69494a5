"""The base's own weights, for adapters whose change of the base is not their b @ a alone: DoRA, and what an
adapter replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .lora import LoraModule
from .shards import Checkpoint, open_checkpoint

__all__ = ["BaseWeights", "base_weights", "dora_update"]

_WRAPPERS = (".base_layer", ".original_module")


class BaseWeights:
    """Tensors of the base by the name they have in it, read when asked for."""

    def __init__(self, source: Checkpoint | nn.Module) -> None:
        self.source = source
        self.place = (
            f"model {type(source).__name__}"
            if isinstance(source, nn.Module)
            else f"checkpoint {source.folder}"
        )

    def tensor(self, name: str) -> Tensor:
        """A tensor as the base has it; ValueError where it has none of this name."""
        if isinstance(self.source, nn.Module):
            return _of_model(self.source, name, self.place)
        found = _named(name, self.source)
        if found is None:
            raise ValueError(
                f"base: the {self.place} has no {name}; give the base that the adapters were trained on",
            )
        return self.source.read(found).reshape(self.source.entries[found].shape)


def base_weights(base: str | Path | nn.Module | BaseWeights) -> BaseWeights:
    """The weights of a checkpoint's folder, or of a model, 4-bit ones dequantized."""
    if isinstance(base, BaseWeights):
        return base
    return BaseWeights(base if isinstance(base, nn.Module) else open_checkpoint(base, "base"))


def _named(name: str, checkpoint: Checkpoint) -> str | None:
    """The name in the file: as it is, or the one that differs by a prefix ("model.") only."""
    if name in checkpoint.entries:
        return name
    close = [
        other for other in checkpoint.entries if name.endswith(f".{other}") or other.endswith(f".{name}")
    ]
    return close[0] if len(close) == 1 else None


def _of_model(model: Any, name: str, place: str) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"base: the {place} has no {name}; give the base that the adapters were trained on"
        ) from None
    while wrapped := next(
        (part for part in _WRAPPERS if isinstance(getattr(module, part[1:], None), nn.Module)), None
    ):
        module = getattr(module, wrapped[1:])
    return dequantize_module_weight(module).detach() if leaf == "weight" else getattr(module, leaf).detach()


def dora_update(weight: Tensor, module: LoraModule, *, transposed: bool) -> Tensor:
    """What a DoRA module adds to its base weight: m (W + s b a) / ||W + s b a|| - W, the norm of each row;
    [N, K], fp32.

    Args:
        weight: the base's, [N, K], or with `transposed` (Conv1D) [K, N].
    Raises: ValueError where it does not fit the module, or the module is a convolution or an embedding.
    Source: DoRA (Liu et al., 2024), equation 5.
    """
    b, a = module.factors()
    if module.kind != "linear" or module.a.dim() != 2 or module.magnitude is None:
        raise ValueError("DoRA on an embedding or a convolution cannot be combined")
    weight = (weight.T if transposed else weight).double().to(b.device)
    if weight.shape != (b.shape[0], a.shape[1]):
        raise ValueError(
            f"the base's weight is {tuple(weight.shape)}, the adapter's update {(b.shape[0], a.shape[1])}",
        )
    adapted = weight + b @ a
    norm = torch.linalg.vector_norm(adapted, dim=1)
    return (adapted * (module.magnitude.double().reshape(-1) / norm)[:, None] - weight).float()
