"""Networks to compare a pretrained one with: of its shape and moments without its structure, or with its
first layers alone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..finetune.errors import InputError
from .features import layer_stack

__all__ = ["below", "copy_first", "freeze_first", "matched_random", "shuffled"]


def matched_random(model: nn.Module, *, seed: int = 0, keep: Sequence[str] = ()) -> nn.Module:
    """A copy whose parameters are normal draws, shifted and scaled to the mean and standard deviation (so the
    norm too) of each tensor.

    Args:
        seed: of the draws; a tensor's depend on the seed and its name alone.
        keep: prefixes of the names of parameters that stay as they are, a head that is new anyway say.
    Raises: InputError for 4-bit weights, whose entries cannot be drawn: load the model with dense weights.
    """
    return _replaced(model, seed, keep, _drawn)


def shuffled(model: nn.Module, *, seed: int = 0, keep: Sequence[str] = ()) -> nn.Module:
    """A copy with the entries of each parameter permuted: its weights' distribution, none of their structure.
    As `matched_random`.
    """
    return _replaced(model, seed, keep, _permuted)


def _replaced(
    model: nn.Module,
    seed: int,
    keep: Sequence[str],
    new: Callable[[Tensor, torch.Generator], Tensor],
) -> nn.Module:
    _check_dense(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not name.startswith(tuple(keep)):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
                parameter.copy_(new(parameter.detach(), generator))
    return twin


def _check_dense(model: nn.Module) -> None:
    packed = next(
        (name for name, parameter in model.named_parameters() if not parameter.is_floating_point()),
        None,
    )
    if packed is not None:
        raise InputError(
            f"{packed} is quantized: a random or shuffled twin needs dense weights; load the model without"
            " quantization"
        )


def _drawn(value: Tensor, generator: torch.Generator) -> Tensor:
    exact = value.double()
    if value.numel() < 2:
        return exact
    draw = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(exact.device).double()
    draw = (draw - draw.mean()) / draw.std(correction=0)
    return exact.mean() + exact.std(correction=0) * draw


def _permuted(value: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(value.numel(), generator=generator).to(value.device)
    return value.flatten()[order].view_as(value)


def below(model: nn.Module, first: int) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a cut at `first` leaves frozen: of the layers before it and, from 1 on, of what
    runs before the layers.

    What is registered before the stack (embeddings) runs before it, as in every transformer of transformers;
    a head that is tied to the embeddings is frozen with them.
    """
    name, layers = layer_stack(model)
    if not 0 <= first <= len(layers):
        raise ValueError(f"first: got {first}, expected 0 ... {len(layers)}")
    if first == 0:
        return
    names = [key for key, _ in model.named_parameters()]
    start = next(index for index, key in enumerate(names) if key.startswith(f"{name}."))
    inside = tuple(f"{name}.{index}." for index in range(first))
    for index, (key, parameter) in enumerate(model.named_parameters()):
        if index < start or key.startswith(inside):
            yield key, parameter


def freeze_first(model: nn.Module, first: int) -> list[str]:
    """Freeze what lies below a cut at `first` (in place), so that no backward pass runs there; the names that
    were trainable.
    """
    frozen = [(name, parameter) for name, parameter in below(model, first) if parameter.requires_grad]
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, _ in frozen]


def copy_first(source: nn.Module, target: nn.Module, first: int) -> nn.Module:
    """Give `target` (in place) the parameters of `source` below a cut at `first`; returns it. Yosinski's
    transfer of n layers.
    """
    theirs: dict[str, Any] = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in below(target, first):
            parameter.copy_(theirs[name])
    return target
