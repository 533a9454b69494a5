"""Networks to compare a pretrained one with: of its shape and moments without its structure, or with its
first layers alone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .depth import below

__all__ = ["copy_first", "matched_random", "shuffled"]


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


def copy_first(source: nn.Module, target: nn.Module, first: int) -> nn.Module:
    """Give `target` (in place) the parameters of `source` below a cut at `first`; returns it. Yosinski's
    transfer of n layers.
    """
    theirs: dict[str, Any] = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in below(target, first):
            parameter.copy_(theirs[name])
    return target
