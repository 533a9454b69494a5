"""Launcher of the native CPU kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import DTYPES, address, native, weight_view

__all__ = ["dequantize_4bit"]


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
    """As the reference."""
    out = torch.empty(tuple(shape), dtype=dtype)
    numel = math.prod(shape)
    quant = (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize, nested_blocksize)
    native().dequantize_4bit(weight_view(packed, quant, 1, numel), 0, 1, 0, numel, address(out), DTYPES[dtype])
    return out
