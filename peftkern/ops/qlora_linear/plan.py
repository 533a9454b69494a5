"""The GPU launches of one QLoRA linear, with the bytes and operations of each: what `gpu.py` does, as data.

A test runs `gpu.py` under Triton's interpreter and compares its launches with this list, name by name;
`benchmarks/roofline.py` predicts times from it. Bytes are those a kernel must move to and from device memory,
once each; what caches hold between launches is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import config
from .config import Choice

__all__ = ["Launch", "Shape", "backward_plan", "forward_plan"]

PHILOX_OPS = 12  # an element: ten rounds of about ten instructions for eight of them
_DECODE_OPS = 8  # a weight, by byte permutes into exactly scaled 16-bit values


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the bytes it reads and writes, tensor-core FLOPs, ALU operations outside them."""

    name: str
    reads: int
    writes: int
    flops: int = 0
    ops: int = 0


@dataclass(frozen=True)
class Shape:
    """A call's sizes. itemsize: of x; lora_itemsize: of the adapters; nested: of the absmax; dense: a weight
    of x's dtype instead."""

    m: int
    n: int
    k: int
    r: int = 16
    itemsize: int = 2
    lora_itemsize: int = 2
    blocksize: int = 64
    nested: bool = True
    dense: bool = False
    bias: bool = False
    dropout: bool = False

    @property
    def x(self) -> int:
        """Bytes of x, and of dx."""
        return self.m * self.k * self.itemsize

    @property
    def y(self) -> int:
        """Bytes of y, and of dy."""
        return self.m * self.n * self.itemsize

    @property
    def xa(self) -> int:
        """Bytes of xa, and of dyb: fp32 [M, R]."""
        return 4 * self.m * self.r

    def adapter(self, side: int) -> int:
        """Bytes of lora_a (side K) or lora_b (side N)."""
        return side * self.r * self.lora_itemsize

    def weight(self, elements: int) -> int:
        """Bytes from which that many weights are decoded; of a dense weight its own."""
        if self.dense:
            return elements * self.itemsize
        blocks = -(-elements // self.blocksize)
        return elements // 2 + (blocks + 4 * (-(-blocks // 256)) if self.nested else 4 * blocks)

    def gemm(self, columns: int, depth: int) -> int:
        """FLOPs of an [M, depth] by [depth, columns] product."""
        return 2 * self.m * columns * depth


def forward_plan(s: Shape, choice: Choice) -> list[Launch]:
    """The launches of the forward pass."""
    mask = PHILOX_OPS * s.m * s.k if s.dropout else 0
    xa = Launch("xa", s.x + s.adapter(s.k), s.xa, s.gemm(s.r, s.k), mask) if s.r else None
    low_reads = (s.xa + s.adapter(s.n) if s.r else 0) + (s.itemsize * s.n if s.bias else 0)
    if choice.regime != "slab":
        product = _decoding(choice.regime, s, s.x + low_reads, s.y, s.gemm(s.n, s.k) + s.gemm(s.n, s.r))
        return [product] if xa is None else [xa, product]
    out: list[Launch] = []
    for index, rows in enumerate(_parts(s, s.n, s.k, choice)):
        height, share = rows.stop - rows.start, (rows.stop - rows.start) / s.n
        slab, y = height * s.k * s.itemsize, round(share * s.y)
        out += slab_launches(s, height * s.k, xa if index == 0 else None)
        if choice.gemm == "triton":
            out.append(Launch("matmul", s.x + slab + round(share * low_reads), y, s.gemm(height, s.k + s.r)))
            continue
        if index == 0 and s.r:
            out.append(Launch("y_epilogue", low_reads, s.y, s.gemm(s.n, s.r)))
        out.append(Launch("mm", s.x + slab + (y if s.r else 0), y, s.gemm(height, s.k)))
    return out


def backward_plan(s: Shape, choice: Choice) -> list[Launch]:
    """The launches of the backward pass that gives dx and every gradient of the adapter and the bias."""
    mask = PHILOX_OPS * s.m * s.k if s.dropout else 0
    dy = None
    if s.r or s.bias:
        reads = s.y + (s.xa + s.adapter(s.n) if s.r else 0)
        dy = Launch("dy_pass", reads, s.xa + partial_sums(s, s.n), 2 * s.gemm(s.n, s.r))
    low_reads = s.xa + s.adapter(s.k) if s.r else 0
    d_lora_a = Launch("x_pass", s.x + s.xa, partial_sums(s, s.k), s.gemm(s.k, s.r), mask)
    out: list[Launch] = []
    if choice.regime != "slab":
        out += [] if dy is None else [dy]
        out.append(_decoding("fused", s, s.y + low_reads, s.x, s.gemm(s.k, s.n + s.r), mask))
    else:
        for index, cols in enumerate(_parts(s, s.k, s.n, choice)):
            width, share = cols.stop - cols.start, (cols.stop - cols.start) / s.k
            slab, dx = width * s.n * s.itemsize, round(share * s.x)
            out += slab_launches(s, width * s.n, dy if index == 0 else None)
            if choice.gemm == "triton":
                reads = s.y + slab + round(share * low_reads)
                out.append(Launch("matmul", reads, dx, s.gemm(width, s.n + s.r), round(share * mask)))
                continue
            if index == 0 and s.r:
                both = Launch(
                    "x_pass", d_lora_a.reads + low_reads, d_lora_a.writes + s.x, 2 * d_lora_a.flops, 2 * mask
                )
                out.append(both)
            out.append(Launch("mm", s.y + slab + (dx if s.r else 0), dx, s.gemm(width, s.n)))
    if s.r and (choice.regime != "slab" or choice.gemm == "triton"):
        out.append(d_lora_a)
    if s.r or s.bias:
        reads = partial_sums(s, s.n) + (partial_sums(s, s.k) if s.r else 0)
        out.append(Launch("reduce", reads, s.adapter(s.n) + s.adapter(s.k) + (4 * s.n if s.bias else 0)))
    return out


def partial_sums(s: Shape, side: int) -> int:
    """Bytes of the fp32 partial sums of an adapter's gradient (and of d_bias): one a chunk of about 512
    rows."""
    return -(-s.m // 512) * 4 * side * (s.r + (1 if s.bias and side == s.n else 0))


def _parts(s: Shape, total: int, width: int, choice: Choice) -> list[slice]:
    return [slice(0, total)] if s.dense else config.slices(total, width, s.itemsize, choice.slab_bytes)


def _decoding(name: str, s: Shape, reads: int, writes: int, flops: int, ops: int = 0) -> Launch:
    """A product that decodes the weight itself, once for every 128 rows of x."""
    decodes = 1 if name == "gemv" else -(-s.m // 128)
    return Launch(name, reads + s.weight(s.n * s.k), writes, flops, ops + _DECODE_OPS * s.n * s.k * decodes)


def slab_launches(s: Shape, elements: int, beside: Launch | None) -> list[Launch]:
    """Decoding a slab, and in the same launch what reads an activation; nothing is decoded of a dense
    weight."""
    if s.dense:
        return [] if beside is None else [beside]
    decode = Launch("slab", s.weight(elements), elements * s.itemsize, 0, _DECODE_OPS * elements)
    if beside is None:
        return [decode]
    reads, writes, ops = decode.reads + beside.reads, decode.writes + beside.writes, decode.ops + beside.ops
    return [Launch(f"slab+{beside.name}", reads, writes, beside.flops, ops)]
