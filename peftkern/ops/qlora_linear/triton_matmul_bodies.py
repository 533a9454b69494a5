"""The base product's kernels as device functions that take their program id; `triton_matmul.py` launches them
and says what they compute.

WORDS says how the weight is read: 4 or 1 words of eight codes at a time, all of one block; 0: code by code,
rows may start within a byte;
-1: dense, in x's dtype. LOW says how the fp32 rows of xa or dyb meet an adapter: "split" as a high and a low
term of the 16-bit dtype that x and the adapter share (bf16: 16 bits are kept, and the tile is multiplied
twice); otherwise in fp32, LOW being tl.dot's input_precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_nf4 import absmax_of, absmax_parts, absmax_value, decode, decode_words, load_codes
from ..triton_numerics import dot, dot_fresh, round_to, to_fp32
from ..triton_philox import dropout_scale_tile

__all__ = ["matmul_tile", "reduce_tile"]


@triton.jit
def _low_rank(
    acc,
    low_ptr,
    adapter_ptr,
    adapter_stride,
    rows,
    cols,
    M,
    J,
    scaling,
    DTYPE: tl.constexpr,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] + scaling * low [M, RANK] @ adapter, lora_b [J, RANK] where FORWARD, else lora_a
    [RANK, J]."""
    for rank0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
        ranks = rank0 + tl.arange(0, BLOCK_R)
        offsets = rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
        mask = (rows < M)[:, None] & (ranks < RANK)[None, :]
        low = tl.load(low_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]
        for chunk in tl.static_range(1, CHUNKS):
            low += tl.load(low_ptr + tl.cast(M, tl.int64) * (chunk * RANK) + offsets, mask=mask, other=0.0)
        low = low * scaling
        if FORWARD:
            adapter_ptrs = adapter_ptr + cols.to(tl.int64)[None, :] * adapter_stride + ranks[:, None]
        else:
            adapter_ptrs = adapter_ptr + ranks.to(tl.int64)[:, None] * adapter_stride + cols[None, :]
        adapter = tl.load(
            adapter_ptrs, mask=(ranks < RANK)[:, None] & (cols < J)[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_N]
        if LOW == "split":
            if tl.float16 == DTYPE:
                low = tl.minimum(
                    tl.maximum(low, -65504.0), 65504.0
                )  # an infinite high term would make the low one NaN
            high = round_to(low, DTYPE)
            acc = dot(round_to(low - to_fp32(high), DTYPE), adapter, acc)
            acc = dot(high, adapter, acc)
        else:
            acc = dot_fresh(low, to_fp32(adapter), acc, LOW)
    return acc


@triton.jit
def _start(
    acc,
    low_ptr,
    adapter_ptr,
    adapter_stride,
    seed_ptr,
    threshold,
    scaling,
    row0,
    col0,
    M,
    J,
    first_col,
    DTYPE: tl.constexpr,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The low-rank product on top of zeros, masked where dx has dropout."""
    if RANK > 0:
        rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        acc = _low_rank(
            acc,
            low_ptr,
            adapter_ptr,
            adapter_stride,
            rows,
            cols,
            M,
            J,
            scaling,
            DTYPE,
            FORWARD,
            RANK,
            BLOCK_R,
            CHUNKS,
            LOW,
        )
        if seed_ptr is not None:
            acc = acc * dropout_scale_tile(seed_ptr, threshold, row0, first_col + col0, BLOCK_M, BLOCK_N)
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
    absmax_ptr,
    absmax_8bit_ptr,
    nested_absmax_ptr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`absmax_parts` [ROWS, COLS / (8 WORDS)] of a tile's groups; past the weight's edges those of its last
    row or group."""
    WIDTH: tl.constexpr = 8 * WORDS
    row = tl.minimum(row0 + tl.arange(0, ROWS), N - 1)
    group = tl.minimum(col0 // WIDTH + tl.arange(0, COLS // WIDTH), K // WIDTH - 1)
    block = (row[:, None] * (K // WIDTH) + group[None, :]) // (BLOCKSIZE // WIDTH)
    return absmax_parts(block, None, absmax_ptr, absmax_8bit_ptr, nested_absmax_ptr, NESTED_BLOCKSIZE)


@triton.jit
def weight_tile(
    row0,
    col0,
    N,
    K,
    weight_ptr,
    weight_stride,
    codes,
    absmax,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    METHOD: tl.constexpr,
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
    if WORDS > 0:
        WIDTH: tl.constexpr = 8 * WORDS
        # Loaded as rows of words, so that neighbouring lanes read neighbouring words; only then by groups.
        first = rows.to(tl.int64) * (K // WIDTH) + col0 // WIDTH  # [ROWS]
        word = tl.arange(0, COLS // 8)
        words_ptrs = (
            weight_ptr.to(tl.pointer_type(tl.int32)) + (first * WORDS)[:, None] + word[None, :]
        )  # [ROWS, COLS / 8]
        inside = (col0 // WIDTH + word // WORDS < K // WIDTH)[None, :]
        words = tl.load(words_ptrs) if INSIDE == 1 else tl.load(words_ptrs, mask=inside, other=0)
        words = tl.reshape(words, [ROWS, COLS // WIDTH, WORDS])
        tile = tl.reshape(decode_words(words, absmax[:, :, None], codes, DTYPE, METHOD), [ROWS, COLS])
    else:
        cols = col0 + tl.arange(0, COLS)
        if WORDS == 0:
            cols = tl.minimum(cols, K - 1)
            index = rows.to(tl.int64)[:, None] * K + cols[None, :]  # [ROWS, COLS]
            byte = tl.load(weight_ptr + index // 2).to(tl.int32)
            nibble = tl.where(index % 2 == 0, byte >> 4, byte & 15)
            scale = absmax_of(
                index // BLOCKSIZE,
                None,
                absmax_ptr,
                absmax_8bit_ptr,
                absmax_code_ptr,
                nested_absmax_ptr,
                absmax_offset_ptr,
                NESTED_BLOCKSIZE,
            )
            tile = decode(nibble, scale, codes, DTYPE)
        else:
            weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + cols[None, :]
            tile = (
                tl.load(weight_ptrs)
                if INSIDE == 1
                else tl.load(weight_ptrs, mask=(cols < K)[None, :], other=0.0)
            )
    return tile


@triton.jit
def matmul_tile(
    pid,
    x_ptr,  # [M, C]: x, C = K; or dy, C = N
    weight_ptr,  # uint8 [N K / 2], or dense [N, K]
    code_ptr,  # fp32 [16], with the absmax as in `absmax_of`; None where the weight is dense
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    bias_ptr,  # [J], or None
    low_ptr,  # fp32 [CHUNKS, M, RANK]: xa or dyb, summed over the chunks; or None
    adapter_ptr,  # lora_b [J, RANK] where FORWARD, else lora_a [RANK, J]
    seed_ptr,  # int64 [1], or None: no dropout
    threshold,
    scaling,
    out_ptr,  # [M, J] of x's dtype; where SPLIT_K > 1 fp32 [SPLIT_K, M, J], the bare products
    M,
    J,
    C,
    x_stride,
    weight_stride,
    adapter_stride,
    out_stride,  # elements from a row to the next
    first_col,  # of out within dx, for the mask
    split_steps,  # contraction steps that one program takes, a multiple of BLOCK_K
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    METHOD: tl.constexpr,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides C
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    N, K = (J, C) if FORWARD else (C, J)
    row_blocks, col_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(J, BLOCK_N)
    split, tile = pid // (row_blocks * col_blocks), pid % (row_blocks * col_blocks)
    # GROUP_M blocks of rows by all columns, column after column: a weight tile serves GROUP_M programs in a
    # row.
    first_block = tile // (GROUP_M * col_blocks) * GROUP_M
    height = tl.minimum(row_blocks - first_block, GROUP_M)
    row0 = (first_block + tile % (GROUP_M * col_blocks) % height) * BLOCK_M
    col0 = tile % (GROUP_M * col_blocks) // height * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SPLIT_K == 1:
        acc = _start(
            acc,
            low_ptr,
            adapter_ptr,
            adapter_stride,
            seed_ptr,
            threshold,
            scaling,
            row0,
            col0,
            M,
            J,
            first_col,
            DTYPE,
            FORWARD,
            RANK,
            BLOCK_R,
            CHUNKS,
            LOW,
            BLOCK_M,
            BLOCK_N,
        )
    codes = load_codes(code_ptr) if WORDS >= 0 else 0
    ROWS: tl.constexpr = BLOCK_N if FORWARD else BLOCK_K  # of a weight tile, rows being n
    COLS: tl.constexpr = BLOCK_K if FORWARD else BLOCK_N
    INSIDE: tl.constexpr = (1 if FORWARD else 0) if EVEN else -1
    start = split * split_steps
    stop = tl.minimum(C, start + split_steps)
    x_ptrs = x_ptr + tl.minimum(row0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None] * x_stride
    absmax = 0.0
    # Steps from an absmax's loads to its use. Nested it takes a load that waits for another, which would
    # stall every step: two. Plain one,
    # as Triton does not pipeline a loop that only hands a value on.
    AHEAD: tl.constexpr = 2 if absmax_ptr is None else 1
    if WORDS > 0:
        parts = _weight_absmax(
            col0 if FORWARD else start,
            start if FORWARD else col0,
            N,
            K,
            absmax_ptr,
            absmax_8bit_ptr,
            nested_absmax_ptr,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            WORDS,
            ROWS,
            COLS,
        )
        absmax = absmax_value(parts, absmax_ptr, absmax_code_ptr, absmax_offset_ptr)
        if AHEAD == 2:
            following = start + BLOCK_K
            parts = _weight_absmax(
                col0 if FORWARD else following,
                following if FORWARD else col0,
                N,
                K,
                absmax_ptr,
                absmax_8bit_ptr,
                nested_absmax_ptr,
                BLOCKSIZE,
                NESTED_BLOCKSIZE,
                WORDS,
                ROWS,
                COLS,
            )
    for step in range(start, stop, BLOCK_K):
        steps = step + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x = (
            tl.load(x_ptrs + steps[None, :])
            if EVEN
            else tl.load(x_ptrs + steps[None, :], mask=(steps < C)[None, :], other=0.0)
        )
        weight = weight_tile(
            col0 if FORWARD else step,
            step if FORWARD else col0,
            N,
            K,
            weight_ptr,
            weight_stride,
            codes,
            absmax,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            WORDS,
            METHOD,
            DTYPE,
            ROWS,
            COLS,
            INSIDE,
        )
        if WORDS > 0:
            # The next step's: bytes cannot go through the asynchronous copies.
            if AHEAD == 2:
                absmax = absmax_value(parts, absmax_ptr, absmax_code_ptr, absmax_offset_ptr)
            following = step + AHEAD * BLOCK_K
            parts = _weight_absmax(
                col0 if FORWARD else following,
                following if FORWARD else col0,
                N,
                K,
                absmax_ptr,
                absmax_8bit_ptr,
                nested_absmax_ptr,
                BLOCKSIZE,
                NESTED_BLOCKSIZE,
                WORDS,
                ROWS,
                COLS,
            )
            if AHEAD == 1:
                absmax = parts[0]
        weight = tl.trans(weight) if FORWARD else weight
        FP32: tl.constexpr = tl.float32 == DTYPE
        acc = dot_fresh(x, weight, acc, PRECISION) if FP32 else dot(x, weight, acc, PRECISION)
    if SPLIT_K == 1:
        finish(acc, bias_ptr, out_ptr, out_stride, row0, col0, M, J, BLOCK_M, BLOCK_N)
    else:
        finish(acc, None, out_ptr + split.to(tl.int64) * M * J, J, row0, col0, M, J, BLOCK_M, BLOCK_N)


@triton.jit
def reduce_tile(
    pid,
    partials_ptr,  # fp32 [SPLIT_K, M, J]; the rest as above
    bias_ptr,
    low_ptr,
    adapter_ptr,
    seed_ptr,
    threshold,
    scaling,
    out_ptr,
    M,
    J,
    adapter_stride,
    out_stride,
    first_col,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = the partial sums, added in order, with the low-rank product and the bias."""
    col_blocks = tl.cdiv(J, BLOCK_N)
    row0, col0 = pid // col_blocks * BLOCK_M, pid % col_blocks * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = _start(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        low_ptr,
        adapter_ptr,
        adapter_stride,
        seed_ptr,
        threshold,
        scaling,
        row0,
        col0,
        M,
        J,
        first_col,
        out_ptr.dtype.element_ty,
        FORWARD,
        RANK,
        BLOCK_R,
        CHUNKS,
        LOW,
        BLOCK_M,
        BLOCK_N,
    )
    mask = (rows < M)[:, None] & (cols < J)[None, :]
    partial_ptrs = partials_ptr + rows.to(tl.int64)[:, None] * J + cols[None, :]  # [BLOCK_M, BLOCK_N]
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptrs + tl.cast(M, tl.int64) * J * split, mask=mask, other=0.0)
    finish(acc, bias_ptr, out_ptr, out_stride, row0, col0, M, J, BLOCK_M, BLOCK_N)
