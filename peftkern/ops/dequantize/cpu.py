"""Launcher of the native CPU kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.native import DTYPES, address, empty, native, on_huge_pages, weight_view

__all__ = ["dequantize_4bit", "dequantize_4bit_out"]


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
    out = on_huge_pages(empty(tuple(shape), dtype=dtype))
    dequantize_4bit_out(
        packed,
        code,
        absmax,
        absmax_8bit,
        absmax_code,
        nested_absmax,
        absmax_offset,
        blocksize,
        nested_blocksize,
        out,
    )
    return out


def dequantize_4bit_out(packed: Tensor, *quant_and_out: object) -> None:
    """As the reference."""
    *quant, out = quant_and_out
    native().dequantize_4bit(
        weight_view(packed, quant, 1, out.numel()), 0, 1, 0, out.numel(), address(out), DTYPES[out.dtype]
    )
