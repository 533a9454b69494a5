"""Batches whose samples belong to different adapters: which name each sample has, and the rows that makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

__all__ = ["BASE", "current", "mixed_adapters", "names", "stretches"]

BASE = "__base__"  # PEFT's name for "no adapter"
_SLOT = "_peftkern_adapter_names"


def current(layer: nn.Module) -> list[str] | None:
    """The samples' adapters that the layer's next call mixes; None outside of that."""
    return layer.__dict__.get(_SLOT)


@contextlib.contextmanager
def names(layer: nn.Module, chosen: Sequence[str]) -> Iterator[None]:
    """Let one layer mix adapters."""
    before = current(layer)
    layer.__dict__[_SLOT] = list(chosen)
    try:
        yield
    finally:
        _restore(layer, before)


def _restore(layer: nn.Module, before: list[str] | None) -> None:
    if before is None:
        layer.__dict__.pop(_SLOT, None)
    else:
        layer.__dict__[_SLOT] = before


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within it, each sample of a batch runs through the adapter named for it, in training too, on one shared base.

    The layers' rows of one stretch of equal names make one low-rank product; samples sorted by adapter are fastest. Each adapter gets the
    gradients of its own samples. With gradient checkpointing the backward pass, which calls the layers again, belongs within it too.

    Args:
        model: a patched PEFT LoRA model.
        adapter_names: a name for each sample of the batch; "__base__" for none of them.
    Raises: ValueError where a name is no adapter of the model, the model is not patched, or (at the call) the batch's size differs.
    Source: Punica (Chen et al., 2023) for the segments; PEFT allows `adapter_names` in evaluation only.
    """
    from .add import LoraAddForward
    from .forwards import LoraForward, find

    ours = (LoraForward, LoraAddForward)
    layers = [module for module in model.modules() if (held := find(module)) is not None and isinstance(held[1], ours)]
    if not layers:
        raise ValueError(f"model: no LoRA layer of {type(model).__name__} is patched; call peftkern.patch(model) first")
    known = {name for layer in layers for name in layer.lora_A} | {BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names: {', '.join(map(repr, unknown))} unknown; the model has {', '.join(sorted(known))}")
    if any(_reentrant(module) for module in model.modules()):
        raise ValueError(
            "model: its reentrant gradient checkpointing cannot tell that a recomputation left this block; call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}), which notices'
        )
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(names(layer, adapter_names))
        yield


def _reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(module, "gradient_checkpointing", False)) and getattr(checkpoint, "keywords", {}).get("use_reentrant", True)


def stretches(chosen: Sequence[str], x: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Rows of the flattened x of each run of equal names; x [samples, ..., K]."""
    if x.dim() < 2 or x.shape[0] != len(chosen):
        raise ValueError(f"adapter_names: got {len(chosen)} names for a batch of {x.shape[0] if x.dim() else 0} samples")
    rows = x.numel() // max(x.shape[0] * x.shape[-1], 1)
    found: list[tuple[str, tuple[int, int]]] = []
    for i, name in enumerate(chosen):
        if found and found[-1][0] == name:
            found[-1] = (name, (found[-1][1][0], (i + 1) * rows))
        else:
            found.append((name, (i * rows, (i + 1) * rows)))
    return found
