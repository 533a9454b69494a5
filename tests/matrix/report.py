"""The matrix as a file of data and as a page."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from .rows import Result

__all__ = ["page", "read", "write"]

_FIELDS = [field.name for field in dataclasses.fields(Result)]
_NUMBERS = {"passed": int, "failed": int, "skipped": int, "minutes": float}
_HEAD = """# Compatibility

Which libraries peftkern's tests of patching, recipe, ops, adapters, memory and transfer really ran with.
`python -m tests.matrix` wrote this page and `compatibility.csv` beside it.
Lines are of the commit of their day, which is why the numbers of tests differ.

"avx2" in the column *instructions* means that torch and oneDNN were held to AVX2 by `ATEN_CPU_CAPABILITY` and
`ONEDNN_MAX_CPU_ISA`, and that tests which prove nothing about numbers (marked `any_isa`) were left out;
"native" means that they took whatever the CPU has. peftkern's own kernels run on every level of the CPU in
both.

| torch | transformers | PEFT | bitsandbytes | TRL | Python | CPU | instructions \
| passed | failed | skipped | minutes |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def read(path: Path) -> list[Result]:
    """The lines of an earlier record; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Result(**{name: _NUMBERS.get(name, str)(row[name]) for name in _FIELDS}) for row in rows]


def write(path: Path, results: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """The record with the new lines in it, each in the place of an earlier one of its key; returns it,
    sorted."""
    merged = {result.key: result for result in (*results, *new)}
    ordered = sorted(merged.values(), key=lambda result: tuple(map(_order, result.key)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in ordered)
    return ordered


def page(results: Iterable[Result]) -> str:
    """The record as Markdown."""
    return _HEAD + "".join(f"| {' | '.join(_cells(result))} |\n" for result in results)


def _cells(result: Result) -> list[str]:
    cells = [*result.key]
    if result.outcome not in ("passed", "failed"):
        return [*cells, result.outcome, "", "", ""]
    return [*cells, str(result.passed), str(result.failed), str(result.skipped), f"{result.minutes:.0f}"]


def _order(version: str) -> tuple[object, ...]:
    """Versions by their numbers, other words by themselves."""
    parts = version.partition("+")[0].split(".")
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)
