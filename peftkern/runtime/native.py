"""What every launcher of a native CPU kernel needs: addresses, dtype numbers, the weight's descriptor and a
reused scratch."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .abi import DTYPES, address, dtype_of
from .backends import native

__all__ = [
    "DTYPES",
    "address",
    "dtype_of",
    "empty",
    "on_huge_pages",
    "pooled",
    "reused",
    "scratch",
    "weight_view",
    "zeros",
]

_local = threading.local()
_MAPPED = 32 << 20
_KEPT = 256 << 20


def empty(*shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill. torch.empty alone takes dtype and device from torch's defaults, which are
    the caller's to change: a kernel would write past the end.
    """
    return torch.empty(*shape, dtype=dtype, device="cpu")


def zeros(*shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """As `empty`, filled with zeros."""
    return torch.zeros(*shape, dtype=dtype, device="cpu")


def weight_view(weight: Tensor, quant: tuple, n: int, k: int) -> object:
    """The C descriptor of a weight; `quant` as in the op's schema. It holds addresses only."""
    code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize, nested_blocksize = quant
    parts = (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset)
    dtype = dtype_of(weight) if code is None else 0
    return native().Weight(weight.data_ptr(), *map(address, parts), n, k, blocksize, nested_blocksize, dtype)


def on_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, nothing of it written yet, on huge pages if it is large and the system has them: its first
    pages then cost a quarter (113 MB
    filled: 57 ms, on huge pages 13; Zen 3, one thread). From 32 MiB on glibc maps a block by itself, so that
    nothing else is touched.
    """
    if fresh.nbytes >= _MAPPED:
        native().advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def scratch(size: int, name: str = "kernel") -> Tensor:
    """At least `size` bytes, reused by every later call of this thread for the same purpose; grows, within
    the plan's few megabytes."""
    buffer = getattr(_local, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = empty(size, dtype=torch.uint8)
        setattr(_local, name, buffer)
    return buffer


def reused(shape: tuple[int, ...], name: str) -> Tensor:
    """An fp32 result of `shape`, nothing of it written, that a training loop makes and drops every step: the
    memory of the last one of this thread and `name` where nobody holds that any more, else fresh. Up to 256
    MiB stay allocated for it; larger ones are always fresh.

    First touches of its pages are else 64 to 256 of the 1,000 ms of a trained head (49,152 x 576, 512 rows;
    Zen 3, a virtual machine).
    """
    size = 4 * math.prod(shape)
    if size < _MAPPED:  # the allocator keeps those
        return empty(shape)
    kept = getattr(_local, name, None)
    if kept is None or kept.untyped_storage().nbytes() != size or _held_elsewhere(kept):
        kept = None
        setattr(_local, name, None)  # first: its memory may serve the new one
        kept = on_huge_pages(empty(size // 4))
        setattr(_local, name, kept if size <= _KEPT else None)
    return kept.detach().view(shape)


def pooled(size: int) -> Tensor:
    """`size` bytes, nothing of them written: those of an earlier result of this thread that nobody holds any
    more, else fresh. Up to 256 MiB stay allocated for it, and no more than were held at once.

    A layer's activations, 6 MB in one piece, are else given back to the system at the end of each step of 30
    layers, as glibc does with the top of its heap, and the next step's first touches take 30 to 60 of 440 ms
    (SmolLM2-135M, Zen 5, a virtual machine).
    """
    pool = getattr(_local, "pool", None)
    if pool is None:
        pool = _local.pool = _Pool()
    return pool.take(size)


class _Pool:
    """Buffers by their sizes, each with the place of the last one taken: the next one is free as a rule."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[list[Tensor], int]] = {}
        self.bytes = 0

    def take(self, size: int) -> Tensor:
        buffers, last = self.held.get(size, ([], 0))
        for i in range(last + 1, last + 1 + min(len(buffers), 3)):
            kept = buffers[i % len(buffers)]
            if not _held_elsewhere(kept):
                self.held[size] = buffers, i % len(buffers)
                return kept.detach()
        fresh = empty(size, dtype=torch.uint8)
        if self.bytes + size > _KEPT:
            return fresh
        self.bytes += size
        buffers.append(fresh)
        self.held[size] = buffers, len(buffers) - 1
        return fresh.detach()


def _held_elsewhere(kept: Tensor) -> bool:
    """Whether anything but `kept` has its storage: another tensor (of any thread, or an array of numpy's that
    holds one), or the object that stands for the storage in Python. Without torch's count: yes.
    """
    return not hasattr(torch._C, "_storage_Use_Count") or _holders(kept) != _one_holder()


@functools.cache
def _one_holder() -> tuple[int, int]:
    """Of a tensor that nothing shares its storage with."""
    return _holders(empty(1))


def _holders(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)
