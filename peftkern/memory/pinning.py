"""Pin host memory in place, to the byte: torch's own pinned memory is rounded up to a power of two."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["pin", "unpin", "whole_pages"]

_PAGE = 4096


def whole_pages(nbytes: int) -> Tensor:
    """Host memory, uint8 [nbytes], that shares no page with anything else: a page is pinned once or not at
    all."""
    data = torch.empty(nbytes + 2 * _PAGE, dtype=torch.uint8, device="cpu")
    begin = -data.data_ptr() % _PAGE
    return data[begin : begin + nbytes]


def pin(data: Tensor, device: torch.device) -> bool:
    """Pin a tensor's memory for copies from and to a GPU; whether that worked. Not measured on Windows and
    WSL, where little can be pinned."""
    if device.type != "cuda" or not data.nbytes or data.is_pinned():
        return device.type == "cuda" and data.nbytes > 0
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0)) == 0:
            return True
        with contextlib.suppress(RuntimeError):  # the refusal would be reported of the next kernel
            torch.zeros(1, device=device)
    return False


def unpin(data: Tensor, device: torch.device) -> None:
    """Undo `pin`, before the tensor's memory is freed."""
    if device.type == "cuda" and data.nbytes and data.is_pinned():
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
