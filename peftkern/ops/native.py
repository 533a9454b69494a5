"""What every launcher of a native CPU kernel needs: addresses, dtype numbers, the weight's descriptor and a reused scratch."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..backends import native

__all__ = ["DTYPES", "address", "dtype_of", "on_huge_pages", "scratch", "weight_view"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_local = threading.local()
_MAPPED = 32 << 20


def address(tensor: Tensor | None) -> int:
    """The data pointer, 0 for None. The caller holds the tensor until the kernel has returned."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(tensor: Tensor | None) -> int:
    """The C ABI's number of a dtype."""
    if tensor is None:
        return 0
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"got {tensor.dtype}, the native kernels take float32, bfloat16 or float16") from None


def weight_view(weight: Tensor, quant: tuple, n: int, k: int) -> object:
    """The C descriptor of a weight; `quant` as in the op's schema. It holds addresses only."""
    code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize, nested_blocksize = quant
    parts = (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset)
    dtype = dtype_of(weight) if code is None else 0
    return native().Weight(weight.data_ptr(), *map(address, parts), n, k, blocksize, nested_blocksize, dtype)


def on_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, nothing of it written yet, on huge pages if it is large and the system has them: its first pages then cost a quarter (113 MB
    filled: 57 ms, on huge pages 13; Zen 3, one thread). From 32 MiB on glibc maps a block by itself, so that nothing else is touched.
    """
    if fresh.nbytes >= _MAPPED:
        native().advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def scratch(size: int, name: str = "kernel") -> Tensor:
    """At least `size` bytes, reused by every later call of this thread for the same purpose; grows, within the plan's few megabytes."""
    buffer = getattr(_local, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
        setattr(_local, name, buffer)
    return buffer
