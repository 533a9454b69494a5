"""Dequantization in plain PyTorch: the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantize_4bit", "dequantize_4bit_out", "dequantize_absmax"]


def dequantize_absmax(
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    nested_absmax: Tensor,
    absmax_offset: Tensor,
    nested_blocksize: int,
) -> Tensor:
    """uint8 [blocks] -> fp32 [blocks]: code[q] * nested_absmax, rounded, then + offset, rounded."""
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax_8bit.numel()]
    return absmax_code[absmax_8bit.reshape(-1).long()] * scale + absmax_offset


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor | None,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    nested_absmax: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """packed uint8, first element in the high nibble -> `dtype` tensor of `shape`; value = dtype(fp32(code) *
    fp32(absmax))."""
    numel = math.prod(shape)
    flat = packed.reshape(-1)
    index = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:numel]
    if absmax is None:
        absmax = dequantize_absmax(absmax_8bit, absmax_code, nested_absmax, absmax_offset, nested_blocksize)
    scale = absmax.reshape(-1).repeat_interleave(blocksize)[:numel]
    return (code[index.long()] * scale).to(dtype).view(*shape)


def dequantize_4bit_out(packed: Tensor, *quant_and_out: object) -> None:
    """The same into `out`, the last argument; the others as above without `shape` and `dtype`."""
    *absmax, blocksize, nested_blocksize, out = quant_and_out
    out.copy_(dequantize_4bit(packed, *absmax, tuple(out.shape), blocksize, nested_blocksize, out.dtype))
