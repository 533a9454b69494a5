"""Tiles and chunks of the GPU's low-rank passes: a pure function of the sizes, testable on any machine.
Nothing here is measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ...runtime.targets import nearest
from ..sizes import ceil_div, next_power_of_2

__all__ = [
    "EXACT_ROWS",
    "SHARED_L2",
    "LowRankConfig",
    "Ranks",
    "Tile",
    "beside_a_slab",
    "choose_low_rank",
    "dot_mode",
]

# The programs of dyb and of dB read the same rows of dy out of an L2 of at least so many bytes; below, one
# program does both. Derived, not measured.
SHARED_L2 = 32 << 20


@dataclass(frozen=True)
class Tile:
    """What a program holds of the wide operand at a time, [rows, cols], and the launch's warps and pipeline
    stages."""

    rows: int
    cols: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class LowRankConfig:
    """xa, dy, x, epilogue: the passes' tiles.

    xa_splits: parts of xa's contraction, summed by a launch of their own where there are several. dy_rows,
    x_rows: rows a program walks, multiples of the tile's; each such chunk leaves one partial sum of dB or dA.
    fused: dyb, dB and d_bias from one read of dy, with a partial dyb a column chunk; else dyb by programs of
    its own beside dB's, which read the same rows while a cache may hold them.
    sum_dyb: the column chunks' dyb are summed by a launch of their own, not by whoever reads them. ranks: the
    epilogue's step over R.
    """

    xa: Tile
    xa_splits: int
    dy: Tile
    dy_rows: int
    fused: bool
    sum_dyb: bool
    x: Tile
    x_rows: int
    epilogue: Tile
    ranks: int


@dataclass(frozen=True)
class Ranks:
    """What the passes' kernels are compiled for of their adapters. each: the ranks; padded: the largest
    rounded up to a power of two of at least 16; step: the epilogue's, over ranks; mode: `dot_mode`'s
    answer."""

    each: tuple[int, ...]
    padded: int
    step: int
    mode: str


# fp32 operands of up to so many rows are multiplied outside the tensor cores, whose three TF32 products err
# up to 1.6
# times as much as plain PyTorch's sums of so few terms (measured on an H100); of more rows they err less than
# its sums.
EXACT_ROWS = 128


def dot_mode(x_dtype: str, adapter_dtype: str, arch: int, m: int | None = None) -> str:
    """How the products of `triton_low_rank_bodies` take their operands ("bfloat16", ...) on sm_<arch>: Turing
    multiplies fp16 alone.
    m: rows; None: many."""
    if x_dtype == adapter_dtype == "float16" or (x_dtype == adapter_dtype == "bfloat16" and arch >= 80):
        return "native"
    if arch < 80:
        return "ieee"
    if (x_dtype, adapter_dtype) == ("bfloat16", "float32"):
        return "split"
    return "tf32x3" if m is None or m > EXACT_ROWS else "ieee"


def _chunk(m: int, tile: Tile, columns: int, sms: int) -> int:
    """The most rows a program can walk with two programs, or nearly, left for every SM: longer walks leave
    fewer partial sums. Nearly: 256 programs on 132 SMs."""
    for rows in (4096, 2048, 1024, 512, 256, 128):
        if ceil_div(m, rows) * ceil_div(columns, tile.cols) >= 2 * sms - sms // 8:
            return rows
    return max(64, tile.rows)


@functools.lru_cache(maxsize=4096)
def choose_low_rank(
    m: int, n: int, k: int, r: int, *, mode: str, sms: int = 128, arch: int = 89
) -> LowRankConfig:
    """The passes of x [m, k], dy [m, n] and rank r on `sms` multiprocessors of sm_<arch>, with `dot_mode`'s
    answer."""
    pad = max(16, next_power_of_2(r))
    xa, dy, x = _tiles(pad, mode, arch)
    # Programs enough for all SMs: shorter blocks of rows first, they cost only further reads of the adapter;
    # then a split contraction.
    rows = next((size for size in (xa.rows, xa.rows // 2) if ceil_div(m, size) >= 3 * sms // 2), 16)
    xa = replace(xa, rows=min(rows, xa.rows))
    blocks = ceil_div(m, xa.rows)
    splits = 1 if 2 * blocks >= sms else min(ceil_div(2 * sms, blocks), max(1, min(n, k) // 512))
    # else dyb's partial sums, 8 R / (2 cols) of dy, move more than a second read of dy
    fused = dy.cols >= 4 * pad
    # x's pass reads every chunk's dyb once a column of its own tiles: past half of x's own bytes a launch
    # that adds them before pays.
    chunks = ceil_div(n, dy.cols) if fused else 1
    sum_dyb = chunks > 8 or (chunks > 1 and chunks * 4 * r * ceil_div(k, x.cols) > k)
    return LowRankConfig(
        xa=xa,
        xa_splits=splits,
        dy=dy,
        dy_rows=_chunk(m, dy, n, sms),
        fused=fused,
        sum_dyb=sum_dyb,
        x=x,
        x_rows=_chunk(m, x, k, sms),
        epilogue=Tile(64, 128, 8, 1) if arch >= 80 and mode != "ieee" else Tile(32, 64, 8, 1),
        ranks=min(pad, 64 if mode == "native" and arch >= 80 else 16),
    )


@functools.lru_cache(maxsize=4096)
def beside_a_slab(found: LowRankConfig, n: int, itemsize: int, l2: int) -> LowRankConfig:
    """The passes of dy [m, n] that share their launches with a slab's decoding, which fills the device: no
    split contraction, and dyb beside dB while a chunk of dy's rows stays in the L2 between the two.

    An eighth of the L2, as several chunks are under way at once. On an H100 (50 MB) two reads of dy took less
    than one pass with its partial sums where a chunk has 2 MB (N = 4096), and more where it has 7 or 29: N =
    14336, M = 2048 151 us against 120, M = 8192 251 against 236 (benchmarks/results/h100-80gb-hbm3).
    """
    shared = l2 >= SHARED_L2 and found.dy_rows * n * itemsize <= l2 // 8
    return replace(found, xa_splits=1, fused=found.fused and not shared, sum_dyb=found.sum_dyb and not shared)


def _tiles(pad: int, mode: str, arch: int) -> tuple[Tile, Tile, Tile]:
    """(xa, dy, x) for a padded rank: accumulators in registers, stages in shared memory, no spills in the
    cubins of any architecture."""
    # Triton multiplies on the CUDA cores then, with a whole row of each operand in registers
    if arch < 80 or mode == "ieee":
        return (
            (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
            if pad <= 64
            else (Tile(16, 16, 8, 1),) * 3
        )
    if mode in ("native", "split"):
        native = mode == "native"
        if pad <= 32:
            stages = 3 if nearest(arch).shared_per_block > 128 * 1024 else 2
            dy = Tile(32, 256 if native or pad == 16 else 128, 8, 2)
            return Tile(64, 128 if native and pad == 16 else 64, 4, 3), dy, Tile(32, 256, 8, stages)
        if pad == 64:
            return Tile(64, 64, 8, 3), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)
        return Tile(32, 64 if native else 32, 8, 2), Tile(32 if native else 16, 64, 8, 2), Tile(32, 64, 8, 2)
    if pad <= 64:
        return Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)
    return Tile(32, 16, 8, 2), Tile(16, 32, 8, 2), Tile(16, 64, 8, 2)
