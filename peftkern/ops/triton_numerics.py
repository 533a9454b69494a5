"""Conversions and products that mean the same compiled and in Triton's interpreter.

The interpreter (3.6 and 3.9) cuts fp32 to bf16 instead of rounding, and multiplies the bit patterns of bf16
operands as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "round_to", "dot", "dot_fresh", "to_fp32"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_fp32(value):
    """fp32 of a float of any dtype, exactly."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        result = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = tl.constexpr("ieee")):  # noqa: B008
    """acc + a @ b in fp32; PRECISION is tl.dot's, for fp32 operands."""
    return (
        tl.dot(to_fp32(a), to_fp32(b), acc) if INTERPRETED else tl.dot(a, b, acc, input_precision=PRECISION)
    )


@triton.jit
def dot_fresh(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b of fp32 operands, the tile's products summed from zero and that sum added to `acc`.

    The chains are then short, as those of the vendor's products. On tensor cores it matters more: they cut
    their sums instead of rounding them, which adds up over a long contraction. The addition is a multiply-add
    by 1, as Triton joins a product and a plain addition.
    """
    if INTERPRETED:
        return tl.dot(a, b, acc)
    else:
        tile = tl.dot(a, b, input_precision=PRECISION)
        return tl.fma(tile, tl.full(tile.shape, 1.0, tl.float32), acc)
