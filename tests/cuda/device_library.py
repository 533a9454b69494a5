"""The C functions of csrc/cuda with tensors as arguments: emulated on the CPU, or the built module's own on a
GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import NF4Weight

from ..native.compiled import DTYPES, c_weight, i64, pointer

__all__ = ["OK", "CudaLibrary"]

OK = 0


@dataclass(frozen=True)
class CudaLibrary:
    """`lib` works on tensors of `device`: "cpu" for the emulated one. Every call is checked and waited
    for."""

    lib: ctypes.CDLL
    device: str

    def poisoned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory whose every byte is 0xff: NaN in the float types."""
        size = int(torch.Size(shape).numel()) * torch.empty(0, dtype=dtype).element_size()
        return torch.full((size,), 255, dtype=torch.uint8, device=self.device).view(dtype).view(*shape)

    def check(self, status: int) -> None:
        if status != OK:
            raise RuntimeError(
                f"{self.lib.pk_cuda_status_string(status).decode()}: {self.lib.pk_cuda_error_text().decode()}"
            )
        if self.device != "cpu":
            torch.cuda.synchronize()

    def where(self) -> tuple[ctypes.c_void_p, int]:
        """The stream and device arguments."""
        return ctypes.c_void_p(0 if self.device == "cpu" else torch.cuda.current_stream().cuda_stream), -1

    def dequantize(
        self, weight: NF4Weight, rows: tuple[int, int], cols: tuple[int, int], out: Tensor
    ) -> None:
        """weight[rows[0]:rows[1], cols[0]:cols[1]] into `out`, whose row stride may exceed its width."""
        spans = (rows[0], rows[1] - rows[0], cols[0], cols[1] - cols[0])
        descriptor = c_weight(weight)
        arguments = (*map(i64, spans), pointer(out), i64(out.stride(0)), DTYPES[out.dtype], *self.where())
        self.check(self.lib.pk_dequantize_4bit_cuda(ctypes.byref(descriptor), *arguments))

    def quantize(self, w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
        """packed, absmax."""
        numel = w.numel()
        packed, absmax = (
            self.poisoned((numel + 1) // 2, 1, dtype=torch.uint8),
            self.poisoned(-(-numel // blocksize), dtype=torch.float32),
        )
        arguments = (
            pointer(w),
            DTYPES[w.dtype],
            i64(numel),
            blocksize,
            pointer(code),
            pointer(packed),
            pointer(absmax),
            *self.where(),
        )
        self.check(self.lib.pk_quantize_4bit_cuda(*arguments))
        return packed, absmax

    def quantize_absmax(self, absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        """absmax_8bit, nested_absmax."""
        count = absmax.numel()
        out, nested = (
            self.poisoned(count, dtype=torch.uint8),
            self.poisoned(-(-count // blocksize), dtype=torch.float32),
        )
        arguments = (
            pointer(absmax),
            i64(count),
            blocksize,
            pointer(code),
            pointer(out),
            pointer(nested),
            *self.where(),
        )
        self.check(self.lib.pk_quantize_absmax_cuda(*arguments))
        return out, nested
