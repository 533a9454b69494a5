"""A group's passes on a GPU: what the single linear launches once a member, side by side in one launch each.

A launch's programs are shared out between members by ranges of ids; where members read the same rows of x
their programs are neighbours in time, so that x comes from memory once and from L2 for the others. Arguments
of members are tuples, unrolled by the compiler: a group is never large. The bodies are the single linear's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, specialization
from ...runtime.plan import DECODE_OPS, PHILOX_OPS, Launch, nbytes, work
from ...runtime.specialization import Specialization
from ..dequantize.triton import RAGGED_WARPS, WARPS, tiles
from ..qlora_linear.low_rank_config import LowRankConfig, Tile, choose_low_rank
from ..qlora_linear.triton_low_rank import call_of, dot_mode_of, dropout_threshold, padded_rank
from ..qlora_linear.triton_low_rank_bodies import (
    adapter_tile,
    d_lora_a_body,
    dot_narrow,
    dy_pair_body,
    dy_pass_body,
    epilogue_body,
    project_body,
    reduce_body,
    sum_of_chunks,
)
from ..qlora_linear.triton_slab import slab_body
from ..sizes import ceil_div, weight_bytes
from ..triton_numerics import round_to
from ..triton_philox import dropout_keep, dropout_key, keep_factor

__all__ = [
    "Low",
    "decode_arguments",
    "dy_call",
    "reduce_call",
    "specializations",
    "x_call",
    "xa_call",
    "y_call",
]

REDUCE_BLOCK, REDUCE_CHUNKS = 256, 8


@triton.jit
def _decode_members(
    pid,
    packed,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    slab,
    row_units,
    units,
    WEIGHTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    METHOD: tl.constexpr,
):
    """Whole weights, one after the other."""
    first = 0
    for i in tl.static_range(WEIGHTS):
        programs = tl.cdiv(units[i], UNITS)
        if (pid >= first) & (pid < first + programs):
            weight = (
                packed[i],
                code[i],
                absmax[i],
                absmax_8bit[i],
                absmax_code[i],
                nested_absmax[i],
                absmax_offset[i],
            )
            place = (slab[i], 0, 0, row_units, units[i], units[i])
            slab_body(pid - first, *weight, *place, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, True, METHOD)
        first += programs


@triton.jit(do_not_specialize=("M", "first_programs"))
def _group_project_kernel(
    packed,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    slab,
    row_units,
    units,
    first_programs,
    x_ptr,
    adapters,
    outs,
    seeds,
    thresholds,
    M,
    C,
    WEIGHTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    METHOD: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """xa of every adapter, and the members' weights decoded. Neighbouring programs take the same rows of
    x."""
    pid = tl.program_id(0)
    if pid < first_programs:
        for j in tl.static_range(ADAPTERS):
            if pid % ADAPTERS == j:
                args = (x_ptr, adapters[j], outs[j], seeds[j], thresholds[j], 1.0, M, C, C)
                project_body(pid // ADAPTERS, *args, RANKS[j], R_PAD, BLOCK_M, BLOCK_C, True, MODE)
    else:
        weights = (
            packed,
            code,
            absmax,
            absmax_8bit,
            absmax_code,
            nested_absmax,
            absmax_offset,
            slab,
            row_units,
            units,
        )
        _decode_members(
            pid - first_programs, *weights, WEIGHTS, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, METHOD
        )


@work(_group_project_kernel)
def _xa_work(a: Mapping[str, Any]) -> Launch:
    """x is read once for all adapters."""
    xa, size = None, 2 * a["M"] * a["C"]
    if a["ADAPTERS"]:
        draws = PHILOX_OPS * a["M"] * a["C"] * sum(seed is not None for seed in a["seeds"])
        reads = nbytes(a["x_ptr"], a["adapters"])
        xa = Launch("xa", reads, nbytes(a["outs"]), size * sum(a["RANKS"]), draws)
    return _beside_decoding(a, xa)


def _beside_decoding(a: Mapping[str, Any], other: Launch | None) -> Launch:
    """The members' weights decoded, if there are any, in the launch of `other`, if there is one."""
    if not a["WEIGHTS"]:
        return other
    counts = [units * max(8 * a["WORDS"], 1) for units in a["units"]]
    sizes = a["BLOCKSIZE"], a["NESTED_BLOCKSIZE"]
    reads = sum(
        weight_bytes(count, absmax, *sizes) for count, absmax in zip(counts, a["absmax"], strict=True)
    )
    decoded = Launch("slab", reads, nbytes(a["slab"]), 0, DECODE_OPS * sum(counts))
    return decoded if other is None else decoded.beside(other)


@triton.jit(do_not_specialize=("M", "first_programs"))
def _group_dy_kernel(
    packed,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    slab,
    row_units,
    units,
    first_programs,
    dys,
    xas,
    adapters,
    dybs,
    d_lora_bs,
    d_biases,
    scalings,
    M,
    N,
    chunk_rows,
    WEIGHTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    METHOD: tl.constexpr,
    MEMBERS: tl.constexpr,
    RANKS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DYB_BLOCK_M: tl.constexpr,
    DYB_BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
):
    """dyb, dB and d_bias of every member, and the members' weights decoded."""
    pid = tl.program_id(0)
    first, chunks = 0, tl.cdiv(M, chunk_rows)
    for i in tl.static_range(MEMBERS):
        programs = chunks * tl.cdiv(N[i], BLOCK_N)
        if dybs[i] is not None:
            programs += chunks * (chunk_rows // DYB_BLOCK_M)
        if (pid >= first) & (pid < first + programs):
            args = (
                dys[i],
                xas[i],
                adapters[i],
                dybs[i],
                d_lora_bs[i],
                d_biases[i],
                scalings[i],
                M,
                N[i],
                chunk_rows,
            )
            if dybs[i] is not None:
                dy_pair_body(
                    pid - first, *args, RANKS[i], R_PAD, BLOCK_M, BLOCK_N, DYB_BLOCK_M, DYB_BLOCK_N, MODE
                )
            else:
                dy_pass_body(pid - first, *args, RANKS[i], R_PAD, BLOCK_M, BLOCK_N, MODE)
        first += programs
    if pid >= first_programs:
        weights = (
            packed,
            code,
            absmax,
            absmax_8bit,
            absmax_code,
            nested_absmax,
            absmax_offset,
            slab,
            row_units,
            units,
        )
        _decode_members(
            pid - first_programs, *weights, WEIGHTS, BLOCKSIZE, NESTED_BLOCKSIZE, WORDS, UNITS, METHOD
        )


@work(_group_dy_kernel)
def _dy_work(a: Mapping[str, Any]) -> Launch:
    """Every dy is read once."""
    flops = 0
    for n, rank, *products in zip(a["N"], a["RANKS"], a["dybs"], a["d_lora_bs"], strict=True):
        flops += 2 * a["M"] * n * rank * sum(out is not None for out in products)
    reads = nbytes(a["dys"], a["xas"], a["adapters"])
    writes = nbytes(a["dybs"], a["d_lora_bs"], a["d_biases"])
    return _beside_decoding(a, Launch("dy_pass", reads, writes, flops))


@triton.jit(do_not_specialize=("M",))
def _group_y_kernel(
    ys,
    xas,
    adapters,
    biases,
    scalings,
    M,
    N,
    MEMBERS: tl.constexpr,
    RANKS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MODE: tl.constexpr,
):
    """y = s xa B^T + bias of every member."""
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(MEMBERS):
        programs = tl.cdiv(M, BLOCK_M) * tl.cdiv(N[i], BLOCK_N)
        if (pid >= first) & (pid < first + programs):
            args = (ys[i], xas[i], adapters[i], biases[i], None, 0, scalings[i], M, N[i], N[i])
            epilogue_body(
                pid - first, *args, 1, RANKS[i], R_PAD, BLOCK_M, BLOCK_N, BLOCK_R, False, False, MODE
            )
        first += programs


@work(_group_y_kernel)
def _y_work(a: Mapping[str, Any]) -> Launch:
    flops = sum(2 * a["M"] * n * rank for n, rank in zip(a["N"], a["RANKS"], strict=True))
    return Launch("y_epilogue", nbytes(a["xas"], a["adapters"], a["biases"]), nbytes(a["ys"]), flops)


@triton.jit
def _group_dx_body(
    pid,
    dx_ptr,
    dybs,
    adapters,
    seeds,
    thresholds,
    M,
    K,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MODE: tl.constexpr,
):
    """dx [M, K] = the sum over adapters of drop(dyb A), a tile a program, written once."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    column_blocks = tl.cdiv(K, BLOCK_K)
    row0, col0 = (pid // column_blocks) * BLOCK_M, (pid % column_blocks) * BLOCK_K
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_K)
    dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for j in tl.static_range(ADAPTERS):
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for rank0 in range(0, R_PAD, BLOCK_R):
            ranks = rank0 + tl.arange(0, BLOCK_R)
            dyb = sum_of_chunks(dybs[j], rows, ranks, M, 1, RANKS[j])  # [BLOCK_M, BLOCK_R]
            adapter = adapter_tile(adapters[j], cols, ranks, K, RANKS[j], True)  # [BLOCK_K, BLOCK_R]
            acc = dot_narrow(dyb, tl.trans(adapter), acc, DTYPE, MODE)
        if seeds[j] is not None:
            key_low, key_high = dropout_key(seeds[j])
            keep = dropout_keep(key_low, key_high, thresholds[j], row0, col0, BLOCK_M, BLOCK_K)
            acc = tl.where(keep, acc * keep_factor(thresholds[j]), 0.0)
        dx += acc
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    tl.store(dx_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], round_to(dx, DTYPE), mask=mask)


@triton.jit(do_not_specialize=("M", "first_programs"))
def _group_x_kernel(
    x_ptr,
    dybs,
    adapters,
    d_lora_as,
    dx_ptr,
    seeds,
    thresholds,
    first_programs,
    M,
    K,
    chunk_rows,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DX_BLOCK_M: tl.constexpr,
    DX_BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MODE: tl.constexpr,
):
    """The first programs do dA, neighbours the same tiles of x for one adapter each; the others dx = the
    adapters' sum."""
    pid = tl.program_id(0)
    if x_ptr is not None and pid < first_programs:
        for j in tl.static_range(ADAPTERS):
            if pid % ADAPTERS == j and d_lora_as[j] is not None:
                args = (x_ptr, dybs[j], d_lora_as[j], seeds[j], thresholds[j], M, K, chunk_rows)
                d_lora_a_body(pid // ADAPTERS, *args, 1, RANKS[j], R_PAD, BLOCK_M, BLOCK_K, MODE)
    if dx_ptr is not None and pid >= first_programs:
        args = (dx_ptr, dybs, adapters, seeds, thresholds, M, K)
        _group_dx_body(
            pid - first_programs, *args, ADAPTERS, RANKS, R_PAD, DX_BLOCK_M, DX_BLOCK_K, BLOCK_R, MODE
        )


@work(_group_x_kernel)
def _x_work(a: Mapping[str, Any]) -> Launch:
    """x is read once for all adapters."""
    dx, size, flops, ops = a["dx_ptr"], a["M"] * a["K"], 0, 0
    for rank, d_lora_a, seed in zip(a["RANKS"], a["d_lora_as"], a["seeds"], strict=True):
        products = (d_lora_a is not None) + (dx is not None)
        flops += 2 * size * rank * products
        ops += PHILOX_OPS * size * products * (seed is not None)
    reads = nbytes(a["x_ptr"], a["dybs"], None if dx is None else a["adapters"])
    return Launch("x_pass", reads, nbytes(a["d_lora_as"], dx), flops, ops)


@triton.jit
def _group_reduce_kernel(
    partials, outs, chunks, numels, SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """Sums side by side."""
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(SUMS):
        programs = tl.cdiv(numels[i], BLOCK)
        if (pid >= first) & (pid < first + programs):
            reduce_body(pid - first, partials[i], outs[i], chunks[i], numels[i], BLOCK, BLOCK_CHUNKS)
        first += programs


@work(_group_reduce_kernel)
def _reduce_work(a: Mapping[str, Any]) -> Launch:
    return Launch("reduce", nbytes(a["partials"]), nbytes(a["outs"]))


@dataclass(frozen=True)
class Low:
    """A member's adapter on all rows, contiguous."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


_NO_WEIGHTS = (
    "packed",
    "code",
    "absmax",
    "absmax_8bit",
    "absmax_code",
    "nested_absmax",
    "absmax_offset",
    "slab",
)


def decode_arguments(
    weights: Sequence[tuple[Tensor, tuple, Tensor]], k: int, *, arch: int | None = None
) -> tuple[int, dict[str, Any]]:
    """(packed, the op's tuple, slab [N, K]) of members that share block sizes and loads -> programs,
    arguments; of none nothing."""
    if not weights:
        constants = {
            "WEIGHTS": 0,
            "BLOCKSIZE": 64,
            "NESTED_BLOCKSIZE": 256,
            "WORDS": 4,
            "UNITS": 1,
            "METHOD": "PORTABLE",
        }
        return 0, {name: (None,) for name in _NO_WEIGHTS} | {"row_units": 16, "units": (16,)} | constants
    arch = None if weights[0][2].device.type == "cpu" else arch  # the interpreter has no permutes
    found = [
        tiles(packed, quant, k, slice(0, slab.shape[0]), slice(0, k), slab, arch=arch)
        for packed, quant, slab in weights
    ]
    shared = {
        name: found[0][1][name] for name in ("BLOCKSIZE", "NESTED_BLOCKSIZE", "WORDS", "UNITS", "METHOD")
    }
    assert all(one[name] == value for name, value in shared.items() for _, one in found)
    of = {
        name: tuple(one[f"{name if name != 'slab' else 'out'}_ptr"] for _, one in found)
        for name in _NO_WEIGHTS
    }
    sizes = {
        "row_units": found[0][1]["row_units"],
        "units": tuple(one["units"] for _, one in found),
        "WEIGHTS": len(found),
    }
    return sum(programs for programs, _ in found), of | sizes | shared


def _width(weights: dict[str, Any], tile: Tile) -> Tile:
    """A launch that only decodes takes the decoder's warps."""
    return Tile(tile.rows, tile.cols, WARPS if weights["WORDS"] else RAGGED_WARPS, 1)


def _ranks(lows: Sequence[Low | None]) -> dict[str, Any]:
    ranks = tuple(1 if low is None else low.rank for low in lows) or (1,)
    return {"RANKS": ranks, "R_PAD": padded_rank(max(ranks))}


def xa_call(
    x: Tensor,
    lows: Sequence[Low],
    weights: Sequence[tuple[Tensor, tuple, Tensor]],
    config: LowRankConfig,
    *,
    arch: int,
) -> tuple[Call, list[Tensor]]:
    """xa = drop(x) A^T of every adapter, fp32 [M, R], beside the decoding of the weights; either may be
    none."""
    (m, k), tile = x.shape, config.xa
    outs = [torch.empty((m, low.rank), dtype=torch.float32, device=x.device) for low in lows]
    programs, arguments = decode_arguments(weights, k, arch=arch)
    first = len(lows) * ceil_div(m, tile.rows)
    arguments |= {
        "x_ptr": x,
        "adapters": tuple(low.a for low in lows) or (None,),
        "outs": tuple(outs) or (None,),
    }
    arguments |= {
        "seeds": tuple(low.seed for low in lows) or (None,),
        "first_programs": first,
        "M": m,
        "C": k,
        "ADAPTERS": len(lows),
    }
    arguments |= {
        "thresholds": tuple(dropout_threshold(low.dropout_p, low.seed) for low in lows) or (0,),
        **_ranks(lows),
    }
    arguments |= {
        "BLOCK_M": tile.rows,
        "BLOCK_C": tile.cols,
        "MODE": dot_mode_of(x, lows[0].a if lows else None, arch),
    }
    return call_of(
        _group_project_kernel, first + programs, arguments, tile if lows else _width(arguments, tile), arch
    ), outs


@dataclass(frozen=True)
class DyMember:
    """What is wanted of one dy; xa fp32 [M, R] where dB is."""

    dy: Tensor
    low: Low | None
    xa: Tensor | None
    need_dyb: bool
    need_b: bool
    need_bias: bool


@dataclass(frozen=True)
class DyParts:
    """dyb fp32 [1, M, R]; partial sums of dB and d_bias, chunk first."""

    dyb: Tensor | None
    d_lora_b: Tensor | None
    d_bias: Tensor | None


def _dy_parts(member: DyMember, chunks: int) -> DyParts:
    (m, n), new = member.dy.shape, functools.partial(torch.empty, device=member.dy.device)
    low = member.low
    return DyParts(
        new((1, m, low.rank), dtype=torch.float32) if member.need_dyb else None,
        new((chunks, n, low.rank), dtype=low.b.dtype if chunks == 1 else torch.float32)
        if member.need_b
        else None,
        new((chunks, n), dtype=torch.float32) if member.need_bias else None,
    )


def dy_call(
    members: Sequence[DyMember],
    weights: Sequence[tuple[Tensor, tuple, Tensor]],
    k: int,
    config: LowRankConfig,
    *,
    arch: int,
) -> tuple[Call, list[DyParts]]:
    """One launch over every dy, as the single linear's pair of programs, beside the decoding of the
    weights."""
    tile, dyb_rows, m = config.dy, min(config.xa.rows, config.dy_rows), members[0].dy.shape[0]
    chunks = ceil_div(m, config.dy_rows)
    parts = [_dy_parts(member, chunks) for member in members]
    programs, arguments = decode_arguments(weights, k, arch=arch)
    first = 0
    for member in members:
        for_dyb = config.dy_rows // dyb_rows if member.need_dyb else 0
        first += chunks * (ceil_div(member.dy.shape[1], tile.cols) + for_dyb)
    lows = [member.low for member in members]
    adapter = next((low.b for low in lows if low is not None), None)
    arguments |= {
        "first_programs": first,
        "M": m,
        "N": tuple(member.dy.shape[1] for member in members),
        "chunk_rows": config.dy_rows,
    }
    arguments |= {
        "dys": tuple(member.dy for member in members),
        "xas": tuple(member.xa if member.need_b else None for member in members),
    }
    arguments |= {"adapters": tuple(member.low.b if member.need_dyb else None for member in members)}
    arguments |= {"dybs": tuple(p.dyb for p in parts), "d_lora_bs": tuple(p.d_lora_b for p in parts)}
    arguments |= {
        "d_biases": tuple(p.d_bias for p in parts),
        "scalings": tuple(1.0 if low is None else float(low.scaling) for low in lows),
    }
    arguments |= {
        "MEMBERS": len(members),
        **_ranks(lows),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "DYB_BLOCK_M": dyb_rows,
    }
    arguments |= {"DYB_BLOCK_N": config.xa.cols, "MODE": dot_mode_of(members[0].dy, adapter, arch)}
    return call_of(_group_dy_kernel, first + programs, arguments, tile, arch), parts


def y_call(
    ys: Sequence[Tensor],
    xas: Sequence[Tensor],
    lows: Sequence[Low],
    biases: Sequence[Tensor | None],
    config: LowRankConfig,
    *,
    arch: int,
) -> Call:
    """y [M, N] = s xa B^T + bias of members with adapters, contiguous."""
    m, tile, ns = ys[0].shape[0], config.epilogue, tuple(y.shape[1] for y in ys)
    arguments = {
        "ys": tuple(ys),
        "xas": tuple(xas),
        "adapters": tuple(low.b for low in lows),
        "biases": tuple(biases),
    }
    arguments |= {
        "scalings": tuple(float(low.scaling) for low in lows),
        "M": m,
        "N": ns,
        "MEMBERS": len(ys),
        **_ranks(lows),
    }
    arguments |= {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "BLOCK_R": min(config.ranks, arguments["R_PAD"]),
    }
    arguments |= {"MODE": dot_mode_of(ys[0], lows[0].b, arch)}
    programs = ceil_div(m, tile.rows) * sum(ceil_div(n, tile.cols) for n in ns)
    return call_of(_group_y_kernel, programs, arguments, tile, arch)


def x_call(
    x: Tensor | None,
    dx: Tensor | None,
    lows: Sequence[Low],
    dybs: Sequence[Tensor],
    need_a: Sequence[bool],
    config: LowRankConfig,
    *,
    arch: int,
) -> tuple[Call, list[Tensor | None]]:
    """dx = the sum over adapters of drop(dyb A) where dx is given, and partial sums [row chunks, R, K] of the
    dA that are wanted."""
    (m, k), tile, dx_tile = (dybs[0].shape[1], lows[0].a.shape[1]), config.x, config.epilogue
    chunks, wide = ceil_div(m, config.x_rows), (x if any(need_a) else dx)
    first = len(lows) * chunks * ceil_div(k, tile.cols) if any(need_a) else 0
    others = 0 if dx is None else ceil_div(m, dx_tile.rows) * ceil_div(k, dx_tile.cols)
    dtype = lows[0].a.dtype if chunks == 1 else torch.float32
    d_lora_a = [
        torch.empty((chunks, *low.a.shape), dtype=dtype, device=low.a.device) if a else None
        for low, a in zip(lows, need_a, strict=True)
    ]
    arguments = {
        "x_ptr": x if any(need_a) else None,
        "dybs": tuple(dybs),
        "adapters": tuple(low.a for low in lows),
    }
    arguments |= {
        "d_lora_as": tuple(d_lora_a),
        "dx_ptr": dx,
        "seeds": tuple(low.seed for low in lows),
        "first_programs": first,
    }
    arguments |= {
        "thresholds": tuple(dropout_threshold(low.dropout_p, low.seed) for low in lows),
        "M": m,
        "K": k,
        "chunk_rows": config.x_rows,
    }
    arguments |= {
        "ADAPTERS": len(lows),
        **_ranks(lows),
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.cols,
        "DX_BLOCK_M": dx_tile.rows,
    }
    arguments |= {
        "DX_BLOCK_K": dx_tile.cols,
        "BLOCK_R": min(config.ranks, arguments["R_PAD"]),
        "MODE": dot_mode_of(wide, lows[0].a, arch),
    }
    call = call_of(_group_x_kernel, first + others, arguments, tile if any(need_a) else dx_tile, arch)
    # On sm_80 ptxas keeps to 128 registers and spills 24 bytes of them (counted in the cubins): the limit is
    # the block's share of an SM's.
    return replace(
        call, max_registers=call.max_registers or min(255, 65536 // (32 * call.num_warps))
    ), d_lora_a


def reduce_call(sums: Sequence[tuple[Tensor | None, torch.dtype]]) -> tuple[Call | None, list[Tensor | None]]:
    """(partials [chunks, ...], dtype of the sum) -> at most one launch, and the sums; what has one chunk is
    taken as it is."""
    outs = [
        None
        if part is None
        else part[0].to(dtype)
        if part.shape[0] == 1
        else part.new_empty(part.shape[1:], dtype=dtype)
        for part, dtype in sums
    ]
    split = [
        (part, out)
        for (part, _), out in zip(sums, outs, strict=True)
        if part is not None and part.shape[0] > 1
    ]
    if not split:
        return None, outs
    arguments = {"partials": tuple(part for part, _ in split), "outs": tuple(out for _, out in split)}
    arguments |= {
        "chunks": tuple(part.shape[0] for part, _ in split),
        "numels": tuple(out.numel() for _, out in split),
    }
    arguments |= {"SUMS": len(split), "BLOCK": REDUCE_BLOCK, "BLOCK_CHUNKS": REDUCE_CHUNKS}
    programs = sum(ceil_div(out.numel(), REDUCE_BLOCK) for _, out in split)
    return Call(_group_reduce_kernel, programs, arguments, num_warps=4, num_stages=1), outs


def specializations(arch: int) -> Iterable[Specialization]:
    """q, k and v of an 8B Llama at M = 8192 with dropout and biases: 16-bit activations and adapters, fp32
    adapters, all fp32, rank 64."""
    half = torch.bfloat16 if arch >= 80 else torch.float16
    for x_dtype, dtype, r in (
        (half, half, 16),
        (half, torch.float32, 16),
        (torch.float32, torch.float32, 16),
        (half, half, 64),
    ):
        yield from _variants(arch, x_dtype, dtype, r)


def _variants(arch: int, x_dtype: torch.dtype, dtype: torch.dtype, r: int) -> Iterable[Specialization]:
    m, k, ns = 8192, 4096, (4096, 1024, 1024)
    new = lambda *shape, d=x_dtype: torch.empty(shape, dtype=d, device="meta")  # noqa: E731
    seed, x, ys = new(1, d=torch.int64), new(m, k), [new(m, n) for n in ns]
    lows = [Low(new(r, k, d=dtype), new(n, r, d=dtype), 0.7, 0.1, seed) for n in ns]
    codes, absmax = new(16, d=torch.float32), new(1, d=torch.uint8)
    quant = (codes, None, absmax, codes, codes, codes, 64, 256)
    weights = [(new(n * k // 2, d=torch.uint8), quant, new(n, k)) for n in ns]
    mode = dot_mode_of(x, lows[0].a, arch)
    config = choose_low_rank(m, sum(ns), k, r, mode=mode, arch=arch)
    title = f"{str(x_dtype)[6:]}-{mode}-r{r}"
    # As of the single linear's passes: no tensor cores on sm_75, none for fp32 operands of the decoding
    # launches there.
    low_mma = {"expects_mma": arch >= 80}
    decodes = {"wide_loads": ("packed_ptr",), "unfused": ("absmax_value",)}
    call, xas = xa_call(x, lows, weights, config, arch=arch)
    yield specialization(f"xa-{title}", call, **low_mma, **decodes)
    yield specialization(f"decode-{title}", xa_call(x, [], weights, config, arch=arch)[0], **decodes)
    members = [DyMember(dy, low, xa, True, True, True) for dy, low, xa in zip(ys, lows, xas, strict=True)]
    call, parts = dy_call(members, weights, k, config, arch=arch)
    yield specialization(f"dy-{title}", call, **low_mma, **decodes)
    yield specialization(
        f"y-{title}", y_call(ys, xas, lows, [new(n) for n in ns], config, arch=arch), **low_mma
    )
    dybs = [part.dyb for part in parts]
    call, d_lora_a = x_call(x, new(m, k), lows, dybs, [True] * 3, config, arch=arch)
    yield specialization(f"x-dx-{title}", call, **low_mma)
    yield specialization(
        f"x-{title}", x_call(x, None, lows, dybs, [True] * 3, config, arch=arch)[0], **low_mma
    )
    sums = (
        [(part, dtype) for part in d_lora_a]
        + [(part.d_lora_b, dtype) for part in parts]
        + [(part.d_bias, torch.float32) for part in parts]
    )
    yield specialization(f"sums-{title}", reduce_call(sums)[0])
