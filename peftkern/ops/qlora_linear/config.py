"""Which CPU regime a QLoRA linear takes: pure functions over a table, testable on any machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Choice", "Config", "TABLE", "choose"]


@dataclass(frozen=True)
class Config:
    """Limits of one ISA.

    gemv_max_m: largest M for the fused GEMV. vendor: activation dtypes whose large-M product goes, slice by slice, to the vendor's GEMM;
    slice_rows: rows decoded a slice there. dense_vendor: for a dense weight, the largest M a dtype takes to the vendor (None: any).
    """

    gemv_max_m: int
    vendor: tuple[str, ...]
    slice_rows: int
    dense_vendor: dict[str, int | None]
    measured: str


_NAIVE_HALF = {"float32": None, "bfloat16": 1, "float16": 1}
TABLE = {
    "baseline": Config(4, (), 512, _NAIVE_HALF, "not measured"),
    # Zen 3, 2 cores, fp32, GEMV against GEMM in ms: 4096 x 4096 at M = 8 4.45, 5.18, at M = 16 6.80, 5.03;
    # 1536 x 576 at M = 8 0.41, 0.49, at M = 16 0.62, 0.49.
    # torch's bf16 dx of 4096 x 4096 at M = 512 took 58 s in the one call made, its fp32 0.12 s.
    "avx2": Config(8, (), 512, _NAIVE_HALF, "measured on Zen 3"),
    "avx512": Config(4, ("bfloat16",), 512, {"float32": None, "bfloat16": None, "float16": 1}, "not measured"),
}


@dataclass(frozen=True)
class Choice:
    """`regime`: "gemv", "gemm" (our kernel, decode fused with the product) or "vendor" (torch.mm, on decoded slices of a 4-bit weight)."""

    regime: str
    why: str


def choose(*, dtype: str, isa: str, m: int, n: int, k: int, dense: bool = False) -> Choice:
    """The regime for x [m, k] of `dtype` ("bfloat16", ...) on `isa`; an unknown ISA takes the baseline's row."""
    row = TABLE.get(isa, TABLE["baseline"])
    if dense:
        limit = row.dense_vendor[dtype]
        if limit is None or m <= limit:
            return Choice("vendor", f"the vendor's {dtype} product is fast on a dense weight at M = {m} on {isa}")
        return Choice("gemm", f"the vendor's {dtype} product is slow at M = {m} on {isa}, {row.measured}")
    if m <= row.gemv_max_m:
        return Choice("gemv", f"M = {m} <= {row.gemv_max_m} on {isa}, {row.measured}")
    if dtype in row.vendor:
        return Choice("vendor", f"{dtype} on {isa} has a fast vendor GEMM, {row.measured}")
    return Choice("gemm", f"M = {m} > {row.gemv_max_m} on {isa}, {row.measured}")
