"""What the C ABIs of the CPU and of CUDA call tensors: addresses, and numbers of dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["DTYPES", "address", "addresses", "dtype_of"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> int:
    """The data pointer, 0 for None. The caller holds the tensor until the kernel has returned."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """As `address`. What was described for calls to come has as `at` those of what is saved for backward,
    which may have been moved meanwhile."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def dtype_of(tensor: Tensor | None) -> int:
    """The C ABI's number of a dtype."""
    if tensor is None:
        return 0
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"got {tensor.dtype}, the native kernels take float32, bfloat16 or float16") from None
