"""The low-rank passes over x, y, dy and dx on a GPU: thin kernels over `triton_low_rank_bodies`, and their
launchers.

The `..._call` functions give a launch as data: its arguments also serve whoever merges two bodies into one
launch. All tensors but y are contiguous; M, N and K are at least 1. Partial sums are fp32 with the chunk as
first axis.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import UNSPECIALIZED, Call, run, specialization
from ...runtime.plan import PHILOX_OPS, Launch, device_of, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import ceil_div, next_power_of_2
from .low_rank_config import EXACT_ROWS, LowRankConfig, Tile, choose_low_rank, dot_mode
from .triton_low_rank_bodies import (
    d_lora_a_body,
    dy_pair_body,
    dy_pass_body,
    epilogue_body,
    project_body,
    reduce_body,
)

__all__ = [
    "DyPartials",
    "config_for",
    "dy_calls",
    "dy_pass",
    "project_call",
    "reduce_calls",
    "reduce_partials",
    "specializations",
    "summed",
    "x_call",
    "x_pass",
    "xa_forward",
    "y_call",
    "y_epilogue",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def project_kernel(
    x_ptr,
    adapter_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    C,
    split_cols,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_RANK: tl.constexpr,
    MODE: tl.constexpr,
):
    args = (x_ptr, adapter_ptr, out_ptr, seed_ptr, threshold, scale, M, C, split_cols)
    project_body(tl.program_id(0), *args, R, R_PAD, BLOCK_M, BLOCK_C, BY_RANK, MODE)


@work(project_kernel)
def project_work(a: Mapping[str, Any]) -> Launch:
    """One read of x."""
    m, c, draws = a["M"], a["C"], a["seed_ptr"] is not None
    reads, flops = nbytes(a["x_ptr"], a["adapter_ptr"]), 2 * m * c * a["R"]
    name = "xa" if a["BY_RANK"] else "dyb"
    return Launch(name, reads, nbytes(a["out_ptr"]), flops, PHILOX_OPS * m * c * draws)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dy_pass_kernel(
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
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    args = (dy_ptr, xa_ptr, lora_b_ptr, dyb_ptr, d_lora_b_ptr, d_bias_ptr, scaling, M, N, chunk_rows)
    dy_pass_body(tl.program_id(0), *args, R, R_PAD, BLOCK_M, BLOCK_N, MODE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dy_pair_kernel(
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
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DYB_BLOCK_M: tl.constexpr,
    DYB_BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    args = (dy_ptr, xa_ptr, lora_b_ptr, dyb_ptr, d_lora_b_ptr, d_bias_ptr, scaling, M, N, chunk_rows)
    dy_pair_body(tl.program_id(0), *args, R, R_PAD, BLOCK_M, BLOCK_N, DYB_BLOCK_M, DYB_BLOCK_N, MODE)


@work(dy_pass_kernel, dy_pair_kernel)
def dy_work(a: Mapping[str, Any]) -> Launch:
    """One read of dy, from which dyb's programs and dB's both take it."""
    products = (a["dyb_ptr"] is not None) + (a["d_lora_b_ptr"] is not None)
    reads = nbytes(a["dy_ptr"], a["xa_ptr"], a["lora_b_ptr"])
    writes = nbytes(a["dyb_ptr"], a["d_lora_b_ptr"], a["d_bias_ptr"])
    return Launch("dy_pass", reads, writes, products * 2 * a["M"] * a["N"] * a["R"])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _x_pass_kernel(
    x_ptr,
    dyb_ptr,
    lora_a_ptr,
    d_lora_a_ptr,
    dx_ptr,
    seed_ptr,
    threshold,
    first_programs,
    M,
    K,
    chunk_rows,
    CHUNKS: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DX_BLOCK_M: tl.constexpr,
    DX_BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MODE: tl.constexpr,
):
    """The first programs do dA, the others dx += drop(dyb A), or dx = ... without ACCUMULATE."""
    pid = tl.program_id(0)
    if d_lora_a_ptr is not None and pid < first_programs:
        args = (x_ptr, dyb_ptr, d_lora_a_ptr, seed_ptr, threshold, M, K, chunk_rows)
        d_lora_a_body(pid, *args, CHUNKS, R, R_PAD, BLOCK_M, BLOCK_K, MODE)
    if dx_ptr is not None and pid >= first_programs:
        args = (dx_ptr, dyb_ptr, lora_a_ptr, None, seed_ptr, threshold, 1.0, M, K, K)
        epilogue_body(
            pid - first_programs,
            *args,
            CHUNKS,
            R,
            R_PAD,
            DX_BLOCK_M,
            DX_BLOCK_K,
            BLOCK_R,
            True,
            ACCUMULATE,
            MODE,
        )


@work(_x_pass_kernel)
def _x_pass_work(a: Mapping[str, Any]) -> Launch:
    m, k, draws = a["M"], a["K"], a["seed_ptr"] is not None
    products = (a["d_lora_a_ptr"] is not None) + (a["dx_ptr"] is not None)
    reads = nbytes(a["x_ptr"], a["dyb_ptr"], a["lora_a_ptr"], a["dx_ptr"] if a["ACCUMULATE"] else None)
    writes = nbytes(a["d_lora_a_ptr"], a["dx_ptr"])
    flops, ops = products * 2 * m * k * a["R"], products * PHILOX_OPS * m * k * draws
    return Launch("x_pass", reads, writes, flops, ops)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _y_epilogue_kernel(
    y_ptr,
    xa_ptr,
    lora_b_ptr,
    bias_ptr,
    scaling,
    M,
    N,
    y_stride,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MODE: tl.constexpr,
):
    args = (y_ptr, xa_ptr, lora_b_ptr, bias_ptr, None, 0, scaling, M, N, y_stride)
    epilogue_body(tl.program_id(0), *args, 1, R, R_PAD, BLOCK_M, BLOCK_N, BLOCK_R, False, ACCUMULATE, MODE)


@work(_y_epilogue_kernel)
def _y_epilogue_work(a: Mapping[str, Any]) -> Launch:
    low = nbytes(a["xa_ptr"], a["lora_b_ptr"], a["bias_ptr"], a["y_ptr"] if a["ACCUMULATE"] else None)
    rank = 0 if a["lora_b_ptr"] is None else a["R"]
    return Launch("y_epilogue", low, nbytes(a["y_ptr"]), 2 * a["M"] * a["N"] * rank)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _reduce_kernel(
    partials0_ptr,
    out0_ptr,
    chunks0,
    numel0,
    partials1_ptr,
    out1_ptr,
    chunks1,
    numel1,
    partials2_ptr,
    out2_ptr,
    chunks2,
    numel2,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Up to three sums side by side, by ranges of program ids."""
    pid = tl.program_id(0)
    first, second = tl.cdiv(numel0, BLOCK), tl.cdiv(numel1, BLOCK)
    if pid < first:
        reduce_body(pid, partials0_ptr, out0_ptr, chunks0, numel0, BLOCK, BLOCK_CHUNKS)
    if partials1_ptr is not None and (pid >= first) & (pid < first + second):
        reduce_body(pid - first, partials1_ptr, out1_ptr, chunks1, numel1, BLOCK, BLOCK_CHUNKS)
    if partials2_ptr is not None and pid >= first + second:
        reduce_body(pid - first - second, partials2_ptr, out2_ptr, chunks2, numel2, BLOCK, BLOCK_CHUNKS)


@work(_reduce_kernel)
def _reduce_work(a: Mapping[str, Any]) -> Launch:
    partials, outs = ([a[f"{name}{slot}_ptr"] for slot in range(3)] for name in ("partials", "out"))
    return Launch("reduce", nbytes(partials), nbytes(outs))


@dataclass(frozen=True)
class DyPartials:
    """What one pass over dy left: dyb fp32 [chunks, M, R]; d_lora_b [chunks, N, R] and d_bias fp32 [chunks,
    N], in their final dtype where there is one chunk, else fp32. None where nobody needs it."""

    dyb: Tensor | None
    d_lora_b: Tensor | None
    d_bias: Tensor | None


def dot_mode_of(x: Tensor, adapter: Tensor | None, arch: int) -> str:
    """`dot_mode` of x [M, ...] and an adapter."""
    x_dtype, other = (str(t.dtype).removeprefix("torch.") for t in (x, x if adapter is None else adapter))
    return dot_mode(x_dtype, other, arch, x.shape[0])


def config_for(
    x: Tensor, adapter: Tensor | None, m: int, n: int, k: int, r: int, *, arch: int | None = None
) -> LowRankConfig:
    """The device's configuration; `arch` in place of the device's own."""
    device = device_of(x)
    arch = arch or device.arch
    mode = dot_mode_of(x, adapter, arch)
    return choose_low_rank(m, n, k, r, mode=mode, sms=device.multiprocessors, arch=arch)


def call_of(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile, arch: int) -> Call:
    # Without a limit ptxas keeps to 128 registers and spills a few of some variants on sm_100 and sm_120, and
    # of products of fp32 operands on sm_86 (counted in the cubins); 65536 are an SM's.
    limited = arch >= 100 or arguments.get("MODE") == "tf32x3"
    registers = min(255, 65536 // (32 * tile.num_warps)) if limited else None
    return Call(kernel, programs, arguments, tile.num_warps, tile.num_stages, registers)


def padded_rank(r: int) -> int:
    return max(16, next_power_of_2(r))


def dropout_threshold(dropout_p: float, seed: Tensor | None) -> int:
    return 0 if seed is None else round(dropout_p * 65536)


def project_call(
    x: Tensor,
    adapter: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    config: LowRankConfig,
    *,
    by_rank: bool,
    arch: int,
) -> tuple[Call, Tensor]:
    """scale * drop(x) @ adapter -> fp32 [splits, M, R]; the adapter is lora_a [R, C] by rank, else lora_b [C,
    R]."""
    (m, c), r, tile = x.shape, adapter.shape[0 if by_rank else 1], config.xa
    split_cols = ceil_div(ceil_div(c, config.xa_splits), tile.cols) * tile.cols
    splits = ceil_div(c, split_cols)
    out = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": x,
        "adapter_ptr": adapter,
        "out_ptr": out,
        "seed_ptr": seed,
        "threshold": dropout_threshold(dropout_p, seed),
    }
    arguments |= {
        "scale": float(scale),
        "M": m,
        "C": c,
        "split_cols": split_cols,
        "R": r,
        "R_PAD": padded_rank(r),
    }
    arguments |= {
        "BLOCK_M": tile.rows,
        "BLOCK_C": tile.cols,
        "BY_RANK": by_rank,
        "MODE": dot_mode_of(x, adapter, arch),
    }
    return call_of(project_kernel, splits * ceil_div(m, tile.rows), arguments, tile, arch), out


def _whole(partials: Tensor) -> Tensor:
    """The sum over chunks, one launch where there are several."""
    for call in (reduced := reduce_calls([(partials, torch.float32)]))[0]:
        run(call)
    return reduced[1][0]


def xa_forward(
    x: Tensor,
    lora_a: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LowRankConfig | None = None,
) -> Tensor:
    """x [M, K], lora_a [R, K] -> xa = drop(x) A^T, fp32 [M, R]; two launches where the contraction is split
    (few rows), else one."""
    config = config or config_for(x, lora_a, x.shape[0], x.shape[1], x.shape[1], lora_a.shape[0])
    call, xa = project_call(x, lora_a, 1.0, dropout_p, seed, config, by_rank=True, arch=device_of(x).arch)
    run(call)
    return _whole(xa)


def dy_calls(
    dy: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
    config: LowRankConfig,
    *,
    arch: int,
) -> tuple[Call, DyPartials]:
    """The one launch over dy, `needs` as the op's: (dx, d_bias, dA, dB); at least one of dyb, d_bias, dB must
    be needed."""
    (m, n), tile, new = dy.shape, config.dy, functools.partial(torch.empty, device=dy.device)
    r, chunks = (0 if lora_b is None else lora_b.shape[1]), ceil_div(m, config.dy_rows)
    need_dyb, need_b = r > 0 and (needs[0] or needs[2]), r > 0 and needs[3]
    if need_dyb and not need_b and not needs[1]:
        call, dyb = project_call(dy, lora_b, scaling, 0.0, None, config, by_rank=False, arch=arch)
        return call, DyPartials(dyb, None, None)
    columns = ceil_div(n, tile.cols)
    d_lora_b = new((chunks, n, r), dtype=lora_b.dtype if chunks == 1 else torch.float32) if need_b else None
    d_bias = new((chunks, n), dtype=torch.float32) if needs[1] else None
    dyb = new((columns if config.fused else 1, m, r), dtype=torch.float32) if need_dyb else None
    arguments = {
        "dy_ptr": dy,
        "xa_ptr": xa if need_b else None,
        "lora_b_ptr": lora_b if need_dyb else None,
        "dyb_ptr": dyb,
    }
    arguments |= {
        "d_lora_b_ptr": d_lora_b,
        "d_bias_ptr": d_bias,
        "scaling": float(scaling),
        "M": m,
        "N": n,
        "chunk_rows": config.dy_rows,
    }
    arguments |= {
        "R": max(r, 1),
        "R_PAD": padded_rank(max(r, 1)),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "MODE": dot_mode_of(dy, lora_b, arch),
    }
    partials = DyPartials(dyb, d_lora_b, d_bias)
    if config.fused or dyb is None:
        return call_of(dy_pass_kernel, chunks * columns, arguments, tile, arch), partials
    rows = min(config.xa.rows, config.dy_rows)
    arguments |= {"DYB_BLOCK_M": rows, "DYB_BLOCK_N": config.xa.cols}
    programs = chunks * (config.dy_rows // rows + columns)
    return call_of(dy_pair_kernel, programs, arguments, tile, arch), partials


def dy_pass(
    dy: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
    *,
    config: LowRankConfig | None = None,
) -> DyPartials:
    """dy [M, N], xa fp32 [M, R] -> dyb = s dy B, partial sums of dB = s dy^T xa and d_bias; one launch, and
    one that adds the dyb of the column chunks where the configuration says so."""
    config = config or config_for(
        dy, lora_b, *dy.shape, dy.shape[1], 1 if lora_b is None else lora_b.shape[1]
    )
    call, partials = dy_calls(dy, xa, lora_b, scaling, needs, config, arch=device_of(dy).arch)
    run(call)
    return DyPartials(summed(partials.dyb, config), partials.d_lora_b, partials.d_bias)


def summed(dyb: Tensor | None, config: LowRankConfig) -> Tensor | None:
    """dyb [chunks, M, R], added up to one chunk by a launch of its own: of a split contraction, or where the
    configuration says so."""
    apart = (
        dyb is not None and dyb.shape[0] > 1 and (config.sum_dyb or not config.fused or config.xa_splits > 1)
    )
    return _whole(dyb)[None] if apart else dyb


def x_call(
    x: Tensor | None,
    dyb: Tensor,
    lora_a: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dx: Tensor | None,
    need_a: bool,
    config: LowRankConfig,
    *,
    arch: int,
    accumulate: bool = True,
) -> tuple[Call, Tensor | None]:
    """The one launch for dA, dx, or both."""
    (chunks, m, r), k, tile, dx_tile = dyb.shape, lora_a.shape[1], config.x, config.epilogue
    wide, row_chunks = (x if need_a else dx), ceil_div(m, config.x_rows)
    first = row_chunks * ceil_div(k, tile.cols) if need_a else 0
    others = ceil_div(m, dx_tile.rows) * ceil_div(k, dx_tile.cols) if dx is not None else 0
    dtype = lora_a.dtype if row_chunks == 1 else torch.float32
    d_lora_a = torch.empty((row_chunks, r, k), dtype=dtype, device=dyb.device) if need_a else None
    arguments = {
        "x_ptr": x if need_a else None,
        "dyb_ptr": dyb,
        "lora_a_ptr": lora_a if dx is not None else None,
    }
    arguments |= {
        "d_lora_a_ptr": d_lora_a,
        "dx_ptr": dx,
        "seed_ptr": seed,
        "threshold": dropout_threshold(dropout_p, seed),
    }
    arguments |= {
        "first_programs": first,
        "M": m,
        "K": k,
        "chunk_rows": config.x_rows,
        "CHUNKS": chunks,
        "R": r,
        "R_PAD": padded_rank(r),
    }
    arguments |= {
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.cols,
        "DX_BLOCK_M": dx_tile.rows,
        "DX_BLOCK_K": dx_tile.cols,
    }
    arguments |= {
        "BLOCK_R": min(config.ranks, padded_rank(r)),
        "ACCUMULATE": accumulate,
        "MODE": dot_mode_of(wide, lora_a, arch),
    }
    return call_of(_x_pass_kernel, first + others, arguments, tile if need_a else dx_tile, arch), d_lora_a


def x_pass(
    x: Tensor | None,
    dyb: Tensor,
    lora_a: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dx: Tensor | None = None,
    need_a: bool = True,
    accumulate: bool = True,
    config: LowRankConfig | None = None,
) -> Tensor | None:
    """dyb fp32 [chunks, M, R] -> partial sums [row chunks, R, K] of dA = dyb^T drop(x) where needed (in
    lora_a's dtype where there is one chunk, else fp32); where dx [M, K] is given also, in place, dx +=
    drop(dyb A), or dx = that without `accumulate`. One launch; x is read for dA alone."""
    wide = x if need_a else dx
    config = config or config_for(wide, lora_a, dyb.shape[1], lora_a.shape[1], lora_a.shape[1], dyb.shape[2])
    call, d_lora_a = x_call(
        x, dyb, lora_a, dropout_p, seed, dx, need_a, config, arch=device_of(dyb).arch, accumulate=accumulate
    )
    run(call)
    return d_lora_a


def y_call(
    y: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    config: LowRankConfig,
    *,
    arch: int,
    accumulate: bool = True,
) -> Call:
    """The one launch over y."""
    (m, n), r, tile = y.shape, (1 if lora_b is None else lora_b.shape[1]), config.epilogue
    arguments = {
        "y_ptr": y,
        "xa_ptr": xa if lora_b is not None else None,
        "lora_b_ptr": lora_b,
        "bias_ptr": bias,
    }
    arguments |= {
        "scaling": float(scaling),
        "M": m,
        "N": n,
        "y_stride": y.stride(0),
        "R": r,
        "R_PAD": padded_rank(r),
    }
    arguments |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_R": min(config.ranks, padded_rank(r))}
    arguments |= {"ACCUMULATE": accumulate, "MODE": dot_mode_of(y, lora_b, arch)}
    programs = ceil_div(m, tile.rows) * ceil_div(n, tile.cols)
    return call_of(_y_epilogue_kernel, programs, arguments, tile, arch)


def y_epilogue(
    y: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    accumulate: bool = True,
    config: LowRankConfig | None = None,
) -> None:
    """y [M, N] += s xa B^T + bias in place, or y = without `accumulate`; columns contiguous, rows any stride;
    one launch."""
    config = config or config_for(y, lora_b, *y.shape, y.shape[1], 1 if lora_b is None else lora_b.shape[1])
    run(y_call(y, xa, lora_b, scaling, bias, config, arch=device_of(y).arch, accumulate=accumulate))


def reduce_calls(sums: Sequence[tuple[Tensor | None, torch.dtype]]) -> tuple[list[Call], list[Tensor | None]]:
    """Up to three (partials [chunks, ...], dtype of the sum) -> at most one launch, and the sums; what has
    one chunk is taken as it is."""
    outs: list[Tensor | None] = []
    arguments: dict[str, Any] = {}
    slot = programs = 0
    block, block_chunks = 256, 8
    for partials, dtype in sums:
        if partials is None or partials.shape[0] == 1:
            outs.append(None if partials is None else partials[0].to(dtype))
            continue
        outs.append(out := torch.empty(partials.shape[1:], dtype=dtype, device=partials.device))
        names = (f"partials{slot}_ptr", f"out{slot}_ptr", f"chunks{slot}", f"numel{slot}")
        arguments |= zip(names, (partials, out, partials.shape[0], out.numel()), strict=True)
        programs, slot = programs + ceil_div(out.numel(), block), slot + 1
    if not slot:
        return [], outs
    for empty in range(slot, 3):
        arguments |= {
            f"partials{empty}_ptr": None,
            f"out{empty}_ptr": None,
            f"chunks{empty}": 0,
            f"numel{empty}": 0,
        }
    arguments |= {"BLOCK": block, "BLOCK_CHUNKS": block_chunks}
    return [Call(_reduce_kernel, programs, arguments, num_warps=4, num_stages=1)], outs


def reduce_partials(
    d_lora_a: Tensor | None, d_lora_b: Tensor | None, d_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Partials of `x_pass` and `dy_pass` -> dA [R, K], dB [N, R] in `dtype`, the adapters', d_bias fp32 [N];
    at most one launch."""
    calls, (a, b, bias) = reduce_calls([(d_lora_a, dtype), (d_lora_b, dtype), (d_bias, torch.float32)])
    for call in calls:
        run(call)
    return a, b, bias


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


def specializations(arch: int) -> Iterable[Specialization]:
    """The variants of a 4096 x 4096 linear with dropout and bias, the largest tiles at M = 8192. See
    `Specialization`."""
    variants = [v for v in _VARIANTS if arch >= 80 or torch.bfloat16 not in v]
    m, n, k = 8192, 4096, 4096
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for x_dtype, dtype, r in variants:
        new = functools.partial(torch.empty, device="meta")
        x, bias, xa = new((m, k), dtype=x_dtype), new(n, dtype=x_dtype), new((m, r), dtype=torch.float32)
        a, b = new((r, k), dtype=dtype), new((n, r), dtype=dtype)
        mode = dot_mode_of(x, a, arch)
        config = choose_low_rank(m, n, k, r, mode=mode, arch=arch)
        tag = f"{str(x_dtype)[6:]}-{mode}-r{r}"
        # Triton has no tensor cores on sm_75; tiles of larger ranks are too small for 16 bytes a thread.
        promise = functools.partial(_promising, arch >= 80, arch >= 80 and r <= 64)
        yield promise(
            f"xa-{tag}", project_call(x, a, 1.0, 0.1, seed, config, by_rank=True, arch=arch)[0], "row_ptr"
        )
        yield promise(
            f"dyb-{tag}", project_call(x, b, 0.7, 0.0, None, config, by_rank=False, arch=arch)[0], "row_ptr"
        )
        call, partials = dy_calls(x, xa, b, 0.7, (True, False, True, True), config, arch=arch)
        yield promise(f"dy-{tag}", call, "dy_ptr")
        if config.fused:
            beside = dy_calls(
                x, xa, b, 0.7, (True, False, True, True), replace(config, fused=False), arch=arch
            )[0]
            yield promise(f"dy-beside-{tag}", beside, "dy_ptr", "row_ptr")
        yield promise(
            f"dy-bias-{tag}",
            dy_calls(x, xa, b, 0.7, (False, True, False, True), config, arch=arch)[0],
            "dy_ptr",
        )
        dyb = partials.dyb[:1] if config.sum_dyb else partials.dyb
        call, d_lora_a = x_call(x, dyb, a, 0.1, seed, x, True, config, arch=arch)
        yield promise(f"x-dx-{tag}", call, "x_ptr", "y_tile")
        yield promise(f"x-{tag}", x_call(x, dyb, a, 0.1, seed, None, True, config, arch=arch)[0], "x_ptr")
        yield promise(f"y-{tag}", y_call(x, xa, b, 0.7, bias, config, arch=arch), "y_tile")
        yield specialization(
            f"sums-{tag}", reduce_calls([(d_lora_a, dtype), (partials.d_lora_b, dtype)])[0][0]
        )
    if arch >= 80:
        yield from _of_few_rows(arch)


def _of_few_rows(arch: int) -> Iterable[Specialization]:
    """fp32 operands of `EXACT_ROWS` rows, multiplied outside the tensor cores."""
    m, n, k, dtype = EXACT_ROWS, 4096, 4096, torch.float32
    seed, new = (
        torch.empty(1, dtype=torch.int64, device="meta"),
        functools.partial(torch.empty, dtype=dtype, device="meta"),
    )
    for r in (16, 256):
        x, xa, a, b = new((m, k)), new((m, r)), new((r, k)), new((n, r))
        mode = dot_mode_of(x, a, arch)
        config = choose_low_rank(m, n, k, r, mode=mode, arch=arch)
        tag = f"float32-{mode}-r{r}"
        yield specialization(
            f"xa-{tag}", project_call(x, a, 1.0, 0.1, seed, config, by_rank=True, arch=arch)[0]
        )
        call, partials = dy_calls(x, xa, b, 0.7, (True, True, True, True), config, arch=arch)
        yield specialization(f"dy-{tag}", call)
        dyb = partials.dyb[:1] if config.sum_dyb else partials.dyb
        yield specialization(f"x-dx-{tag}", x_call(x, dyb, a, 0.1, seed, x, True, config, arch=arch)[0])
        yield specialization(f"y-{tag}", y_call(x, xa, b, 0.7, new(n), config, arch=arch))


def _promising(mma: bool, wide: bool, name: str, call: Call, *pointers: str) -> Specialization:
    return specialization(name, call, expects_mma=mma, wide_loads=pointers if wide else ())
