"""What bitsandbytes gives by itself, and whether that is right on this CPU: a comparison with it needs an
answer first.

bitsandbytes 0.50 on CPUs with AVX-512 decodes 4-bit weights wrongly where in_features is no multiple of the
block size, has a `gemv_4bit` that reads its repacked layout only, and repacks weights at their first
evaluation, for good.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, library

from peftkern import NF4Weight, bnb_backend, use_backend
from peftkern.formats import nf4
from peftkern.ops import quantize

__all__ = ["decodes", "exact", "gemv_reads_plain", "need", "quantized", "quantizes", "right"]


def exact(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight of bitsandbytes' bytes, by the project's reference."""
    packed = packed.contiguous().view(torch.uint8).reshape(-1)
    with use_backend("reference"):
        return NF4Weight(
            packed, nf4.code_tensor(quant_type), tuple(shape), dtype, blocksize, quant_type, absmax=absmax
        ).dequantize()


def quantized(w: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """bitsandbytes' bytes of a weight and its absmax, by the project's reference."""
    with use_backend("reference"):
        return quantize.quantize_4bit(w, blocksize, nf4.code_tensor(quant_type))


def need(answer: bool, what: str) -> None:
    """Skip the comparison, with its reason, where bitsandbytes is not right here."""
    if not answer:
        pytest.skip(f"bitsandbytes {bnb.__version__} is wrong on this CPU: {what}")


@functools.cache
def decodes(shape: tuple[int, ...], blocksize: int, quant_type: str, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes' own dequantization of such weights is right here, in values and in shape; a few
    are tried."""
    for seed in range(8):
        dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        packed, absmax = quantized(dense, blocksize, quant_type)
        got = _alone("dequantize_4bit", packed, absmax, blocksize, quant_type, shape, dtype)
        if got is None or not torch.equal(got, exact(packed, absmax, blocksize, quant_type, shape, dtype)):
            return False
    return True


@functools.cache
def quantizes(
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
    zeros: bool = False,
) -> bool:
    """Whether bitsandbytes itself quantizes such weights rightly: before 0.50 an odd number of values, or too
    few for a block, were an error, or the last one was lost. zeros: also where the second block is zero,
    whose codes, of no consequence, are others there."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense.view(-1)[blocksize : 2 * blocksize if zeros else blocksize] = 0
    got = _alone("quantize_4bit", dense, blocksize, quant_type, torch.uint8)
    wanted = quantized(dense, blocksize, quant_type)
    return got is not None and all(
        a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))
        for a, b in zip(got, wanted, strict=True)
    )


def _alone(op: str, *args: Any) -> Any:
    """What an op of bitsandbytes' own gives, None where it raises."""
    with bnb_backend.suspended():
        try:
            return getattr(torch.ops.bitsandbytes, op)(*args)
        except RuntimeError:
            return None


@functools.cache
def gemv_reads_plain() -> bool:
    """Whether bitsandbytes' own gemv_4bit is right for plain weights; asked of a process of its own, which it
    may abort."""
    code = (
        "import torch, bitsandbytes.functional as F\n"
        "w, x = torch.randn(48, 64), torch.randn(1, 64)\n"
        "packed, state = F.quantize_4bit(w, quant_type='nf4')\n"
        "wanted = x @ F.dequantize_4bit(packed, state).t()\n"
        "assert (F.gemv_4bit(x, packed, state=state) - wanted).norm() < 0.01 * wanted.norm()\n"
    )
    environment = os.environ | {"PEFTKERN_BNB_BACKEND": "0"}
    return (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=120
        ).returncode
        == 0
    )


@contextmanager
def right() -> Iterator[None]:
    """bitsandbytes without our hook, and right on any CPU, in any version: its formula for its kernel, and no
    layer that repacks."""
    scoped = library._scoped_library("bitsandbytes", "IMPL")
    with bnb_backend.suspended(), pytest.MonkeyPatch.context() as patch, scoped as kernels:
        patch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False, raising=False)
        kernels.impl("dequantize_4bit", _plain, "CPU", allow_override=True)
        yield


def _plain(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The generic dequantization in fp32, as of bitsandbytes 0.50; that of 0.48 rounds the code itself to
    `dtype` first."""
    packed = A.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).int()[: math.prod(shape)]  # [N * K]
    scales = absmax.float().reshape(-1).repeat_interleave(blocksize)[: codes.numel()]
    return (nf4.code_tensor(quant_type)[codes] * scales).reshape(shape).to(dtype)
