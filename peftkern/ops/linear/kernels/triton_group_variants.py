"""What the linears' kernels are compiled for where a group of several members launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ....runtime.launch import specialization
from ....runtime.specialization import Specialization
from ...dequantize.triton import rectangle
from ..low_rank_calls import (
    DyMember,
    Low,
    beside_decoding,
    dy_call,
    reduce_calls,
    x_call,
    xa_call,
    y_call,
    y_operands,
)
from ..low_rank_config import choose_low_rank, dot_mode
from ..matmul_calls import DENSE, Product, dx_sum_call, group_call

__all__ = ["specializations"]

M, K, NS = 8192, 4096, (4096, 1024, 1024)  # q, k and v of an 8B Llama


def specializations(arch: int) -> Iterator[Specialization]:
    """Passes with dropout and biases: 16-bit activations and adapters, fp32 adapters, all fp32, rank 64.
    Products in 16 bits: bare, with dropout and biases, with adapters in fp32; fp32 ones go to cuBLAS."""
    half = torch.bfloat16 if arch >= 80 else torch.float16
    for x_dtype, dtype, r in (
        (half, half, 16),
        (half, torch.float32, 16),
        (torch.float32, torch.float32, 16),
        (half, half, 64),
    ):
        yield from _passes(arch, x_dtype, dtype, r)
    for low_dtype, p in ((half, 0.0), (half, 0.1), (torch.float32, 0.1)):
        yield from _products(arch, half, low_dtype, p)
    promises = {"expects_mma": arch >= 80, "wide_loads": ("weight_ptrs",) if arch >= 80 else ()}
    dys, slabs = [_new(M, n, dtype=half) for n in NS], [_new(n, K, dtype=half) for n in NS]
    for accumulate in (True, False):
        call = dx_sum_call(dys, slabs, _new(M, K, dtype=half), accumulate=accumulate, arch=arch)
        yield specialization(f"group-dx-{str(half)[6:]}-{'onto' if accumulate else 'bare'}", call, **promises)


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lows(r: int, dtype: torch.dtype, p: float) -> list[Low]:
    seed = _new(1, dtype=torch.int64) if p else None
    return [Low(_new(r, K, dtype=dtype), _new(n, r, dtype=dtype), 0.7, p, seed) for n in NS]


def _passes(arch: int, x_dtype: torch.dtype, dtype: torch.dtype, r: int) -> Iterator[Specialization]:
    x, ys, lows = _new(M, K, dtype=x_dtype), [_new(M, n, dtype=x_dtype) for n in NS], _lows(r, dtype, 0.1)
    codes, absmax = _new(16), _new(1, dtype=torch.uint8)
    quant = (codes, None, absmax, codes, codes, codes, 64, 256)
    todo = [
        rectangle(
            _new(n * K // 2, dtype=torch.uint8),
            quant,
            K,
            slice(0, n),
            slice(0, K),
            _new(n, K, dtype=x_dtype),
            arch=arch,
        )
        for n in NS
    ]
    mode = dot_mode(str(x_dtype)[6:], str(dtype)[6:], arch, M)
    config = replace(choose_low_rank(M, sum(NS), K, r, mode=mode, arch=arch), fused=False, xa_splits=1)
    title = f"{str(x_dtype)[6:]}-{mode}-r{r}"
    # As of the single linear's passes: no tensor cores on sm_75.
    low_mma = {"expects_mma": arch >= 80}
    decodes = {"wide_loads": ("words_ptrs",), "unfused": ("absmax_value",)}
    call, xas = xa_call(x, lows, config, arch=arch)
    yield specialization(f"group-xa-{title}", beside_decoding(call, todo), **low_mma, **decodes)
    members = [DyMember(dy, low, xa[0], True, True, True) for dy, low, xa in zip(ys, lows, xas, strict=True)]
    call, parts = dy_call(members, config, arch=arch)
    yield specialization(f"group-dy-{title}", beside_decoding(call, todo), **low_mma, **decodes)
    biases = [_new(n, dtype=x_dtype) for n in NS]
    operands = [
        y_operands(y, xa[0], low.b, low.scaling, bias)
        for y, xa, low, bias in zip(ys, xas, lows, biases, strict=True)
    ]
    yield specialization(f"group-y-{title}", y_call(operands, config, arch=arch), **low_mma)
    dybs, dx = [part.dyb for part in parts], _new(M, K, dtype=x_dtype)
    call, d_lora_a = x_call(x, dx, lows, dybs, [True] * 3, config, arch=arch)
    yield specialization(f"group-x-dx-{title}", call, **low_mma)
    call, _ = x_call(x, None, lows, dybs, [True] * 3, config, arch=arch)
    yield specialization(f"group-x-{title}", call, **low_mma)
    sums = [(part, dtype) for part in d_lora_a] + [(part.d_lora_b, dtype) for part in parts]
    sums += [(part.d_bias, torch.float32) for part in parts]
    yield specialization(f"group-sums-{title}", reduce_calls(sums)[0][0])


def _products(arch: int, dtype: torch.dtype, low_dtype: torch.dtype, p: float) -> Iterator[Specialization]:
    products = [
        Product(
            _new(n, K, dtype=dtype),
            DENSE,
            _new(M, n, dtype=dtype),
            _new(n, dtype=dtype) if p else None,
            _new(M, 16),
            low.b,
            low.scaling,
        )
        for n, low in zip(NS, _lows(16, low_dtype, p), strict=True)
    ]
    title = f"{str(dtype)[6:]}-{str(low_dtype)[6:]}-p{round(100 * p)}"
    promises = {"expects_mma": arch >= 80, "wide_loads": ("weight_ptrs",) if arch >= 80 else ()}
    call = group_call(_new(M, K, dtype=dtype), products, arch=arch)
    yield specialization(f"group-y-{title}", call, **promises)
