"""Launcher of the CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.native import dtype_of
from ...runtime.native_cuda import native_cuda, stream_of, weight_view

__all__ = ["dequantize_4bit", "dequantize_4bit_out", "dequantize_slice"]


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
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
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
    if not out.is_contiguous():
        raise ValueError(
            f"out: got strides {out.stride()} for shape {tuple(out.shape)}, expected a contiguous tensor"
        )
    if out.numel():
        flat = out.view(1, -1)
        dequantize_slice(packed, tuple(quant), 1, out.numel(), slice(0, 1), slice(0, out.numel()), flat)


def dequantize_slice(
    packed: Tensor, quant: tuple, n: int, k: int, rows: slice, cols: slice, out: Tensor
) -> Tensor:
    """W[rows, cols] of a 4-bit weight [n, k] -> `out`, fp32, bf16 or fp16, whose rows may lie apart.

    One launch on the current stream. `quant` is as in the op's schema: code, the five tensors of the absmax,
    blocksize, nested_blocksize.
    """
    row, last_row, _ = rows.indices(n)
    col, last_col, _ = cols.indices(k)
    shape = (last_row - row, last_col - col)
    if tuple(out.shape) != shape or (out.numel() and out.stride(1) != 1):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, strides {out.stride()}, expected {shape} with unit "
            "stride in rows"
        )
    # A single row's stride is anything; the kernel asks for one that holds the row.
    ld_out = max(out.stride(0), shape[1])
    weight = weight_view(packed, quant, n, k)
    native_cuda().dequantize_4bit(
        weight, row, shape[0], col, shape[1], out.data_ptr(), ld_out, dtype_of(out), *stream_of(out)
    )
    return out
