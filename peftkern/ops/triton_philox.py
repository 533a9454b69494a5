"""The dropout mask of docs/numerics.md on tiles, as device functions: Philox4x32-10, eight 16-bit draws a
counter, never stored.

Element (i, j) is dropped where the (j % 8)-th half of philox(counter = (j // 8, i, 0, 0), key = the seed's
halves) is below the threshold round(65536 p); what is kept is scaled by 65536 / (65536 - threshold). Tiles
may start anywhere in rows and at multiples of 8 in columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dropout_keep", "dropout_key", "dropout_scale_tile", "keep_factor"]


@triton.jit
def dropout_key(seed_ptr):
    """int64 seed in device memory -> Philox's key, its low and high 32 bits. Load it once, outside loops."""
    seed = tl.load(seed_ptr)
    return (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _philox_4x32(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 on uint32 counters and a uint32 key -> four uint32 words.

    A 64-bit product gives both halves by one IMAD.WIDE where the high half alone costs one of its own: 75 for
    four counters in place of 134 multiplications (counted in the sm_80 cubin).
    """
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0, (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_factor(threshold):
    """65536 / (65536 - threshold) in fp32, correctly rounded; anything finite where all is dropped."""
    return tl.div_rn(65536.0, tl.maximum(65536 - threshold, 1).to(tl.float32))


@triton.jit
def dropout_keep(
    key_low, key_high, threshold, row0, col0, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """bool [BLOCK_ROWS, BLOCK_COLS]: which elements of the tile at (row0, col0) are kept; col0 and BLOCK_COLS
    are multiples of 8.

    Exact in any dtype: multiply the sum of what is kept by `keep_factor`, once, rather than every element.
    """
    GROUPS: tl.constexpr = BLOCK_COLS // 8
    zero = tl.zeros([BLOCK_ROWS, GROUPS], tl.uint32)
    column = zero + (col0 // 8 + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    row = zero + (row0 + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = _philox_4x32(column, row, zero, zero, key_low, key_high)
    # Each join puts its axis last, so that a thread's eight draws are eight neighbours in a row: 16 bytes of
    # 16-bit x.
    words = tl.join(
        tl.join(w0, w2), tl.join(w1, w3)
    )  # [BLOCK_ROWS, GROUPS, 2, 2]: word = 2 * third index + fourth
    draws = tl.join(words & 0xFFFF, words >> 16)  # [BLOCK_ROWS, GROUPS, 2, 2, 2], low half first
    return tl.reshape(draws, [BLOCK_ROWS, BLOCK_COLS]).to(tl.int32) >= threshold


@triton.jit
def dropout_scale_tile(seed_ptr, threshold, row0, col0, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """fp32 [BLOCK_ROWS, BLOCK_COLS]: the mask times `keep_factor`, bit for bit `reference.dropout_scale`'s
    tile at (row0, col0)."""
    key_low, key_high = dropout_key(seed_ptr)
    keep = dropout_keep(key_low, key_high, threshold, row0, col0, BLOCK_ROWS, BLOCK_COLS)
    return tl.where(keep, keep_factor(threshold), 0.0)
