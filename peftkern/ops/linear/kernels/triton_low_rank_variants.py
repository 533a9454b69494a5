"""What the low-rank passes of a single linear are compiled for, alone and beside the decoding of a slab."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ....runtime.launch import Call, specialization
from ....runtime.specialization import Specialization
from ...dequantize.triton import rectangle
from ..low_rank_calls import (
    DyMember,
    Low,
    beside_decoding,
    dy_call,
    dyb_call,
    reduce_calls,
    x_call,
    xa_call,
    y_call,
    y_operands,
)
from ..low_rank_config import EXACT_ROWS, LowRankConfig, choose_low_rank, dot_mode

__all__ = ["specializations"]

_FLOATS = (torch.bfloat16, torch.float32)
_VARIANTS = (  # activations, adapters, rank
    (torch.bfloat16, torch.bfloat16, 16),
    (torch.bfloat16, torch.float32, 16),
    (torch.float16, torch.float16, 16),
    (torch.float16, torch.float32, 16),
    (torch.float32, torch.float32, 16),
    *itertools.product((torch.bfloat16,), _FLOATS, (32, 64, 256)),
    *itertools.product((torch.float16,), (torch.float16,), (64, 256)),
    *itertools.product((torch.float32,), (torch.float32,), (64, 256)),
)


def specializations(arch: int) -> Iterator[Specialization]:
    """A 4096 x 4096 linear with dropout and bias, the largest tiles at M = 8192; the same in fp32 of few
    rows; each pass beside the decoding of a 14336 x 4096 weight, nested. See `Specialization`."""
    for x_dtype, dtype, r in _VARIANTS:
        if arch >= 80 or torch.bfloat16 not in (x_dtype, dtype):
            yield from _passes(arch, 8192, x_dtype, dtype, r)
    if arch >= 80:  # fp32 operands of few rows are multiplied outside the tensor cores
        for r in (16, 256):
            yield from _passes(arch, EXACT_ROWS, torch.float32, torch.float32, r)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if arch >= 80 else (torch.float16, torch.float32)
    for x_dtype, dtype in [(dtypes[0], dtypes[0]), (dtypes[0], torch.float32), *((d, d) for d in dtypes[1:])]:
        yield from _beside_a_slab(arch, x_dtype, dtype)


def _config(
    arch: int, m: int, n: int, k: int, r: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[str, LowRankConfig]:
    mode = dot_mode(str(x_dtype)[6:], str(dtype)[6:], arch, m)
    return mode, choose_low_rank(m, n, k, r, mode=mode, arch=arch)


def _passes(arch: int, m: int, x_dtype: torch.dtype, dtype: torch.dtype, r: int) -> Iterable[Specialization]:
    n, k, new = 4096, 4096, functools.partial(torch.empty, device="meta")
    x, bias, xa = new((m, k), dtype=x_dtype), new(n, dtype=x_dtype), new((m, r), dtype=torch.float32)
    low = Low(new((r, k), dtype=dtype), new((n, r), dtype=dtype), 0.7, 0.1, new(1, dtype=torch.int64))
    mode, config = _config(arch, m, n, k, r, x_dtype, dtype)
    tag = f"{str(x_dtype)[6:]}-{mode}-r{r}"
    # Triton has no tensor cores on sm_75; tiles of larger ranks are too small for 16 bytes a thread.
    mma = arch >= 80 and m > EXACT_ROWS
    promise = functools.partial(_promising, mma, mma and r <= 64)
    member = DyMember(x, low, xa, True, True, False)
    yield promise(f"xa-{tag}", xa_call(x, [low], config, arch=arch)[0], "row_ptr")
    yield promise(f"dyb-{tag}", dyb_call(x, low, config, arch=arch)[0], "row_ptr")
    call, (partials,) = dy_call([member], config, arch=arch)
    yield promise(f"dy-{tag}", call, "dy_ptr")
    if config.fused:
        beside = dy_call([member], replace(config, fused=False), arch=arch)[0]
        yield promise(f"dy-beside-{tag}", beside, "dy_ptr", "row_ptr")
    of_bias = replace(member, need_dyb=False, need_bias=True)
    yield promise(f"dy-bias-{tag}", dy_call([of_bias], config, arch=arch)[0], "dy_ptr")
    dyb = partials.dyb[:1] if config.sum_dyb else partials.dyb
    call, (d_lora_a,) = x_call(x, x, [low], [dyb], [True], config, arch=arch, accumulate=True)
    yield promise(f"x-dx-{tag}", call, "x_ptr", "out_tile")
    yield promise(f"x-{tag}", x_call(x, None, [low], [dyb], [True], config, arch=arch)[0], "x_ptr")
    operands = y_operands(x, xa, low.b, 0.7, bias)
    yield promise(f"y-{tag}", y_call([operands], config, arch=arch, accumulate=True), "out_tile")
    sums, _ = reduce_calls([(d_lora_a, dtype), (partials.d_lora_b, dtype)])
    for call in sums:
        yield specialization(f"sums-{tag}", call)


def _beside_a_slab(arch: int, x_dtype: torch.dtype, dtype: torch.dtype) -> Iterable[Specialization]:
    m, n, k, r, new = 8192, 14336, 4096, 16, functools.partial(torch.empty, device="meta")
    weight, codes = new(n * k // 2, dtype=torch.uint8), new(256, dtype=torch.float32)
    quant = (codes, None, weight, codes, codes, codes, 64, 256)
    slab = rectangle(weight, quant, k, slice(0, n), slice(0, k), new((n, k), dtype=x_dtype), arch=arch)
    low = Low(new((r, k), dtype=dtype), new((n, r), dtype=dtype), 0.7, 0.1, new(1, dtype=torch.int64))
    mode, config = _config(arch, m, n, k, r, x_dtype, dtype)
    x, dy, xa = (
        new((m, k), dtype=x_dtype),
        new((m, n), dtype=x_dtype),
        new((m, r), dtype=torch.float32),
    )
    passes = {"xa": xa_call(x, [low], replace(config, xa_splits=1), arch=arch)[0]}
    for name, fused in (("dy", True), ("pair", False)):
        member = DyMember(dy, low, xa, True, True, False)
        passes[name] = dy_call([member], replace(config, fused=fused), arch=arch)[0]
    for name, call in passes.items():
        yield specialization(
            f"slab-{name}-{str(x_dtype)[6:]}-{mode}",
            beside_decoding(call, [slab]),
            expects_mma=arch >= 80,
            wide_loads=("words_ptrs",),
            unfused=("absmax_value",),
        )


def _promising(mma: bool, wide: bool, name: str, call: Call, *pointers: str) -> Specialization:
    return specialization(name, call, expects_mma=mma, wide_loads=pointers if wide else ())
