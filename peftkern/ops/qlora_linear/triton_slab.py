"""Decoding a slab of the weight and a low-rank pass over an activation, side by side in one launch.

Both are bound by memory and neither fills a device on its own; together they cost one launch, and the pass's
long programs run beside the decoding's short ones. The pass's programs come first: they take longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import UNSPECIALIZED, Call, specialization
from ...runtime.plan import Launch, work
from ...runtime.specialization import Specialization
from ..dequantize.triton import decode_work, dequantize_ragged_tile, dequantize_tile, tiles
from .low_rank_config import choose_low_rank, dot_mode
from .triton_low_rank import (
    dy_calls,
    dy_pair_kernel,
    dy_pass_kernel,
    dy_work,
    project_call,
    project_kernel,
    project_work,
)
from .triton_low_rank_bodies import dy_pair_body, dy_pass_body, project_body

__all__ = ["slab_call", "specializations"]


@triton.jit
def slab_body(
    pid,
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    slab_ptr,
    slab_stride,
    start,
    row_units,
    col_units,
    units,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    METHOD: tl.constexpr,
):
    """A rectangle of the weight -> slab, as ops/dequantize/triton.py says."""
    if WORDS == 0:
        dequantize_ragged_tile(
            pid,
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
            slab_ptr,
            slab_stride,
            start,
            row_units,
            col_units,
            units,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            UNITS,
        )
    else:
        dequantize_tile(
            pid,
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
            slab_ptr,
            slab_stride,
            start,
            row_units,
            col_units,
            units,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            WORDS,
            UNITS,
            ONE_ROW,
            METHOD,
        )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _slab_project_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    slab_ptr,
    slab_stride,
    start,
    row_units,
    col_units,
    units,
    first_programs,
    x_ptr,
    adapter_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    C,
    split_cols,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    METHOD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_RANK: tl.constexpr,
    MODE: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < first_programs:
        args = (x_ptr, adapter_ptr, out_ptr, seed_ptr, threshold, scale, M, C, split_cols)
        project_body(pid, *args, R, R_PAD, BLOCK_M, BLOCK_C, BY_RANK, MODE)
    else:
        weight = (
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
        )
        place = (slab_ptr, slab_stride, start, row_units, col_units, units)
        slab_body(
            pid - first_programs, *weight, *place, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, ONE_ROW, METHOD
        )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _slab_dy_pass_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    slab_ptr,
    slab_stride,
    start,
    row_units,
    col_units,
    units,
    first_programs,
    dy_ptr,
    xa_ptr,
    lora_b_ptr,
    dyb_ptr,
    d_lora_b_ptr,
    d_bias_ptr,
    scaling,
    M,
    N,
    chunk_rows,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    METHOD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < first_programs:
        args = (dy_ptr, xa_ptr, lora_b_ptr, dyb_ptr, d_lora_b_ptr, d_bias_ptr, scaling, M, N, chunk_rows)
        dy_pass_body(pid, *args, R, R_PAD, BLOCK_M, BLOCK_N, MODE)
    else:
        weight = (
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
        )
        place = (slab_ptr, slab_stride, start, row_units, col_units, units)
        slab_body(
            pid - first_programs, *weight, *place, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, ONE_ROW, METHOD
        )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _slab_dy_pair_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    slab_ptr,
    slab_stride,
    start,
    row_units,
    col_units,
    units,
    first_programs,
    dy_ptr,
    xa_ptr,
    lora_b_ptr,
    dyb_ptr,
    d_lora_b_ptr,
    d_bias_ptr,
    scaling,
    M,
    N,
    chunk_rows,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    METHOD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DYB_BLOCK_M: tl.constexpr,
    DYB_BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < first_programs:
        args = (dy_ptr, xa_ptr, lora_b_ptr, dyb_ptr, d_lora_b_ptr, d_bias_ptr, scaling, M, N, chunk_rows)
        dy_pair_body(pid, *args, R, R_PAD, BLOCK_M, BLOCK_N, DYB_BLOCK_M, DYB_BLOCK_N, MODE)
    else:
        weight = (
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
        )
        place = (slab_ptr, slab_stride, start, row_units, col_units, units)
        slab_body(
            pid - first_programs, *weight, *place, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, ONE_ROW, METHOD
        )


@work(_slab_project_kernel)
def _slab_project_work(a: Mapping[str, Any]) -> Launch:
    return decode_work(a, a["slab_ptr"]).beside(project_work(a))


@work(_slab_dy_pass_kernel, _slab_dy_pair_kernel)
def _slab_dy_work(a: Mapping[str, Any]) -> Launch:
    return decode_work(a, a["slab_ptr"]).beside(dy_work(a))


_MERGED = {
    project_kernel: _slab_project_kernel,
    dy_pass_kernel: _slab_dy_pass_kernel,
    dy_pair_kernel: _slab_dy_pair_kernel,
}


def slab_call(
    weight: Tensor,
    quant: tuple,
    k: int,
    rows: slice,
    cols: slice,
    slab: Tensor,
    beside: Call,
    *,
    arch: int | None = None,
) -> Call:
    """W[rows, cols] -> `slab`, and what `beside` does, in one launch; `quant` is the op's tuple, k the
    weight's width."""
    programs, arguments = tiles(weight, quant, k, rows, cols, slab, arch=arch)
    arguments: dict[str, Any] = dict(arguments)
    arguments["slab_ptr"], arguments["slab_stride"] = arguments.pop("out_ptr"), arguments.pop("out_stride")
    merged = arguments | beside.arguments | {"first_programs": beside.programs}
    return replace(
        beside, kernel=_MERGED[beside.kernel], programs=beside.programs + programs, arguments=merged
    )


def specializations(arch: int) -> Iterable[Specialization]:
    """Each pass beside the decoding of a 14336 x 4096 weight, nested, for its three kinds of launch and both
    kinds of adapters."""
    m, n, k, r = 8192, 14336, 4096, 16
    weight, codes = (
        torch.empty(n * k // 2, dtype=torch.uint8, device="meta"),
        torch.empty(256, dtype=torch.float32, device="meta"),
    )
    quant = (codes, None, weight, codes, codes, codes, 64, 256)
    whole = (slice(0, n), slice(0, k))
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if arch >= 80 else (torch.float16, torch.float32)
    for x_dtype, dtype in [(dtypes[0], dtypes[0]), (dtypes[0], torch.float32), *((d, d) for d in dtypes[1:])]:
        new = lambda *shape, d=dtype: torch.empty(shape, dtype=d, device="meta")  # noqa: E731
        mode = dot_mode(str(x_dtype)[6:], str(dtype)[6:], arch)
        passes = choose_low_rank(m, n, k, r, mode=mode, arch=arch)
        x, dy, xa, seed = (
            new(m, k, d=x_dtype),
            new(m, n, d=x_dtype),
            new(m, r, d=torch.float32),
            new(1, d=torch.int64),
        )
        needs, slab = (True, False, True, True), new(n, k, d=x_dtype)
        beside = {
            "xa": project_call(
                x, new(r, k), 1.0, 0.1, seed, replace(passes, xa_splits=1), by_rank=True, arch=arch
            )[0]
        }
        for name, fused in (("dy", True), ("pair", False)):
            beside[name] = dy_calls(dy, xa, new(n, r), 0.7, needs, replace(passes, fused=fused), arch=arch)[0]
        for name, call in beside.items():
            merged = slab_call(weight, quant, k, *whole, slab, call, arch=arch)
            title = f"slab-{name}-{str(x_dtype)[6:]}-{mode}"
            promises = {
                "expects_mma": arch >= 80 and mode != "ieee",
                "wide_loads": ("packed_ptr",),
                "unfused": ("absmax_of",),
            }
            yield specialization(title, merged, **promises)
