"""The own products' kernels: the base product with everything that belongs to it, y = x W^T + s xa B^T +
bias, or dx = dy W + mask * (dyb A).

W is 4-bit, decoded in the product, or a dense slab. Both directions are out [M, J] = x [M, C] times a weight
tile: forward J = N, C = K, and the tile is used transposed; dx J = K, C = N, and it is used as stored. The
low-rank product comes first: it starts the accumulator, so that dropout's mask needs no second one. Where
tiles are few the contraction is split over programs, whose fp32 partial sums a second launch adds in a fixed
order.

The members of a group that read one x are the outputs of one launch, a single linear the group of one. dx of
several members is one output over all their contractions, rounded once, a kernel of its own: its accumulator
starts with the low-rank parts that an earlier launch wrote, since a mask an adapter would take a second
accumulator, which spills on sm_86 and sm_90.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.launch import UNSPECIALIZED
from ...triton_numerics import to_fp32
from .triton_matmul_bodies import contract, finish, matmul_tile, place_of, reduce_tile

__all__ = [
    "DxTerm",
    "ProductOperands",
    "dx_sum_kernel",
    "matmul_kernel",
    "matmul_reduce_kernel",
]


class ProductOperands(NamedTuple):
    """One output: [M, columns] of x's dtype. low fp32 [chunks, M, R]: xa or dyb, to be summed over the
    chunks, or None; adapter: lora_b [columns, R] forward, else lora_a [R, columns]."""

    weight: Any  # `Packed`, or dense [N, K] of x's dtype
    weight_stride: Any  # of a dense one: elements from a row to the next
    bias: Any  # [columns], or None
    low: Any
    adapter: Any
    adapter_stride: Any
    scaling: Any
    seed: Any  # int64 [1], or None: no dropout
    first_col: Any  # of out within dx, for the mask
    out: Any
    out_stride: Any
    columns: Any


class DxTerm(NamedTuple):
    """dy [M, columns] times a dense weight [columns, K], contiguous both."""

    dy: Any
    weight: Any
    columns: Any


@triton.jit(do_not_specialize=UNSPECIALIZED)
def matmul_kernel(
    x_ptr,
    x_stride,
    members,  # `ProductOperands`
    thresholds,
    M,
    C,
    split_steps,
    FACTORS: tl.constexpr,
    FORM: tl.constexpr,
    TILES: tl.constexpr,
):
    """Every member's output, their tiles one after the other."""
    COUNT: tl.constexpr = len(FACTORS.each)
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(COUNT):
        args = (x_ptr, x_stride, members[i], thresholds[i], M, C, split_steps)
        if COUNT == 1:
            matmul_tile(pid, *args, FACTORS.each[i], FACTORS, FORM, TILES)
        else:
            programs = tl.cdiv(M, TILES.block_m) * tl.cdiv(members[i].columns, TILES.block_n)
            if (pid >= first) & (pid < first + programs):
                matmul_tile(pid - first, *args, FACTORS.each[i], FACTORS, FORM, TILES)
            first += programs


@triton.jit(do_not_specialize=UNSPECIALIZED)
def matmul_reduce_kernel(
    partials_ptr,
    member,  # `ProductOperands`
    threshold,
    M,
    FACTORS: tl.constexpr,
    FORWARD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    args = (partials_ptr, member, threshold, M)
    reduce_tile(tl.program_id(0), *args, FACTORS.each[0], FACTORS, FORWARD, SPLIT_K, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dx_sum_kernel(
    terms,  # `DxTerm`s
    dx_ptr,  # [M, K]
    M,
    K,
    FORM: tl.constexpr,
    TILES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """dx (+)= the sum over members of dy W."""
    BLOCK_M: tl.constexpr = TILES.block_m
    BLOCK_N: tl.constexpr = TILES.block_n
    row0, col0 = place_of(tl.program_id(0), M, K, TILES)
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ACCUMULATE:
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        acc += to_fp32(tl.load(dx_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=mask, other=0.0))
    for i in tl.static_range(len(terms)):
        n = terms[i].columns
        acc = contract(acc, terms[i].dy, n, terms[i].weight, K, row0, col0, M, K, n, 0, n, FORM, TILES)
    finish(acc, None, dx_ptr, K, row0, col0, M, K, BLOCK_M, BLOCK_N)
