"""Which kernels a QLoRA linear takes, on a CPU and on a GPU: pure functions over tables, testable on any
machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .waves import RATES, fused_limit

__all__ = [
    "Choice",
    "Config",
    "GPUConfig",
    "GPU_TABLE",
    "TABLE",
    "batches",
    "choose",
    "choose_gpu",
    "nearest_arch",
    "slices",
]


@dataclass(frozen=True, eq=False)  # compared as one thing: `choose` keeps its answers by the row
class Config:
    """Limits of one ISA.

    gemv_max_m: largest M for the fused GEMV. vendor: activation dtypes whose large-M product goes, slice by
    slice, to the vendor's GEMM;
    slice_rows: rows decoded a slice there. dense_vendor: for a dense weight, the largest M a dtype takes to
    the vendor (None: any).
    tiles: for dtypes whose product with a 4-bit weight is that of csrc/cpu/tile_impl.h, where it takes the
    shape, the largest M for the fused GEMV, which has tiles of its own on `amx`.
    attention: bf16 attention in tiles of our own is faster than torch's. loss: so is the cross-entropy of a
    dense bf16 head than the vendor's products with its logits.
    """

    gemv_max_m: int
    vendor: tuple[str, ...]
    slice_rows: int
    dense_vendor: dict[str, int | None]
    measured: str
    tiles: dict[str, int] = field(default_factory=dict)
    attention: bool = False
    loss: bool = False

    def few(self, dtype: str, *, dense: bool, k: int, blocksize: int, tiles: bool = True) -> int:
        """The largest M for the fused GEMV; `tiles` as for `choose`."""
        return self.tiles[dtype] if tiles and self.tiled(dtype, dense, k, blocksize) else self.gemv_max_m

    def tiled(self, dtype: str, dense: bool, k: int, blocksize: int) -> bool:
        """Whether bf16 tiles take such weights."""
        return dtype in self.tiles and not dense and k % 64 == 0 and blocksize >= 64


_NAIVE_HALF = {"float32": None, "bfloat16": 1, "float16": 1}
_FAST_BF16 = {"float32": None, "bfloat16": None, "float16": 1}
TABLE = {
    "baseline": Config(4, (), 512, _NAIVE_HALF, "not measured"),
    # Zen 3, 2 cores, fp32, GEMV against GEMM in ms: 4096 x 4096 at M = 8 4.45, 5.18, at M = 16 6.80, 5.03;
    # 1536 x 576 at M = 8 0.41, 0.49, at M = 16 0.62, 0.49.
    # torch's bf16 dx of 4096 x 4096 at M = 512 took 58 s in the one call made, its fp32 0.12 s.
    "avx2": Config(8, (), 512, _NAIVE_HALF, "measured on Zen 3"),
    # Emerald Rapids, one thread of a shared machine, fastest of many rounds, GEMV against what is next in ms:
    # 4096 x 4096 bf16 (the vendor's GEMM) at M = 8 3.00, 5.64, at M = 16 6.13, 6.13, at M = 24 9.41, 7.14;
    # fp32 (our GEMM) at M = 16 6.36, 8.79, at M = 24 9.34, 8.87;
    # 576 x 576 bf16 at M = 8 0.097, 0.170, at M = 16 0.172, 0.173, at M = 24 0.256, 0.216;
    # fp32 at M = 16 0.161, 0.163, at M = 24 0.231, 0.164.
    # Not measured: who multiplies fp16 above that, and the dense weights' limits.
    "avx512": Config(16, ("bfloat16",), 512, _FAST_BF16, "few rows measured on Emerald Rapids"),
    # Zen 5, 2 threads of an idle machine, medians in ms, r = 16: few rows, the product of many rows. 4096 x
    # 4096 bf16 at M = 1 0.17, 0.75, at M = 8 0.51, 0.81, at M = 16 0.83, 1.07, at M = 20 1.11, 1.35; 1536 x
    # 576 at M = 16 0.103, 0.106, at M = 20 0.130, 0.125; fp16 4096 x 4096 at M = 24 2.93, 3.09, at M = 32
    # 4.37, 3.39; 1536 x 576 at M = 16 0.215, 0.223, at M = 24 0.307, 0.232. Forward and backward at M = 512,
    # tiles and decoded slices through the vendor's GEMM: 39.4, 44.5 and 2.4, 3.0. A dense fp32 1536 x 576,
    # forward and backward, ours and the vendor's: at M = 1 about equal, at M = 16 0.42, 0.53, at M = 512 5.0,
    # 9.7. Attention, forward and backward, 9 heads of 64, 3 of keys, ours and torch's: 2 x 256 tokens 2.0,
    # 7.3, 2 x 1,024 16.2, 53.5. The loss of a dense head of 49,152 x 576 with its gradient, ours and the
    # vendor's: 512 rows 65.7, 78.3, 64 rows 10.2, 16.1, 16 rows 4.4, 7.7; 256 rows of 128,256 x 2,048 326,
    # 458. Zen 4 is not measured.
    "avx512bf16": Config(
        16,
        ("bfloat16",),
        512,
        {"float32": 1, "bfloat16": None, "float16": 1},
        "measured on Zen 5",
        {"bfloat16": 16},
        attention=True,
        loss=True,
    ),
    # Emerald Rapids, one thread of a shared machine, median CPU time of 25 to 150 calls in turn, ms, bf16,
    # r = 16: few rows (in tiles from M = 3 on), the product of many rows, torch on a dense weight.
    # 4096 x 4096 at M = 1 0.84, 2.60, 2.60, at M = 2 1.39, 3.10, 3.90, at M = 4 1.68, 3.28, 3.97, at M = 16
    # 2.02, 3.51, 4.32, at M = 32 2.63, 3.68, 5.11, at M = 64 3.94, 4.69, 5.98; 1536 x 576 at M = 4 0.127,
    # 0.154, 0.172, at M = 16 0.157, 0.185, 0.217, at M = 17 0.189, 0.161, 0.194; 576 x 576 at M = 16 0.068,
    # 0.073, 0.079, at M = 17 0.076, 0.064, 0.070. Through the vendor's GEMM 1536 x 576 took 6.3 forward and
    # backward at M = 512, in tiles 3.0.
    # Attention, forward and backward, 9 heads of 64, 3 of keys: 4.1 times less time than torch's for 2 x 256
    # tokens, 2.7 for 2 x 1,024. By vdpbf16ps, which has half of fp32's rate there, it takes 1.0 to 1.9 times
    # torch's time; it has twice fp32's on Zen 5.
    # The loss of a dense head is not measured.
    "amx": Config(
        16, ("bfloat16",), 512, _FAST_BF16, "measured on Emerald Rapids", {"bfloat16": 16}, attention=True
    ),
}


@dataclass(frozen=True)
class Choice:
    """What a call runs.

    `regime` on a CPU: "gemv", "gemm" (our kernel, decode fused with the product), "vendor" (torch.mm, on
    decoded slices of a 4-bit weight);
    on a GPU: "gemv", "mma" (CUDA), "fused" (Triton, decode in the product), "slab" (decoded slices,
    multiplied by `gemm`).
    """

    regime: str
    why: str
    gemm: str = ""
    slab_bytes: int = 0


@functools.lru_cache(maxsize=4096)
def choose(
    *,
    dtype: str,
    isa: str,
    m: int,
    n: int,
    k: int,
    dense: bool = False,
    blocksize: int = 64,
    tiles: bool = True,
    forward: bool = False,
    row: Config | None = None,
) -> Choice:
    """The regime for x [m, k] of `dtype` ("bfloat16", ...) on `isa` by `row`, else by the table's; an unknown
    ISA takes the baseline's.

    blocksize: the smallest of the weights'; tiles: whether the call is one that bf16 tiles serve (DoRA's is
    not); forward: whether it makes y, which of a dense fp32 weight is to have the bits of torch's own linear.
    """
    row = row or TABLE.get(isa, TABLE["baseline"])
    if dense and forward and dtype == "float32":
        return Choice("vendor", "y of a dense fp32 weight has the bits of torch's own linear")
    if dense:
        limit = row.dense_vendor[dtype]
        if limit is None or m <= limit:
            return Choice(
                "vendor", f"the vendor's {dtype} product is fast on a dense weight at M = {m} on {isa}"
            )
        return Choice("gemm", f"the vendor's {dtype} product is slow at M = {m} on {isa}, {row.measured}")
    few = row.few(dtype, dense=dense, k=k, blocksize=blocksize, tiles=tiles)
    if m <= few:
        return Choice("gemv", f"M = {m} <= {few} on {isa}, {row.measured}")
    if tiles and row.tiled(dtype, dense, k, blocksize):
        return Choice("gemm", f"{dtype} tiles for M = {m} > {few} on {isa}, {row.measured}")
    if dtype in row.vendor:
        return Choice("vendor", f"{dtype} on {isa} has a fast vendor GEMM, {row.measured}")
    return Choice("gemm", f"M = {m} > {few} on {isa}, {row.measured}")


_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class GPUConfig:
    """Limits of one GPU architecture.

    gemv_max_m: largest M for the CUDA GEMV (0: never). mma_min_m: from here on the CUDA tensor-core kernel,
    where it takes the shape.
    fused_max_m: largest M whose products decode inside the kernel, forward and dx, of a weight [4096, 4096];
    fused_by_shape: that limit of other shapes, (N, K, limit), where it was measured. mma_max_m: up to here
    the CUDA tensor-core kernel, of what fused_max_m allows.
    gemm: who multiplies by a decoded slab above that: "cublas" (the low-rank product in passes of its own) or
    "triton" (in the epilogue).
    slab_bytes: decoded weight held at a time.
    """

    gemv_max_m: int
    mma_min_m: int
    fused_max_m: int
    gemm: str
    slab_bytes: int
    measured: str
    mma_max_m: int = _NO_LIMIT
    fused_by_shape: tuple[tuple[int, int, int], ...] = ()


_MIB = 1 << 20
# By compute capability. mma_min_m: by instruction counts the GEMV's shared-memory reads bind it from M = 3
# on. fused_max_m: where decoding
# inside the product still pays, derived from data-sheet peaks: 256 on a 4090, 128 on a 3090, 64 on Hopper; on
# Turing Triton's products do
# not reach the tensor cores. gemm: GeForce cards multiply with fp32 sums at half rate, which a plain mma.sync
# kernel should saturate, so
# that sparing the low-rank passes over y and dx wins (it must reach 0.97 to 0.99 of cuBLAS's rate); others
# need cuBLAS.
# slab_bytes: one slab for 14336 x 4096 in 16 bits (117 MB), so that a linear takes at most seven launches;
# slabs of half an L2
# (4090: 36 MB) would stay on the chip for four launches more each. With our own GEMM two such slabs, so that
# gate and up of an 8B model are
# one batch: a decoder layer then takes 39 launches in place of 43, for 117 MB that live for two of them.
# On an H100 (benchmarks/results/h100-80gb-hbm3): the GEMV wins at M = 1 and 2 (10.7 against 13.2 us), the
# tensor-core kernel from 4 on (13.3 against 15.5) and up to 32 (17.2 against Triton's 23.8, at 64 22.6
# against 20.2); a fused product of 4096^2 takes 24 us at M = 128 and a slab with its GEMM 28, at 256 39
# against 32; cuBLAS beats our own GEMM by 8 % at M = 8192. Other shapes: waves.py.
GPU_TABLE = {
    75: GPUConfig(16, 3, 0, "cublas", 128 * _MIB, "not measured"),
    80: GPUConfig(16, 3, 128, "cublas", 128 * _MIB, "not measured"),
    86: GPUConfig(16, 3, 128, "triton", 256 * _MIB, "not measured"),
    89: GPUConfig(16, 3, 256, "triton", 256 * _MIB, "not measured"),
    90: GPUConfig(16, 3, 128, "cublas", 128 * _MIB, "measured on an H100", mma_max_m=32),
    100: GPUConfig(16, 3, 64, "cublas", 128 * _MIB, "not measured"),
    120: GPUConfig(16, 3, 256, "triton", 256 * _MIB, "not measured"),
}


def nearest_arch(arch: int) -> int:
    """The table's row for a compute capability (8.6 as 86): the newest not above it, else the oldest."""
    return max((known for known in GPU_TABLE if known <= arch), default=min(GPU_TABLE))


@functools.lru_cache(maxsize=4096)
def choose_gpu(
    *,
    arch: int,
    dtype: str,
    m: int,
    forward: bool,
    cuda: bool,
    mma: bool = False,
    dense: bool = False,
    row: GPUConfig | None = None,
    shape: tuple[int, int] | None = None,
) -> Choice:
    """The regime of one direction for x (or dy) of m rows and `dtype` on compute capability `arch`.

    cuda: the CUDA C++ kernels are built; mma: their tensor-core kernel takes this shape; row: limits that
    `peftkern tune` measured here; shape: the weight's [N, K], None for the limit of [4096, 4096].
    """
    most = _fused_max_m(arch, row, shape, forward)
    row = row or GPU_TABLE[nearest_arch(arch)]
    where = f"sm_{arch}, {row.measured}"
    if dense:
        return Choice("slab", f"a dense weight needs no decoding, {where}", _gemm(row, dtype), row.slab_bytes)
    if forward and cuda and mma and row.mma_min_m <= m <= min(row.mma_max_m, most):
        return Choice("mma", f"{row.mma_min_m} <= M = {m} <= {min(row.mma_max_m, most)} on {where}")
    if forward and cuda and m <= row.gemv_max_m:
        return Choice("gemv", f"M = {m} <= {row.gemv_max_m} on {where}")
    if m <= most:
        return Choice("fused", f"M = {m} <= {most} on {where}")
    return Choice("slab", f"M = {m} > {most} on {where}", _gemm(row, dtype), row.slab_bytes)


def _fused_max_m(arch: int, row: GPUConfig | None, shape: tuple[int, int] | None, forward: bool) -> int:
    """The largest M whose product decodes in the kernel: of a measured row that of the most similar shape, of
    the table's by the architecture's rates, where it has any."""
    nearest = nearest_arch(arch)
    limit = (row or GPU_TABLE[nearest]).fused_max_m
    if shape is None or 0 in shape or (row is None and nearest not in RATES):
        return limit
    n, k = shape
    if row is not None:
        rows = [(4096, 4096, limit), *row.fused_by_shape]
        return min(rows, key=lambda one: abs(math.log(n / one[0])) + abs(math.log(k / one[1])))[2]
    columns, contraction = (n, k) if forward else (k, n)
    return fused_limit(columns, contraction, RATES[nearest], limit)


def _gemm(row: GPUConfig, dtype: str) -> str:
    """fp32 stays with cuBLAS, whose use of TF32 is the user's switch
    (torch.backends.cuda.matmul.allow_tf32)."""
    return "cublas" if dtype == "float32" else row.gemm


def slices(total: int, width: int, itemsize: int, limit: int) -> list[slice]:
    """Ranges of `total` rows (or columns) of `width` elements, as few and equal as `limit` bytes allow;
    multiples of 128 but the last."""
    most = max(limit // (width * itemsize) // 128 * 128, 128)
    count = -(-total // most)
    step = -(-total // count)
    step = total if count == 1 else -(-step // 128) * 128
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of `sizes`, in order, in runs that sum up to at most `limit`, or are single."""
    out: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if not out or total + size > limit:
            out.append([])
            total = 0
        out[-1].append(i)
        total += size
    return out
