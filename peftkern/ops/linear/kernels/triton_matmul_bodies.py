"""The own products' device functions, which take their program id; `triton_matmul.py` says what they compute.
FORM, FACTORS and TILES are those of `matmul_config.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_nf4 import absmax_of, absmax_parts, absmax_value, decode, decode_words, load_codes
from ...triton_numerics import dot, dot_fresh, round_to, to_fp32
from ...triton_philox import dropout_scale_tile

__all__ = ["contract", "finish", "matmul_tile", "place_of", "reduce_tile"]


@triton.jit
def _low_rank(
    acc,
    m,  # `ProductOperands`
    rows,
    cols,
    M,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTORS: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] + scaling * low [M, R] @ adapter, lora_b [J, R] where FORWARD, else lora_a [R,
    J]."""
    CHUNKS: tl.constexpr = FACTORS.chunks
    MODE: tl.constexpr = FACTORS.mode
    for rank0 in tl.range(0, R, FACTORS.step, num_stages=1):
        ranks = rank0 + tl.arange(0, FACTORS.step)
        offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        mask = (rows < M)[:, None] & (ranks < R)[None, :]
        low = tl.load(m.low + offsets, mask=mask, other=0.0)  # [BLOCK_M, step]
        for chunk in tl.static_range(1, CHUNKS):
            low += tl.load(m.low + tl.cast(M, tl.int64) * (chunk * R) + offsets, mask=mask, other=0.0)
        low = low * m.scaling
        if FORWARD:
            adapter_ptrs = m.adapter + cols.to(tl.int64)[None, :] * m.adapter_stride + ranks[:, None]
        else:
            adapter_ptrs = m.adapter + ranks.to(tl.int64)[:, None] * m.adapter_stride + cols[None, :]
        adapter = tl.load(
            adapter_ptrs, mask=(ranks < R)[:, None] & (cols < m.columns)[None, :], other=0.0
        )  # [step, BLOCK_N]
        if MODE == "split":
            if tl.float16 == DTYPE:
                low = tl.minimum(
                    tl.maximum(low, -65504.0), 65504.0
                )  # an infinite high term would make the low one NaN
            high = round_to(low, DTYPE)
            acc = dot(round_to(low - to_fp32(high), DTYPE), adapter, acc)
            acc = dot(high, adapter, acc)
        else:
            acc = dot_fresh(low, to_fp32(adapter), acc, MODE)
    return acc


@triton.jit
def _start(
    acc,
    m,
    threshold,
    row0,
    col0,
    M,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTORS: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The low-rank product on top of zeros, masked where dx has dropout."""
    if R > 0:
        rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        acc = _low_rank(acc, m, rows, cols, M, R, DTYPE, FACTORS, FORWARD)
        if m.seed is not None:
            acc = acc * dropout_scale_tile(m.seed, threshold, row0, m.first_col + col0, BLOCK_M, BLOCK_N)
    return acc


@triton.jit
def finish(
    acc, bias_ptr, out_ptr, out_stride, row0, col0, M, J, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """acc [BLOCK_M, BLOCK_N] + bias -> out."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += to_fp32(tl.load(bias_ptr + cols, mask=cols < J, other=0.0))[None, :]
    mask = (rows < M)[:, None] & (cols < J)[None, :]
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :],
        round_to(acc, out_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _weight_absmax(
    row0,
    col0,
    N,
    K,
    weight,  # `Packed`
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`absmax_parts` [ROWS, COLS / (8 words)] of a tile's groups; past the weight's edges those of its last
    row or group."""
    WIDTH: tl.constexpr = 8 * FORM.words
    row = tl.minimum(row0 + tl.arange(0, ROWS), N - 1)
    group = tl.minimum(col0 // WIDTH + tl.arange(0, COLS // WIDTH), K // WIDTH - 1)
    block = (row[:, None] * (K // WIDTH) + group[None, :]) // (FORM.blocksize // WIDTH)
    return absmax_parts(block, None, weight, FORM.nested_blocksize)


@triton.jit
def _weight_tile(
    row0,
    col0,
    N,
    K,
    weight,  # `Packed`, or the first of dense [N, K]
    weight_stride,
    codes,
    absmax,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """DTYPE [ROWS, COLS] of W; past its edges any finite values, against which the caller's x is zero or
    whose results it drops.

    INSIDE: the axis, 0 or 1, along which the tile has no part past the edge; -1: neither.
    """
    rows = row0 + tl.arange(0, ROWS)
    rows = rows if INSIDE == 0 else tl.minimum(rows, N - 1)
    if FORM.words > 0:
        WORDS: tl.constexpr = FORM.words
        WIDTH: tl.constexpr = 8 * FORM.words
        METHOD: tl.constexpr = FORM.method
        # Loaded as rows of words, so that neighbouring lanes read neighbouring words; only then by groups.
        first = rows.to(tl.int64) * (K // WIDTH) + col0 // WIDTH  # [ROWS]
        word = tl.arange(0, COLS // 8)
        words_ptrs = (
            weight.packed.to(tl.pointer_type(tl.int32)) + (first * WORDS)[:, None] + word[None, :]
        )  # [ROWS, COLS / 8]
        inside = (col0 // WIDTH + word // WORDS < K // WIDTH)[None, :]
        words = tl.load(words_ptrs) if INSIDE == 1 else tl.load(words_ptrs, mask=inside, other=0)
        words = tl.reshape(words, [ROWS, COLS // WIDTH, WORDS])
        tile = decode_words(words, absmax[:, :, None], codes, DTYPE, METHOD)
        tile = tl.reshape(tile, [ROWS, COLS])
    else:
        cols = col0 + tl.arange(0, COLS)
        if FORM.words == 0:
            cols = tl.minimum(cols, K - 1)
            index = rows.to(tl.int64)[:, None] * K + cols[None, :]  # [ROWS, COLS]
            byte = tl.load(weight.packed + index // 2).to(tl.int32)
            nibble = tl.where(index % 2 == 0, byte >> 4, byte & 15)
            scale = absmax_of(index // FORM.blocksize, None, weight, FORM.nested_blocksize)
            tile = decode(nibble, scale, codes, DTYPE)
        else:
            weight_ptrs = weight + rows.to(tl.int64)[:, None] * weight_stride + cols[None, :]
            tile = (
                tl.load(weight_ptrs)
                if INSIDE == 1
                else tl.load(weight_ptrs, mask=(cols < K)[None, :], other=0.0)
            )
    return tile


@triton.jit
def place_of(tile, M, J, TILES: tl.constexpr):
    """The first row and column of out's tile: group_m blocks of rows by all columns, column after column; a
    weight tile serves group_m programs in a row."""
    GROUP_M: tl.constexpr = TILES.group_m
    row_blocks, col_blocks = tl.cdiv(M, TILES.block_m), tl.cdiv(J, TILES.block_n)
    first_block = tile // (GROUP_M * col_blocks) * GROUP_M
    height = tl.minimum(row_blocks - first_block, GROUP_M)
    row0 = (first_block + tile % (GROUP_M * col_blocks) % height) * TILES.block_m
    col0 = tile % (GROUP_M * col_blocks) // height * TILES.block_n
    return row0, col0


@triton.jit
def contract(
    acc,
    x_ptr,  # [M, C]: x, C = K; or dy, C = N
    x_stride,
    weight,  # `Packed`, or the first of dense [N, K], whose rows are weight_stride apart
    weight_stride,
    row0,
    col0,
    M,
    J,
    C,
    start,
    stop,
    FORM: tl.constexpr,
    TILES: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] + x times a weight tile, over the contraction steps from `start` to `stop`."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FORWARD: tl.constexpr = FORM.forward
    BLOCK_K: tl.constexpr = TILES.block_k
    ROWS: tl.constexpr = TILES.block_n if FORM.forward else TILES.block_k  # of a weight tile, rows being n
    COLS: tl.constexpr = TILES.block_k if FORM.forward else TILES.block_n
    INSIDE: tl.constexpr = (1 if FORM.forward else 0) if FORM.even else -1
    FP32: tl.constexpr = tl.float32 == DTYPE
    N, K = (J, C) if FORWARD else (C, J)
    codes = load_codes(weight.code) if FORM.words >= 0 else 0
    x_rows = tl.minimum(row0 + tl.arange(0, TILES.block_m), M - 1)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride
    absmax = 0.0
    if FORM.words > 0:
        # Steps from an absmax's loads to its use. Nested it takes a load that waits for another, which would
        # stall every step: two. Plain one, as Triton does not pipeline a loop that only hands a value on.
        AHEAD: tl.constexpr = 2 if weight.absmax is None else 1
        w_row0 = col0 if FORWARD else start
        w_col0 = start if FORWARD else col0
        parts = _weight_absmax(w_row0, w_col0, N, K, weight, FORM, ROWS, COLS)
        absmax = absmax_value(parts, weight)
        if AHEAD == 2:
            following = start + BLOCK_K
            w_row0 = col0 if FORWARD else following
            w_col0 = following if FORWARD else col0
            parts = _weight_absmax(w_row0, w_col0, N, K, weight, FORM, ROWS, COLS)
    for step in range(start, stop, BLOCK_K):
        steps = step + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x = (
            tl.load(x_ptrs + steps[None, :])
            if FORM.even
            else tl.load(x_ptrs + steps[None, :], mask=(steps < C)[None, :], other=0.0)
        )
        w_row0 = col0 if FORWARD else step
        w_col0 = step if FORWARD else col0
        tile = _weight_tile(
            w_row0, w_col0, N, K, weight, weight_stride, codes, absmax, FORM, DTYPE, ROWS, COLS, INSIDE
        )
        if FORM.words > 0:
            # The next step's: bytes cannot go through the asynchronous copies.
            if AHEAD == 2:
                absmax = absmax_value(parts, weight)
            following = step + AHEAD * BLOCK_K
            w_row0 = col0 if FORWARD else following
            w_col0 = following if FORWARD else col0
            parts = _weight_absmax(w_row0, w_col0, N, K, weight, FORM, ROWS, COLS)
            if AHEAD == 1:
                absmax = parts[0]
        tile = tl.trans(tile) if FORWARD else tile
        acc = dot_fresh(x, tile, acc, "ieee") if FP32 else dot(x, tile, acc, "ieee")
    return acc


@triton.jit
def matmul_tile(
    pid,
    x_ptr,  # [M, C]
    x_stride,
    m,  # `ProductOperands`; where split_k > 1 its `out` is fp32 [split_k, M, J], the bare products
    threshold,
    M,
    C,
    split_steps,  # contraction steps that one program takes, a multiple of block_k
    R: tl.constexpr,
    FACTORS: tl.constexpr,
    FORM: tl.constexpr,
    TILES: tl.constexpr,
):
    """A tile of out [M, J] = x times the weight, with the low-rank product and the bias."""
    BLOCK_M: tl.constexpr = TILES.block_m
    BLOCK_N: tl.constexpr = TILES.block_n
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    J = m.columns
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(J, BLOCK_N)
    split, tile = pid // tiles, pid % tiles
    row0, col0 = place_of(tile, M, J, TILES)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TILES.split_k == 1:
        acc = _start(acc, m, threshold, row0, col0, M, R, DTYPE, FACTORS, FORM.forward, BLOCK_M, BLOCK_N)
    start = split * split_steps
    steps = (start, tl.minimum(C, start + split_steps))
    acc = contract(acc, x_ptr, x_stride, m.weight, m.weight_stride, row0, col0, M, J, C, *steps, FORM, TILES)
    if TILES.split_k == 1:
        finish(acc, m.bias, m.out, m.out_stride, row0, col0, M, J, BLOCK_M, BLOCK_N)
    else:
        finish(acc, None, m.out + split.to(tl.int64) * M * J, J, row0, col0, M, J, BLOCK_M, BLOCK_N)


@triton.jit
def reduce_tile(
    pid,
    partials_ptr,  # fp32 [SPLIT_K, M, J]
    m,  # `ProductOperands`
    threshold,
    M,
    R: tl.constexpr,
    FACTORS: tl.constexpr,
    FORWARD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = the partial sums, added in order, with the low-rank product and the bias."""
    DTYPE: tl.constexpr = m.out.dtype.element_ty
    J = m.columns
    col_blocks = tl.cdiv(J, BLOCK_N)
    row0, col0 = pid // col_blocks * BLOCK_M, pid % col_blocks * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _start(acc, m, threshold, row0, col0, M, R, DTYPE, FACTORS, FORWARD, BLOCK_M, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < J)[None, :]
    partial_ptrs = partials_ptr + rows.to(tl.int64)[:, None] * J + cols[None, :]  # [BLOCK_M, BLOCK_N]
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptrs + tl.cast(M, tl.int64) * J * split, mask=mask, other=0.0)
    finish(acc, m.bias, m.out, m.out_stride, row0, col0, M, J, BLOCK_M, BLOCK_N)
