"""Launchers of the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import dtype_of
from ...runtime.native_cuda import native_cuda, stream_of

__all__ = ["quantize_4bit", "quantize_absmax"]


def quantize_4bit(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    w, code, numel = w.contiguous(), code.contiguous(), w.numel()
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=w.device)
    addresses = (code.data_ptr(), packed.data_ptr(), absmax.data_ptr())
    native_cuda().quantize_4bit(w.data_ptr(), dtype_of(w), numel, blocksize, *addresses, *stream_of(w))
    return packed, absmax


def quantize_absmax(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    absmax, absmax_code = absmax.contiguous(), absmax_code.contiguous()
    out = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(-(-absmax.numel() // blocksize), dtype=torch.float32, device=absmax.device)
    addresses = (absmax_code.data_ptr(), out.data_ptr(), nested.data_ptr())
    native_cuda().quantize_absmax(
        absmax.data_ptr(), absmax.numel(), blocksize, *addresses, *stream_of(absmax)
    )
    return out, nested
