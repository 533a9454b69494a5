"""What a call of `patch` did, module by module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

__all__ = ["PatchReport", "Row", "block_row"]


@dataclass(frozen=True)
class Row:
    """One module that was looked at.

    name     as in `model.named_modules()`
    kind     "lora" (a PEFT LoRA layer) or "linear" (a bare frozen linear)
    base     what the weight is: "nf4, nested", "fp4", "bfloat16", ...
    got      the function it runs now: "qlora_linear", "linear_4bit", "linear"; "stock" where it falls back
    shape    (out_features, in_features), None where unknown
    adapters active adapters, () for a bare linear
    reason   why it falls back; None where it is fused
    note     what else is worth knowing; "" for most modules
    """

    name: str
    kind: str
    base: str
    got: str
    shape: tuple[int, int] | None
    adapters: tuple[str, ...]
    reason: str | None = None
    note: str = ""


def block_row(name: str, kind: str, got: str, reason: str | None = None) -> Row:
    """The row of a module that is no linear: what it runs, or why it keeps its stock forward."""
    return Row(name, kind, "", "stock" if reason else got, None, (), reason)


@dataclass(frozen=True)
class PatchReport:
    """Rows in the model's order; `str(report)` is a table that ends with a summary line."""

    rows: tuple[Row, ...]
    kernels: str

    @property
    def fused(self) -> tuple[Row, ...]:
        """The modules that run peftkern's functions."""
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """The modules that run their stock forward, each with its reason."""
        return tuple(row for row in self.rows if row.reason is not None)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules got what, e.g. {"qlora_linear": 210, "stock": 1}."""
        return dict(Counter(row.got for row in self.rows))

    def __str__(self) -> str:
        head = ("module", "kind", "weight", "shape", "adapters", "runs", "remark")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, self.summary])

    @property
    def summary(self) -> str:
        """One line: how many modules are fused, by what, and how many fall back, why."""
        fused = Counter(row.got for row in self.fused)
        parts = ", ".join(f"{count} {got}" for got, count in fused.items())
        text = (
            f"peftkern: {len(self.fused)} of {len(self.rows)} modules patched ({parts}); kernels: "
            f"{self.kernels}"
        )
        reasons = Counter(row.reason for row in self.fallbacks)
        return text + "".join(f"; {count} stock: {reason}" for reason, count in reasons.items())


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) if row.shape else "-"
    remark = row.note if row.reason is None else row.reason
    return row.name or "(model)", row.kind, row.base, shape, ", ".join(row.adapters) or "-", row.got, remark
