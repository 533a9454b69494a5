"""Which CPU regime a QLoRA linear takes: pure functions over a table, testable on any machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Choice", "Config", "TABLE", "choose"]


@dataclass(frozen=True)
class Config:
    """Limits of one ISA. `gemv_max_m`: largest M for the fused GEMV; `vendor_dtypes`: activations whose large-M product goes, slice by
    slice, to the vendor GEMM; `slice_rows`: rows decoded per slice there."""

    gemv_max_m: int
    vendor_dtypes: tuple[str, ...]
    slice_rows: int
    measured: str


TABLE = {
    "baseline": Config(4, (), 512, "not measured"),
    "avx2": Config(16, (), 512, "not measured"),
    "avx512": Config(4, ("bfloat16",), 512, "not measured"),
}


@dataclass(frozen=True)
class Choice:
    """`regime`: "gemv", "gemm" (our kernel, decode fused with the product) or "vendor" (decoded slices + torch.mm)."""

    regime: str
    why: str


def choose(*, dtype: str, isa: str, m: int, n: int, k: int) -> Choice:
    """The regime for x [m, k] of `dtype` ("bfloat16", ...) on `isa`; an unknown ISA takes the baseline's row."""
    row = TABLE.get(isa, TABLE["baseline"])
    if m <= row.gemv_max_m:
        return Choice("gemv", f"M = {m} <= {row.gemv_max_m} on {isa}, {row.measured}")
    if dtype in row.vendor_dtypes:
        return Choice("vendor", f"{dtype} on {isa} has a fast vendor GEMM, {row.measured}")
    return Choice("gemm", f"M = {m} > {row.gemv_max_m} on {isa}, {row.measured}")
