"""The launches of the low-rank passes: what each kernel of `triton_low_rank` is given, which bytes it moves
and what it computes.

A launch is data, of one member or of several; `beside_decoding` joins it with the decoding of weights. All
tensors but y are contiguous; M, N and K are at least 1. Partial sums are fp32 with the chunk as first axis.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...runtime.launch import Call
from ...runtime.plan import PHILOX_OPS, Launch, device_of, nbytes, work
from ..dequantize.triton import Format, Rectangle, decode_work, decoding
from ..sizes import ceil_div, next_power_of_2
from .kernels.triton_low_rank import (
    DyOperands,
    Projection,
    Sum,
    XOperands,
    YOperands,
    dy_kernel,
    project_kernel,
    reduce_kernel,
    x_kernel,
    y_kernel,
)
from .low_rank_config import LowRankConfig, Ranks, Tile, choose_low_rank, dot_mode

__all__ = [
    "DyMember",
    "DyPartials",
    "Low",
    "beside_decoding",
    "config_for",
    "dy_call",
    "dyb_call",
    "reduce_calls",
    "x_call",
    "xa_call",
    "y_call",
    "y_operands",
]

REDUCE_BLOCK, REDUCE_CHUNKS = 256, 8


@dataclass(frozen=True)
class Low:
    """An adapter on all rows: a [R, K], b [N, R]; whoever needs one of the two may leave out the other."""

    a: Tensor | None
    b: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[1] if self.a is None else self.a.shape[0]

    @property
    def threshold(self) -> int:
        return 0 if self.seed is None else round(self.dropout_p * 65536)


@dataclass(frozen=True)
class DyMember:
    """What is wanted of one dy [M, N]; xa fp32 [M, R] where dB is."""

    dy: Tensor
    low: Low | None
    xa: Tensor | None
    need_dyb: bool
    need_b: bool
    need_bias: bool


@dataclass(frozen=True)
class DyPartials:
    """What a pass over dy left: dyb fp32 [chunks, M, R]; d_lora_b [chunks, N, R], in the adapter's dtype
    where there is one chunk, else fp32; d_bias fp32 [chunks, N]. None where nobody needs it."""

    dyb: Tensor | None
    d_lora_b: Tensor | None
    d_bias: Tensor | None


def config_for(
    x: Tensor, adapter: Tensor | None, m: int, n: int, k: int, r: int, *, arch: int | None = None
) -> LowRankConfig:
    """The device's configuration; `arch` in place of the device's own."""
    device = device_of(x)
    arch = arch or device.arch
    mode = _mode(x, adapter, arch)
    return choose_low_rank(m, n, k, r, mode=mode, sms=device.multiprocessors, arch=arch)


def _mode(x: Tensor, adapter: Tensor | None, arch: int) -> str:
    x_dtype, other = (str(t.dtype).removeprefix("torch.") for t in (x, x if adapter is None else adapter))
    return dot_mode(x_dtype, other, arch, x.shape[0])


def _ranks(
    x: Tensor, adapters: Sequence[Tensor | None], ranks: Sequence[int], config: LowRankConfig, arch: int
) -> Ranks:
    """Of adapters of one dtype that meet x [M, ...]; 1 where there is none."""
    padded = max(16, next_power_of_2(max(ranks)))
    adapter = next((t for t in adapters if t is not None), None)
    return Ranks(tuple(ranks), padded, min(config.ranks, padded), _mode(x, adapter, arch))


def _call(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile, arch: int) -> Call:
    # Without a limit ptxas keeps to 128 registers and spills a few of some variants on sm_100 and sm_120, and
    # of products of fp32 operands on sm_86 (counted in the cubins); 65536 are an SM's.
    limited = arch >= 100 or arguments["RANKS"].mode == "tf32x3"
    registers = min(255, 65536 // (32 * tile.num_warps)) if limited else None
    return Call(kernel, programs, arguments, tile.num_warps, tile.num_stages, registers)


_ALONE = {"first_programs": 0, "rectangles": None, "FORMAT": None}


def beside_decoding(call: Call, rectangles: Sequence[tuple[Rectangle, Format]]) -> Call:
    """What `call`, of xa or dy, does, and rectangles of one format decoded, in one launch; none: the call."""
    if not rectangles:
        return call
    programs, arguments = decoding(rectangles)
    arguments = call.arguments | {"first_programs": call.programs} | arguments
    return replace(call, programs=call.programs + programs, arguments=arguments)


def _with_decoding(a: Mapping[str, Any], launch: Launch) -> Launch:
    return launch if a["rectangles"] is None else decode_work(a).beside(launch)


def xa_call(x: Tensor, lows: Sequence[Low], config: LowRankConfig, *, arch: int) -> tuple[Call, list[Tensor]]:
    """xa = drop(x) A^T of every adapter, fp32 [splits, M, R]."""
    outs = [_split_sums(x, low.rank, config) for low in lows]
    parts = [Projection(low.a, out, low.seed) for low, out in zip(lows, outs, strict=True)]
    ranks = _ranks(x, [low.a for low in lows], [low.rank for low in lows], config, arch)
    return _project_call(x, parts, [low.threshold for low in lows], 1.0, ranks, True, config, arch), outs


def dyb_call(dy: Tensor, low: Low, config: LowRankConfig, *, arch: int) -> tuple[Call, Tensor]:
    """dyb = s dy B alone, fp32 [splits, M, R]."""
    out = _split_sums(dy, low.rank, config)
    ranks = _ranks(dy, [low.b], [low.rank], config, arch)
    return _project_call(
        dy, [Projection(low.b, out, None)], [0], float(low.scaling), ranks, False, config, arch
    ), out


def _split_columns(c: int, config: LowRankConfig) -> int:
    return ceil_div(ceil_div(c, config.xa_splits), config.xa.cols) * config.xa.cols


def _split_sums(x: Tensor, rank: int, config: LowRankConfig) -> Tensor:
    splits = ceil_div(x.shape[1], _split_columns(x.shape[1], config))
    return torch.empty((splits, x.shape[0], rank), dtype=torch.float32, device=x.device)


def _project_call(
    x: Tensor,
    lows: list[Projection],
    thresholds: list[int],
    scale: float,
    ranks: Ranks,
    by_rank: bool,
    config: LowRankConfig,
    arch: int,
) -> Call:
    (m, c), tile = x.shape, config.xa
    arguments = {
        "x_ptr": x,
        "lows": tuple(lows),
        "thresholds": tuple(thresholds),
        "scale": scale,
        "M": m,
        "C": c,
        "split_cols": _split_columns(c, config),
        **_ALONE,
        "TILE": tile,
        "RANKS": ranks,
        "BY_RANK": by_rank,
    }
    programs = len(lows) * lows[0].out.shape[0] * ceil_div(m, tile.rows)
    return _call(project_kernel, programs, arguments, tile, arch)


@work(project_kernel)
def _project_work(a: Mapping[str, Any]) -> Launch:
    """x is read once for all adapters."""
    size, lows = a["M"] * a["C"], a["lows"]
    draws = PHILOX_OPS * size * sum(low.seed is not None for low in lows)
    reads, writes = nbytes(a["x_ptr"], [low.adapter for low in lows]), nbytes([low.out for low in lows])
    flops = 2 * size * sum(a["RANKS"].each)
    return _with_decoding(a, Launch("xa" if a["BY_RANK"] else "dyb", reads, writes, flops, draws))


def dy_call(
    members: Sequence[DyMember], config: LowRankConfig, *, arch: int
) -> tuple[Call, list[DyPartials]]:
    """One launch over every dy, of each of which something must be wanted. Of one member `config.fused` says
    whether one read of dy gives dyb too; several have programs of their own for it."""
    if len(members) == 1 and not members[0].need_b and not members[0].need_bias:
        call, dyb = dyb_call(members[0].dy, members[0].low, config, arch=arch)
        return call, [DyPartials(dyb, None, None)]
    m, chunks = members[0].dy.shape[0], ceil_div(members[0].dy.shape[0], config.dy_rows)
    fused = config.fused and len(members) == 1
    found = [_dy_partials(one, chunks, config, fused) for one in members]
    operands = [_dy_operands(one, part) for one, part in zip(members, found, strict=True)]
    of_dyb = Tile(min(config.xa.rows, config.dy_rows), config.xa.cols)
    programs = 0
    for one in operands:
        for_dyb = config.dy_rows // of_dyb.rows if one.dyb is not None and not fused else 0
        programs += chunks * (ceil_div(one.columns, config.dy.cols) + for_dyb)
    lows = [one.low for one in members]
    adapters, ranks = [low and low.b for low in lows], [1 if low is None else low.rank for low in lows]
    arguments = {
        "members": tuple(operands),
        "M": m,
        "chunk_rows": config.dy_rows,
        **_ALONE,
        "TILE": config.dy,
        "DYB_TILE": None if fused else of_dyb,
        "RANKS": _ranks(members[0].dy, adapters, ranks, config, arch),
    }
    return _call(dy_kernel, programs, arguments, config.dy, arch), found


def _dy_partials(member: DyMember, chunks: int, config: LowRankConfig, fused: bool) -> DyPartials:
    (m, n), low = member.dy.shape, member.low
    new = functools.partial(torch.empty, device=member.dy.device)
    columns = ceil_div(n, config.dy.cols) if fused else 1
    dtype = low.b.dtype if member.need_b and chunks == 1 else torch.float32
    return DyPartials(
        new((columns, m, low.rank), dtype=torch.float32) if member.need_dyb else None,
        new((chunks, n, low.rank), dtype=dtype) if member.need_b else None,
        new((chunks, n), dtype=torch.float32) if member.need_bias else None,
    )


def _dy_operands(member: DyMember, partials: DyPartials) -> DyOperands:
    return DyOperands(
        member.dy,
        member.dy.shape[1],
        member.xa if member.need_b else None,
        member.low.b if member.need_dyb else None,
        1.0 if member.low is None else float(member.low.scaling),
        partials.dyb,
        partials.d_lora_b,
        partials.d_bias,
    )


@work(dy_kernel)
def _dy_work(a: Mapping[str, Any]) -> Launch:
    """Every dy is read once: dyb's programs and dB's both take it from that read, or from a cache."""
    flops = reads = writes = 0
    for one, rank in zip(a["members"], a["RANKS"].each, strict=True):
        products = (one.dyb is not None) + (one.d_lora_b is not None)
        flops += products * 2 * a["M"] * one.columns * rank
        reads += nbytes(one.dy, one.xa, one.adapter)
        writes += nbytes(one.dyb, one.d_lora_b, one.d_bias)
    return _with_decoding(a, Launch("dy_pass", reads, writes, flops))


def x_call(
    x: Tensor | None,
    dx: Tensor | None,
    lows: Sequence[Low],
    dybs: Sequence[Tensor],
    need_a: Sequence[bool],
    config: LowRankConfig,
    *,
    arch: int,
    accumulate: bool = False,
) -> tuple[Call, list[Tensor | None]]:
    """dx (+)= the sum over adapters of drop(dyb A) where dx is given, and partial sums [row chunks, R, K] of
    the dA that are wanted, in the adapters' dtype where there is one chunk, else fp32; dyb fp32 [chunks, M,
    R]."""
    (chunks, m, _), k, tile, dx_tile = dybs[0].shape, lows[0].a.shape[1], config.x, config.epilogue
    row_chunks, wide = ceil_div(m, config.x_rows), (x if any(need_a) else dx)
    first = len(lows) * row_chunks * ceil_div(k, tile.cols) if any(need_a) else 0
    others = 0 if dx is None else ceil_div(m, dx_tile.rows) * ceil_div(k, dx_tile.cols)
    dtype = lows[0].a.dtype if row_chunks == 1 else torch.float32
    d_lora_a = [
        torch.empty((row_chunks, low.rank, k), dtype=dtype, device=dybs[0].device) if a else None
        for low, a in zip(lows, need_a, strict=True)
    ]
    operands = [
        XOperands(dyb, None if dx is None else low.a, d_a, low.seed)
        for dyb, low, d_a in zip(dybs, lows, d_lora_a, strict=True)
    ]
    arguments = {
        "x_ptr": x if any(need_a) else None,
        "dx_ptr": dx,
        "lows": tuple(operands),
        "thresholds": tuple(low.threshold for low in lows),
        "first_programs": first,
        "M": m,
        "K": k,
        "chunk_rows": config.x_rows,
        "CHUNKS": chunks,
        "TILE": tile,
        "DX_TILE": dx_tile,
        "RANKS": _ranks(wide, [lows[0].a], [low.rank for low in lows], config, arch),
        "ACCUMULATE": accumulate,
    }
    call = _call(x_kernel, first + others, arguments, tile if any(need_a) else dx_tile, arch)
    if len(lows) > 1 and call.max_registers is None:
        # On sm_80 ptxas keeps to 128 registers and spills 24 bytes of them (counted in the cubins): the limit
        # is the block's share of an SM's.
        call = replace(call, max_registers=min(255, 65536 // (32 * call.num_warps)))
    return call, d_lora_a


@work(x_kernel)
def _x_work(a: Mapping[str, Any]) -> Launch:
    """x is read once for all adapters."""
    dx, size, flops, ops = a["dx_ptr"], a["M"] * a["K"], 0, 0
    for low, rank in zip(a["lows"], a["RANKS"].each, strict=True):
        products = (low.d_lora_a is not None) + (dx is not None)
        flops += 2 * size * rank * products
        ops += PHILOX_OPS * size * products * (low.seed is not None)
    reads = nbytes(a["x_ptr"], dx if a["ACCUMULATE"] else None, [low[:2] for low in a["lows"]])
    return Launch("x_pass", reads, nbytes([low.d_lora_a for low in a["lows"]], dx), flops, ops)


def y_operands(
    y: Tensor, xa: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None
) -> YOperands:
    """y [M, N], whose rows may lie apart, xa fp32 [M, R], lora_b [N, R] or None: bias alone."""
    left = None if lora_b is None else xa
    return YOperands(y, y.shape[1], y.stride(0), left, lora_b, float(scaling), bias, None)


def y_call(
    members: Sequence[YOperands], config: LowRankConfig, *, arch: int, accumulate: bool = False
) -> Call:
    """y (+)= s xa B^T + bias of every member."""
    y, tile = members[0].out, config.epilogue
    adapters = [one.adapter for one in members]
    ranks = [1 if adapter is None else adapter.shape[1] for adapter in adapters]
    arguments = {
        "members": tuple(members),
        "M": y.shape[0],
        "TILE": tile,
        "RANKS": _ranks(y, adapters, ranks, config, arch),
        "ACCUMULATE": accumulate,
    }
    programs = ceil_div(y.shape[0], tile.rows) * sum(ceil_div(one.columns, tile.cols) for one in members)
    return _call(y_kernel, programs, arguments, tile, arch)


@work(y_kernel)
def _y_work(a: Mapping[str, Any]) -> Launch:
    flops = reads = 0
    for one, rank in zip(a["members"], a["RANKS"].each, strict=True):
        flops += 0 if one.adapter is None else 2 * a["M"] * one.columns * rank
        reads += nbytes(one.left, one.adapter, one.bias, one.out if a["ACCUMULATE"] else None)
    return Launch("y_epilogue", reads, nbytes([one.out for one in a["members"]]), flops)


def reduce_calls(sums: Sequence[tuple[Tensor | None, torch.dtype]]) -> tuple[list[Call], list[Tensor | None]]:
    """(partials [chunks, ...], dtype of the sum) -> at most one launch, and the sums; what has one chunk is
    taken as it is."""
    outs = [
        None
        if part is None
        else part[0].to(dtype)
        if part.shape[0] == 1
        else torch.empty(part.shape[1:], dtype=dtype, device=part.device)
        for part, dtype in sums
    ]
    pairs = zip((part for part, _ in sums), outs, strict=True)
    split = [(part, out) for part, out in pairs if part is not None and part.shape[0] > 1]
    if not split:
        return [], outs
    arguments = {
        "sums": tuple(Sum(part, out, out.numel(), 2 * part.shape[0] + 1) for part, out in split),
        "BLOCK": REDUCE_BLOCK,
        "BLOCK_CHUNKS": REDUCE_CHUNKS,
    }
    programs = sum(ceil_div(out.numel(), REDUCE_BLOCK) for _, out in split)
    return [Call(reduce_kernel, programs, arguments, num_warps=4, num_stages=1)], outs


@work(reduce_kernel)
def _reduce_work(a: Mapping[str, Any]) -> Launch:
    return Launch(
        "reduce", nbytes([one.partials for one in a["sums"]]), nbytes([one.out for one in a["sums"]])
    )
