"""Launcher of the native CPU kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..native import DTYPES, address, empty, native, on_huge_pages, scratch, weight_view

__all__ = ["decoded_rows", "dequantize_4bit", "dequantize_4bit_out"]

_HELD = 1 << 17  # weights decoded at a time, 512 KB of fp32: they stay in the second-level cache


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
    dequantize_4bit_out(packed, code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize, nested_blocksize, out)
    return out


def dequantize_4bit_out(packed: Tensor, *quant_and_out: object) -> None:
    """As the reference."""
    *quant, out = quant_and_out
    native().dequantize_4bit(weight_view(packed, quant, 1, out.numel()), 0, 1, 0, out.numel(), address(out), DTYPES[out.dtype])


def decoded_rows(packed: Tensor, quant: tuple, n: int, k: int) -> Iterator[Tensor]:
    """The weight [n, k] in fp32, some rows at a time, each in the memory of those before it. quant: as `nf4.operands` gives it."""
    step, view = max(1, min(n, _HELD // max(k, 1))), weight_view(packed, quant, n, k)
    buffer = scratch(4 * step * k, "rows")[: 4 * step * k].view(torch.float32).view(step, k)
    for start in range(0, n, step):
        part = buffer[: min(step, n - start)]
        native().dequantize_4bit(view, start, len(part), 0, k, address(part), DTYPES[torch.float32])
        yield part
