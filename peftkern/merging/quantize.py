"""A merged weight in 4 bits: the nearest codes, or codes drawn so that the mean is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from ..ops.quantize import quantize_4bit as _quantize
from ..ops.quantize import quantize_absmax as _quantize_absmax
from .branches import Branch, folded_rows
from .slabs import Rows, block_scales, full_precision, row_slabs

__all__ = ["coded", "requantize_4bit", "stochastic_4bit"]


@full_precision
def requantize_4bit(
    weight: NF4Weight,
    branches: Sequence[Branch],
    *,
    base: Rows | None = None,
) -> NF4Weight:
    """The merged weight in the format of `weight`: the bits that quantizing the whole dense sum would give.

    Args:
        weight: [N, K], the format, and the base unless `base` gives the rows of another one, fp32 [n, K].
        branches: the adapters, in the order they run.
    Returns: NF4Weight with its own tensors. Scratch: a few slabs of rows, and one fp32 number for each
        block where absmax is nested.
    """
    packed, absmax = _empty(weight)
    rows = folded_rows(weight, branches, base)
    for start, stop in row_slabs(weight):
        codes, scales = _quantize(rows(start, stop).contiguous(), weight.blocksize, weight.code)
        _put(packed, absmax, weight, start, codes, scales)
    return _with_absmax(replace(weight, packed=packed.view_as(weight.packed)), absmax)


@full_precision
def stochastic_4bit(
    weight: NF4Weight,
    branches: Sequence[Branch],
    generator: torch.Generator,
    *,
    base: Rows | None = None,
) -> NF4Weight:
    """As `requantize_4bit`, but each element is drawn from the two codes around it so that its mean is right.

    The mean over draws is the merged weight, except where rounding of a nested absmax puts an element
    outside the codes' range. The error of one draw is larger than the nearest code's.

    Args:
        generator: on the weight's device; the draws follow from its state alone.
    """
    ordered, order = torch.sort(weight.code)

    def choose(rows: Tensor, scale: Tensor) -> Tensor:
        values = rows / torch.where(scale == 0, 1.0, scale)
        upper = torch.bucketize(values, ordered).clamp_(1, len(ordered) - 1)
        low, high = ordered[upper - 1], ordered[upper]
        drawn = torch.rand(values.shape, generator=generator, device=values.device)
        return order[upper - (drawn >= (values - low) / (high - low)).long()]

    return coded(weight, folded_rows(weight, branches, base), choose)


def coded(weight: NF4Weight, rows: Rows, choose: Callable[[Tensor, Tensor], Tensor]) -> NF4Weight:
    """A weight in the format of `weight` with the absmax of `rows`, and codes chosen for that as it decodes.

    choose: (rows, the absmax of each of their elements; both fp32 [n, K]) -> int64 codes [n, K].
    """
    packed, absmax = _empty(weight)
    for start, stop in row_slabs(weight):
        _, scales = _quantize(rows(start, stop).contiguous(), weight.blocksize, weight.code)
        _put(packed, absmax, weight, start, None, scales)
    made = _with_absmax(replace(weight, packed=packed.view_as(weight.packed)), absmax)
    for start, stop in row_slabs(weight):
        codes = choose(rows(start, stop), _element_scales(made, start, stop))
        _put(packed, absmax, weight, start, _packed(codes, weight.code), None)
    return made


def _element_scales(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """The absmax of each element of the rows, fp32 [stop - start, K]."""
    k, size = weight.shape[1], weight.blocksize
    scales = block_scales(weight, start * k // size, -(-stop * k // size))
    return scales.repeat_interleave(size)[: (stop - start) * k].view(-1, k)


def _packed(codes: Tensor, code: Tensor) -> Tensor:
    """int64 codes of any shape -> uint8 [(numel + 1) // 2]; an odd count ends with the code of 0."""
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, code.abs().argmin().to(torch.uint8).view(1)])
    return flat[0::2] << 4 | flat[1::2]


def _empty(weight: NF4Weight) -> tuple[Tensor, Tensor]:
    """Bytes and absmax to fill, flat."""
    n, k = weight.shape
    absmax = torch.empty(-(-n * k // weight.blocksize), dtype=torch.float32, device=weight.device)
    return torch.empty((n * k + 1) // 2, dtype=torch.uint8, device=weight.device), absmax


def _put(
    packed: Tensor,
    absmax: Tensor,
    weight: NF4Weight,
    start: int,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None:
    first = start * weight.shape[1]
    if codes is not None:
        packed[first // 2 : first // 2 + codes.numel()] = codes.reshape(-1)
    if scales is not None:
        absmax[first // weight.blocksize : first // weight.blocksize + scales.numel()] = scales


def _with_absmax(weight: NF4Weight, absmax: Tensor) -> NF4Weight:
    """The weight with another absmax, nested as its own is."""
    if not weight.nested:
        return replace(weight, absmax=absmax)
    offset = absmax.mean()
    codes, outer = _quantize_absmax(absmax - offset, weight.absmax_code, weight.nested_blocksize)
    return replace(weight, absmax_8bit=codes, nested_absmax=outer, absmax_offset=offset)
