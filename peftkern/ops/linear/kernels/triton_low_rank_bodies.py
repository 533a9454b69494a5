"""The low-rank passes' kernels as device functions that take their program id, so that a launch can hold two
of them side by side.

TILE, DYB_TILE (`Tile`) and RANKS (`Ranks`) are frozen dataclasses of `low_rank_config.py`. What is a
string, stands in a list (a shape) or goes to tl.static_range is read into a local constexpr: Triton 3.6 and
3.7 take no attribute there.

Operands of a product are a wide tile (x or dy, in the activations' dtype) and a narrow one (adapters, xa,
dyb). MODE, or RANKS.mode, says how they meet:
    "native"  both in the wide tile's 16-bit dtype: the narrow one is rounded to it in registers, as plain
    PyTorch rounds it in memory; "split"   wide bf16, narrow fp32 as a sum of three bf16 terms, 24 bits: exact
    products on 16-bit tensor cores, no fp32 tile; otherwise both in fp32, MODE being tl.dot's
    input_precision.
Sums are fp32; those of "split" and of fp32 operands are rounded once a tile, see `dot_fresh`. RANKS.padded is
R rounded up to a power of two of at least 16; what is padded is loaded as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_numerics import dot, dot_fresh, round_to, to_fp32
from ...triton_philox import dropout_keep, dropout_key, keep_factor

__all__ = [
    "d_lora_a_body",
    "dy_pair_body",
    "dy_pass_body",
    "epilogue_body",
    "project_body",
    "reduce_body",
]


@triton.jit
def _terms(narrow, wide, MODE: tl.constexpr):
    """The narrow operand, prepared for products with tiles like `wide`."""
    narrow = to_fp32(narrow)
    if MODE == "native":
        return (round_to(narrow, wide.dtype),)
    elif MODE == "split":
        high = round_to(narrow, tl.bfloat16)
        rest = narrow - to_fp32(high)
        middle = round_to(rest, tl.bfloat16)
        return high, middle, round_to(rest - to_fp32(middle), tl.bfloat16)
    else:
        return (narrow,)


@triton.jit
def _dot_right(wide, terms, acc, MODE: tl.constexpr):
    """acc + wide @ narrow, smallest terms first."""
    if MODE == "native":
        return dot(wide, terms[0], acc)
    elif MODE == "split":
        tile = dot(wide, terms[2], tl.zeros_like(acc))
        tile = dot(wide, terms[1], tile)
        return acc + dot(wide, terms[0], tile)
    else:
        return dot_fresh(to_fp32(wide), terms[0], acc, MODE)


@triton.jit
def _dot_left(terms, wide, acc, MODE: tl.constexpr):
    """acc + narrow @ wide, smallest terms first."""
    if MODE == "native":
        return dot(terms[0], wide, acc)
    elif MODE == "split":
        tile = dot(terms[2], wide, tl.zeros_like(acc))
        tile = dot(terms[1], wide, tile)
        return acc + dot(terms[0], wide, tile)
    else:
        return dot_fresh(terms[0], to_fp32(wide), acc, MODE)


@triton.jit
def dot_narrow(left, right, acc, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """acc + left @ right of two narrow operands; DTYPE is the activations'."""
    if MODE == "native":
        return dot(round_to(to_fp32(left), DTYPE), round_to(to_fp32(right), DTYPE), acc)
    else:
        PRECISION: tl.constexpr = "tf32x3" if MODE == "split" else MODE
        return dot_fresh(to_fp32(left), to_fp32(right), acc, PRECISION)


@triton.jit
def adapter_tile(adapter_ptr, cols, ranks, C, R: tl.constexpr, BY_RANK: tl.constexpr):
    """[cols, ranks] of an adapter: lora_a [R, C] where BY_RANK, else lora_b [C, R]."""
    mask = (cols < C)[:, None] & (ranks < R)[None, :]
    if BY_RANK:
        return tl.load(adapter_ptr + ranks.to(tl.int64)[None, :] * C + cols[:, None], mask=mask, other=0.0)
    else:
        return tl.load(adapter_ptr + cols.to(tl.int64)[:, None] * R + ranks[None, :], mask=mask, other=0.0)


@triton.jit
def sum_of_chunks(partials_ptr, rows, ranks, M, CHUNKS: tl.constexpr, R: tl.constexpr):
    """fp32 [rows, ranks] of [CHUNKS, M, R], summed in order. Unrolled: Triton pipelines only loops that hold
    no other."""
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    total = tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    for chunk in tl.static_range(1, CHUNKS):
        total += tl.load(partials_ptr + tl.cast(M, tl.int64) * (chunk * R) + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def project_body(
    pid,
    x_ptr,  # [M, C]: x, or dy
    adapter_ptr,  # BY_RANK: lora_a [R, C]; else lora_b [C, R]
    out_ptr,  # fp32 [splits, M, R]
    seed_ptr,  # int64 [1], or None: no dropout
    threshold,
    scale,  # of the result: 1 for xa, s for dyb
    M,
    C,
    split_cols,  # columns that one program contracts, a multiple of TILE.cols
    R: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    BY_RANK: tl.constexpr,
):
    """out = scale * drop(x) @ adapter, one program a block of rows and a split of the contraction: x is read
    once."""
    BLOCK_M: tl.constexpr = TILE.rows
    MODE: tl.constexpr = RANKS.mode
    BLOCK_C: tl.constexpr = TILE.cols
    R_PAD: tl.constexpr = RANKS.padded
    row_blocks = tl.cdiv(M, BLOCK_M)
    row0, split = (pid % row_blocks) * BLOCK_M, pid // row_blocks
    rows, ranks = row0 + tl.arange(0, BLOCK_M), tl.arange(0, R_PAD)
    row_ptr = x_ptr + rows.to(tl.int64)[:, None] * C
    if seed_ptr is not None:
        key_low, key_high = dropout_key(seed_ptr)
        scale = scale * keep_factor(threshold)
    acc = tl.zeros([BLOCK_M, R_PAD], tl.float32)
    for col0 in range(split * split_cols, tl.minimum(C, (split + 1) * split_cols), BLOCK_C):
        cols = col0 + tl.arange(0, BLOCK_C)
        x = tl.load(
            row_ptr + cols[None, :], mask=(rows < M)[:, None] & (cols < C)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_C]
        adapter = adapter_tile(adapter_ptr, cols, ranks, C, R, BY_RANK)  # [BLOCK_C, R_PAD]
        if seed_ptr is not None:
            x = tl.where(dropout_keep(key_low, key_high, threshold, row0, col0, BLOCK_M, BLOCK_C), x, 0.0)
        acc = _dot_right(x, _terms(adapter, x, MODE), acc, MODE)
    out = out_ptr + (tl.cast(split, tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(out, acc * scale, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def dy_pass_body(
    pid,
    member,  # `DyOperands`
    dyb_ptr,  # fp32 [column chunks, M, R], or None
    M,
    chunk_rows,  # rows that one program walks, a multiple of TILE.rows
    R: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A program owns chunk_rows x TILE.cols of dy, read once: its share of dyb, and what it adds to dB and
    d_bias, held in registers.

    Beside dy's bytes (2 an element) the partial sums, written and read, move 8 R / (2 TILE.cols) for dyb and
    8 R / (2 chunk_rows) for dB: with R = 16 and 512 of each, an eighth of dy each, where a second pass over
    dy would move all of it.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    MODE: tl.constexpr = RANKS.mode
    BLOCK_N: tl.constexpr = TILE.cols
    R_PAD: tl.constexpr = RANKS.padded
    dy_ptr, N = member.dy, member.columns
    column_chunks = tl.cdiv(N, BLOCK_N)
    column_chunk, row_chunk = pid % column_chunks, pid // column_chunks
    cols, ranks = column_chunk * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R_PAD)
    adapter_mask = (cols < N)[:, None] & (ranks < R)[None, :]
    if dyb_ptr is not None:
        adapter = member.adapter + cols.to(tl.int64)[:, None] * R + ranks[None, :]
        lora_b = tl.load(adapter, mask=adapter_mask, other=0.0)
        # [BLOCK_N, R_PAD] each
        b_terms = _terms(lora_b, tl.zeros([1], dy_ptr.dtype.element_ty), MODE)
    d_lora_b = tl.zeros([BLOCK_N, R_PAD], tl.float32)
    d_bias = tl.zeros([BLOCK_N], tl.float32)
    first = row_chunk * chunk_rows
    for row0 in range(first, tl.minimum(M, first + chunk_rows), BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask)  # [BLOCK_M, BLOCK_N]
        # Masked here and not by the load: of a tile that is only multiplied, also transposed, Triton does not
        # pipeline the load.
        dy = tl.where(mask, dy, 0.0)
        rank_mask = (rows < M)[:, None] & (ranks < R)[None, :]
        if member.d_lora_b is not None:
            xa = tl.load(
                member.xa + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=rank_mask, other=0.0
            )  # [BLOCK_M, R_PAD]
            d_lora_b = _dot_right(tl.trans(dy), _terms(xa, dy, MODE), d_lora_b, MODE)
        if dyb_ptr is not None:
            dyb = _dot_right(dy, b_terms, tl.zeros([BLOCK_M, R_PAD], tl.float32), MODE) * member.scaling
            out = dyb_ptr + (tl.cast(column_chunk, tl.int64) * M + rows)[:, None] * R + ranks[None, :]
            tl.store(out, dyb, mask=rank_mask)
        if member.d_bias is not None:
            d_bias += tl.sum(to_fp32(dy), axis=0)
    row_of_out = tl.cast(row_chunk, tl.int64) * N + cols
    if member.d_lora_b is not None:
        out = member.d_lora_b + row_of_out[:, None] * R + ranks[None, :]
        d_lora_b = round_to(d_lora_b * member.scaling, member.d_lora_b.dtype.element_ty)
        tl.store(out, d_lora_b, mask=adapter_mask)
    if member.d_bias is not None:
        tl.store(member.d_bias + row_of_out, d_bias, mask=cols < N)


@triton.jit
def dy_pair_body(
    pid,
    member,  # `DyOperands`, with one chunk of dyb
    M,
    chunk_rows,
    R: tl.constexpr,
    TILE: tl.constexpr,
    DYB_TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Per chunk of rows first its programs for dyb, then those for dB and d_bias: neighbours in time read the
    same rows."""
    N = member.columns
    row_programs = chunk_rows // DYB_TILE.rows
    per_chunk = row_programs + tl.cdiv(N, TILE.cols)
    chunk, inner = pid // per_chunk, pid % per_chunk
    if inner < row_programs:
        block = chunk * row_programs + inner
        if block * DYB_TILE.rows < M:
            args = (member.dy, member.adapter, member.dyb, None, 0, member.scaling, M, N, N)
            project_body(block, *args, R, DYB_TILE, RANKS, False)
    else:
        column = chunk * tl.cdiv(N, TILE.cols) + inner - row_programs
        dy_pass_body(column, member, None, M, chunk_rows, R, TILE, RANKS)


@triton.jit
def d_lora_a_body(
    pid,
    x_ptr,  # [M, K]
    low,  # `XOperands`
    threshold,
    M,
    K,
    chunk_rows,  # rows that one program walks, a multiple of TILE.rows
    CHUNKS: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A program owns chunk_rows x TILE.cols of x, read once, and holds what it adds to dA = dyb^T drop(x) in
    registers."""
    BLOCK_M: tl.constexpr = TILE.rows
    MODE: tl.constexpr = RANKS.mode
    BLOCK_K: tl.constexpr = TILE.cols
    R_PAD: tl.constexpr = RANKS.padded
    column_chunks = tl.cdiv(K, BLOCK_K)
    column_chunk, row_chunk = pid % column_chunks, pid // column_chunks
    col0, first = column_chunk * BLOCK_K, row_chunk * chunk_rows
    cols, ranks = col0 + tl.arange(0, BLOCK_K), tl.arange(0, R_PAD)
    factor = 1.0
    if low.seed is not None:
        key_low, key_high = dropout_key(low.seed)
        factor = keep_factor(threshold)
    d_lora_a = tl.zeros([R_PAD, BLOCK_K], tl.float32)
    for row0 in range(first, tl.minimum(M, first + chunk_rows), BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=mask, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        if low.seed is not None:
            x = tl.where(dropout_keep(key_low, key_high, threshold, row0, col0, BLOCK_M, BLOCK_K), x, 0.0)
        dyb = sum_of_chunks(low.left, rows, ranks, M, CHUNKS, R)  # [BLOCK_M, R_PAD]
        d_lora_a = _dot_left(_terms(tl.trans(dyb), x, MODE), x, d_lora_a, MODE)
    out = low.d_lora_a + (tl.cast(row_chunk, tl.int64) * R + ranks)[:, None] * K + cols[None, :]
    d_lora_a = round_to(d_lora_a * factor, low.d_lora_a.dtype.element_ty)
    tl.store(out, d_lora_a, mask=(ranks < R)[:, None] & (cols < K)[None, :])


@triton.jit
def epilogue_body(
    pid,
    out_ptr,  # [M, C], rows out_stride apart: y or dx; without ACCUMULATE it is written, not added to
    out_stride,
    lows,  # `XOperands` where BY_RANK, else one `YOperands`: left fp32 [CHUNKS, M, R], adapter or None, seed
    thresholds,
    scale,
    bias_ptr,  # [C], or None
    M,
    C,
    FIRST: tl.constexpr,  # the first one's place among RANKS.each
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    BY_RANK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """out += the sum of drop(scale * left @ adapter) + bias, a tile a program, written once. The adapters are
    lora_a [R, C] where BY_RANK, else lora_b [C, R]."""
    BLOCK_M: tl.constexpr = TILE.rows
    MODE: tl.constexpr = RANKS.mode
    BLOCK_C: tl.constexpr = TILE.cols
    COUNT: tl.constexpr = len(RANKS.each) if BY_RANK else 1
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    column_blocks = tl.cdiv(C, BLOCK_C)
    row0, col0 = (pid // column_blocks) * BLOCK_M, (pid % column_blocks) * BLOCK_C
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_C)
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if ACCUMULATE:
        mask = (rows < M)[:, None] & (cols < C)[None, :]
        out_tile = out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
        out = to_fp32(tl.load(out_tile, mask=mask, other=0.0))
    for j in tl.static_range(COUNT):
        if lows[j].adapter is not None:
            acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for rank0 in range(0, RANKS.padded, RANKS.step):
                ranks = rank0 + tl.arange(0, RANKS.step)
                # [BLOCK_M, step] and [BLOCK_C, step]
                left = sum_of_chunks(lows[j].left, rows, ranks, M, CHUNKS, RANKS.each[FIRST + j])
                adapter = adapter_tile(lows[j].adapter, cols, ranks, C, RANKS.each[FIRST + j], BY_RANK)
                acc = dot_narrow(left, tl.trans(adapter), acc, DTYPE, MODE)
            if lows[j].seed is not None:
                key_low, key_high = dropout_key(lows[j].seed)
                keep = dropout_keep(key_low, key_high, thresholds[j], row0, col0, BLOCK_M, BLOCK_C)
                acc = tl.where(keep, acc * keep_factor(thresholds[j]), 0.0)
            out += acc * scale
    if bias_ptr is not None:
        out += to_fp32(tl.load(bias_ptr + cols, mask=cols < C, other=0.0))[None, :]
    # Formed here, where they are used: before the loop they would hold registers in it.
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    out_tile = out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(out_tile, round_to(out, DTYPE), mask=mask)


@triton.jit
def reduce_body(pid, partials_ptr, out_ptr, chunks, numel, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """out [numel] = the sum of partials fp32 [chunks, numel] over the chunks, BLOCK_CHUNKS at a time, always
    in the same order."""
    index = tl.cast(pid, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & (index < numel)[None, :]
        partials = tl.load(
            partials_ptr + chunk.to(tl.int64)[:, None] * numel + index[None, :], mask=mask, other=0.0
        )
        total += tl.sum(partials, axis=0)  # [BLOCK_CHUNKS, BLOCK] -> [BLOCK]
    tl.store(out_ptr + index, round_to(total, out_ptr.dtype.element_ty), mask=index < numel)
