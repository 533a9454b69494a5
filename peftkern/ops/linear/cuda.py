"""Launchers of the CUDA C++ kernels for few rows: xa, the GEMV, and the tensor-core kernel; forward only, one
launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import DTYPES, address, dtype_of
from ...runtime.native_cuda import native_cuda, stream_of, weight_view
from ...runtime.plan import DECODE_OPS, PHILOX_OPS, Launch, device_of, listed, nbytes
from ..sizes import weight_bytes

__all__ = ["gemv_forward", "mma_forward", "mma_supported", "xa_forward"]


def mma_supported(x: Tensor, quant: tuple, n: int, k: int) -> bool:
    """Whether `mma_forward` takes this product: bf16 or fp16 x, K a multiple of 64, blocks of at least 64,
    sm_80 or newer."""
    if quant[0] is None or x.dtype not in DTYPES or x.is_cpu:
        return False
    arch = device_of(x).arch
    if x.is_meta:  # a plan for a card, where nothing needs to be built; pk_mma_4bit_supported says the same
        return x.dtype != torch.float32 and k % 64 == 0 and quant[6] >= 64 and arch >= 80
    return native_cuda().mma_4bit_supported(DTYPES[x.dtype], n, k, quant[6], arch)


def xa_forward(x: Tensor, lora_a: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(x) A^T: x [M, K], lora_a [R, K] -> fp32 [M, R]. `seed`, int64 [1] on x's device, is read there;
    None: no dropout."""
    x, lora_a = x.contiguous(), lora_a.contiguous()
    (m, k), rank = x.shape, lora_a.shape[0]
    _same_device(x, lora_a=lora_a, seed=seed)
    if lora_a.shape[1] != k:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, expected [R, {k}] for x {tuple(x.shape)}")
    if seed is not None and seed.dtype != torch.int64:
        raise TypeError(f"seed: got {seed.dtype}, expected int64")
    xa = torch.empty((m, rank), dtype=torch.float32, device=x.device)
    if x.is_meta:
        draws = PHILOX_OPS * m * k * (seed is not None)
        listed(Launch("xa", nbytes(x, lora_a), nbytes(xa), 2 * m * k * rank, draws))
        return xa
    threshold = 0 if seed is None else round(dropout_p * 65536)
    lora = native_cuda().Lora(address(lora_a), 0, rank, dtype_of(lora_a), 1.0)
    native_cuda().xa(
        lora, threshold, address(seed), address(x), dtype_of(x), m, k, address(xa), *stream_of(x)
    )
    return xa


def gemv_forward(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    bias: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    scaling: float,
) -> Tensor:
    """x [M, K] W^T + scaling * xa B^T + bias -> [M, N] in x's dtype, for M up to 64, meant for up to 16.

    `weight`: packed, with `quant` as in the op's schema; bias [N], lora_b [N, R] in any dtype; xa fp32 [M, R]
    as `xa_forward` gives it.
    """
    return _forward("gemv_4bit", x, weight, quant, n, bias, lora_b, xa, scaling)


def mma_forward(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    bias: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    scaling: float,
) -> Tensor:
    """As `gemv_forward`, on tensor cores and for any M; only where `mma_supported`. Unaligned x or weight
    (views) are copied."""
    return _forward("mma_4bit", _aligned(x), _aligned(weight), quant, n, bias, lora_b, xa, scaling)


def _aligned(t: Tensor) -> Tensor:
    """Itself, or a copy where its first element does not lie at a multiple of 16 bytes."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected x's, {x.device}")


def _forward(kernel: str, x, weight, quant, n, bias, lora_b, xa, scaling) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    bias, lora_b, xa = (None if t is None else t.contiguous() for t in (bias, lora_b, xa))
    (m, k), rank = x.shape, 0 if lora_b is None else lora_b.shape[1]
    _same_device(x, weight=weight, bias=bias, lora_b=lora_b, xa=xa, absmax=quant[1], absmax_8bit=quant[2])
    if quant[0] is None or weight.numel() * weight.element_size() < (n * k + 1) // 2:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} {weight.dtype}, expected the packed 4-bit codes "
            f"of [{n}, {k}]"
        )
    if rank and (
        lora_b.shape[0] != n or xa is None or tuple(xa.shape) != (m, rank) or xa.dtype != torch.float32
    ):
        got = None if xa is None else f"{tuple(xa.shape)} {xa.dtype}"
        raise ValueError(
            f"lora_b, xa: got {tuple(lora_b.shape)} and {got}, expected [{n}, R] and fp32 [{m}, R]"
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({n},)")
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if x.is_meta:
        listed(_work(kernel, x, quant, bias, lora_b, xa, y))
        return y
    view, lora = (
        weight_view(weight, quant, n, k),
        native_cuda().Lora(0, address(lora_b), rank, dtype_of(lora_b), scaling),
    )
    getattr(native_cuda(), kernel)(
        view,
        lora,
        address(x),
        dtype_of(x),
        m,
        address(bias),
        dtype_of(bias),
        address(xa),
        address(y),
        *stream_of(x),
    )
    return y


_MMA_ROWS = 64  # of x, for which the tensor-core kernel decodes a weight once


def _work(kernel: str, x, quant, bias, lora_b, xa, y) -> Launch:
    """A launch of `gemv_4bit` or `mma_4bit`."""
    (m, k), n = x.shape, y.shape[1]
    decodes = 1 if kernel == "gemv_4bit" else -(-m // _MMA_ROWS)
    reads = nbytes(x, bias, lora_b, xa) + weight_bytes(n * k, quant[1], *quant[6:])
    flops = 2 * m * n * (k + (0 if lora_b is None else lora_b.shape[1]))
    return Launch(kernel.removesuffix("_4bit"), reads, nbytes(y), flops, DECODE_OPS * n * k * decodes)
