"""The low-rank passes' kernels: over x (xa; dA beside dx), dy and y, for the members of a group side by side.
A single linear is the group of one, whose kernel asks for no range of program ids.

A launch's programs are shared out between members by ranges of ids; where members read the same rows of x
their programs are neighbours in time, so that x comes from memory once and from L2 for the others. What a
member brings is one named tuple; members are unrolled by the compiler: a group is never large. A pass may
hold the decoding of weights behind its own programs (`low_rank_calls.beside_decoding`): both are bound by
memory and neither fills a device on its own, and the pass's programs take longest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.launch import UNSPECIALIZED
from ...dequantize.triton import decode_rectangles
from .triton_low_rank_bodies import (
    d_lora_a_body,
    dy_pair_body,
    dy_pass_body,
    epilogue_body,
    project_body,
    reduce_body,
)

__all__ = [
    "DyOperands",
    "Projection",
    "Sum",
    "XOperands",
    "YOperands",
    "dy_kernel",
    "project_kernel",
    "reduce_kernel",
    "x_kernel",
    "y_kernel",
]


class Projection(NamedTuple):
    """out fp32 [splits, M, R] = scale * drop(x) adapter; seed int64 [1], or None: no dropout."""

    adapter: Any
    out: Any
    seed: Any


class DyOperands(NamedTuple):
    """What one dy gives. None of the last three: not wanted; xa is there where d_lora_b is, adapter where dyb
    is."""

    dy: Any  # [M, columns]
    columns: Any
    xa: Any  # fp32 [M, R]
    adapter: Any  # lora_b [columns, R]
    scaling: Any
    dyb: Any  # fp32 [column chunks, M, R]
    d_lora_b: Any  # [row chunks, columns, R]
    d_bias: Any  # fp32 [row chunks, columns]


class XOperands(NamedTuple):
    """An adapter's part of dx and its dA, or None where that is not wanted."""

    left: Any  # dyb fp32 [CHUNKS, M, R]
    adapter: Any  # lora_a [R, K]
    d_lora_a: Any  # [row chunks, R, K]
    seed: Any


class YOperands(NamedTuple):
    """y += scaling * left adapter^T + bias; without adapter, bias alone."""

    out: Any  # [M, columns]
    columns: Any
    stride: Any  # from a row of `out` to the next
    left: Any  # xa fp32 [M, R]
    adapter: Any  # lora_b [columns, R]
    scaling: Any
    bias: Any
    seed: Any  # None: y's part is not dropped


class Sum(NamedTuple):
    """out [numel] = the sum of partials fp32 [chunks, numel]."""

    partials: Any
    out: Any
    numel: Any
    odd_chunks: Any  # 2 chunks + 1: their number, which M sets, makes no variant of its own


@triton.jit(do_not_specialize=UNSPECIALIZED)
def project_kernel(
    x_ptr,
    lows,  # `Projection`s
    thresholds,
    scale,
    M,
    C,
    split_cols,
    first_programs,  # those in front of the decoding's
    rectangles,  # to be decoded, or None
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    BY_RANK: tl.constexpr,
    FORMAT: tl.constexpr,  # of the rectangles, or None
):
    """xa of every adapter, or dyb of one. Neighbouring programs take the same rows of x."""
    pid = tl.program_id(0)
    if FORMAT is None:
        _project(pid, x_ptr, lows, thresholds, scale, M, C, split_cols, TILE, RANKS, BY_RANK)
    else:
        if pid < first_programs:
            _project(pid, x_ptr, lows, thresholds, scale, M, C, split_cols, TILE, RANKS, BY_RANK)
        else:
            decode_rectangles(pid - first_programs, rectangles, FORMAT)


@triton.jit
def _project(
    pid,
    x_ptr,
    lows,
    thresholds,
    scale,
    M,
    C,
    split_cols,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    BY_RANK: tl.constexpr,
):
    COUNT: tl.constexpr = len(RANKS.each)
    for j in tl.static_range(COUNT):
        args = (x_ptr, lows[j].adapter, lows[j].out, lows[j].seed, thresholds[j], scale, M, C, split_cols)
        if COUNT == 1:
            project_body(pid, *args, RANKS.each[j], TILE, RANKS, BY_RANK)
        else:
            if pid % COUNT == j:
                project_body(pid // COUNT, *args, RANKS.each[j], TILE, RANKS, BY_RANK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dy_kernel(
    members,  # `DyOperands`
    M,
    chunk_rows,
    first_programs,
    rectangles,
    TILE: tl.constexpr,
    DYB_TILE: tl.constexpr,  # of dyb's own programs beside dB's; None: one read of dy gives both
    RANKS: tl.constexpr,
    FORMAT: tl.constexpr,  # of the rectangles, or None
):
    """dyb, dB and d_bias of every member."""
    pid = tl.program_id(0)
    if FORMAT is None:
        _dy(pid, members, M, chunk_rows, TILE, DYB_TILE, RANKS)
    else:
        if pid < first_programs:
            _dy(pid, members, M, chunk_rows, TILE, DYB_TILE, RANKS)
        else:
            decode_rectangles(pid - first_programs, rectangles, FORMAT)


@triton.jit
def _dy(
    pid,
    members,
    M,
    chunk_rows,
    TILE: tl.constexpr,
    DYB_TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    COUNT: tl.constexpr = len(RANKS.each)
    if COUNT == 1:
        _dy_member(pid, members[0], M, chunk_rows, RANKS.each[0], TILE, DYB_TILE, RANKS)
    else:
        first, chunks = 0, tl.cdiv(M, chunk_rows)
        for i in tl.static_range(COUNT):
            programs = chunks * tl.cdiv(members[i].columns, TILE.cols)
            if DYB_TILE is not None and members[i].dyb is not None:
                programs += chunks * (chunk_rows // DYB_TILE.rows)
            if (pid >= first) & (pid < first + programs):
                _dy_member(pid - first, members[i], M, chunk_rows, RANKS.each[i], TILE, DYB_TILE, RANKS)
            first += programs


@triton.jit
def _dy_member(
    pid,
    member,
    M,
    chunk_rows,
    R: tl.constexpr,
    TILE: tl.constexpr,
    DYB_TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    if DYB_TILE is not None and member.dyb is not None:
        dy_pair_body(pid, member, M, chunk_rows, R, TILE, DYB_TILE, RANKS)
    else:
        dy_pass_body(pid, member, member.dyb, M, chunk_rows, R, TILE, RANKS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def x_kernel(
    x_ptr,  # None: no dA
    dx_ptr,  # None: no dx
    lows,  # `XOperands`
    thresholds,
    first_programs,
    M,
    K,
    chunk_rows,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    DX_TILE: tl.constexpr,
    RANKS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The first programs do dA, neighbours the same tiles of x for one adapter each; the others dx (+)= the
    sum over adapters of drop(dyb A)."""
    COUNT: tl.constexpr = len(RANKS.each)
    pid = tl.program_id(0)
    if x_ptr is not None and pid < first_programs:
        for j in tl.static_range(COUNT):
            args = (x_ptr, lows[j], thresholds[j], M, K, chunk_rows)
            if lows[j].d_lora_a is not None:
                if COUNT == 1:
                    d_lora_a_body(pid, *args, CHUNKS, RANKS.each[j], TILE, RANKS)
                else:
                    if pid % COUNT == j:
                        d_lora_a_body(pid // COUNT, *args, CHUNKS, RANKS.each[j], TILE, RANKS)
    if dx_ptr is not None and pid >= first_programs:
        args = (dx_ptr, K, lows, thresholds, 1.0, None, M, K)
        epilogue_body(pid - first_programs, *args, 0, CHUNKS, DX_TILE, RANKS, True, ACCUMULATE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def y_kernel(
    members,  # `YOperands`
    M,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """y (+)= s xa B^T + bias of every member."""
    COUNT: tl.constexpr = len(RANKS.each)
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(COUNT):
        m = members[i]
        args = (m.out, m.stride, (m,), (0,), m.scaling, m.bias, M, m.columns)
        if COUNT == 1:
            epilogue_body(pid, *args, i, 1, TILE, RANKS, False, ACCUMULATE)
        else:
            programs = tl.cdiv(M, TILE.rows) * tl.cdiv(m.columns, TILE.cols)
            if (pid >= first) & (pid < first + programs):
                epilogue_body(pid - first, *args, i, 1, TILE, RANKS, False, ACCUMULATE)
            first += programs


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reduce_kernel(sums, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """`Sum`s side by side."""
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(sums)):
        args = (sums[i].partials, sums[i].out, sums[i].odd_chunks // 2, sums[i].numel)
        if len(sums) == 1:
            reduce_body(pid, *args, BLOCK, BLOCK_CHUNKS)
        else:
            programs = tl.cdiv(sums[i].numel, BLOCK)
            if (pid >= first) & (pid < first + programs):
                reduce_body(pid - first, *args, BLOCK, BLOCK_CHUNKS)
            first += programs
