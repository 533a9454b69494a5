"""Launchers of the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import address, dtype_of, empty, native

__all__ = ["quantize_4bit", "quantize_absmax"]


def quantize_4bit(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    w, code, numel = w.contiguous(), code.contiguous(), w.numel()
    packed = empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = empty(-(-numel // blocksize))
    native().quantize_4bit(
        address(w), dtype_of(w), numel, blocksize, address(code), address(packed), address(absmax)
    )
    return packed, absmax


def quantize_absmax(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    absmax, absmax_code = absmax.contiguous(), absmax_code.contiguous()
    out = empty(absmax.shape, dtype=torch.uint8)
    nested = empty(-(-absmax.numel() // blocksize))
    native().quantize_absmax(
        address(absmax), absmax.numel(), blocksize, address(absmax_code), address(out), address(nested)
    )
    return out, nested
