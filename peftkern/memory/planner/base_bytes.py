"""Bytes of the frozen linears, packed or dense."""

from __future__ import annotations

import math

from .options import RunOptions
from .shapes import LinearShape, Shape

__all__ = ["base_bytes", "packed_bytes"]


def packed_bytes(linear: LinearShape, options: RunOptions) -> tuple[int, int]:
    """A linear's packed weight, and what its block maxima take (both of all its copies)."""
    elements = linear.n * linear.k
    if not options.four_bit:
        return elements * options.dtype_bytes * linear.count, 0
    blocks = math.ceil(elements / options.blocksize)
    # code [16]; of nested maxima: 8 bits each, an fp32 for 256 of them, their code [256] and offset.
    maxima = (
        blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1) if options.nested else 4 * (blocks + 16)
    )
    return (elements + 1) // 2 * linear.count, maxima * linear.count


def base_bytes(shape: Shape, options: RunOptions) -> tuple[int, int]:
    """Packed weights and block maxima of all layers. Layers may differ: their elements are known together."""
    one = sum(linear.weights for linear in shape.linears) or 1
    packed, maxima = map(sum, zip(*(packed_bytes(one, options) for one in shape.linears), strict=True))
    scale = shape.layer_weights / one
    return round(packed * scale), round(maxima * scale)
