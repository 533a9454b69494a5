"""All checks of a set of rows, what to leave out of it, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...files import atomic_files
from .duplicates import Duplicates, near_duplicates
from .labels import LabelNoise
from .losses import RowLosses
from .overlap import Overlap, overlap
from .recorded import RowDynamics
from .rows import DataRows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CHECKS", "DataReport", "check_texts", "write_report", "write_rows"]

CHECKS = ("duplicates", "overlap", "labels", "losses", "dynamics")
_SHOWN = 10  # rows of each kind in the report
_WIDTH = 100  # characters of a row in it


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What the checks found in `rows`; None for a check that was not made. `percentile`: of the losses, for
    `reasons`."""

    rows: DataRows
    duplicates: Duplicates | None = None
    overlap: Overlap | None = None
    labels: LabelNoise | None = None
    losses: RowLosses | None = None
    dynamics: RowDynamics | None = None
    percentile: float = 99.0

    def made(self) -> dict[str, Any]:
        """The checks that were made, by name."""
        return {name: found for name in CHECKS if (found := getattr(self, name)) is not None}

    def reasons(self, checks: Sequence[str]) -> dict[int, str]:
        """The rows that these checks leave out, each with the reason.

        Raises: InputError for a check that was not made, or where nothing would be left.
        """
        for name in checks:
            if name not in self.made():
                raise InputError(f"--filter {name}: that check was not made; {_needs(name)}")
        found: dict[int, str] = {}
        for name in checks:
            for row, reason in self._rows(name):
                found.setdefault(row, reason)
        if len(found) == len(self.rows):
            raise InputError(
                f"--filter {' '.join(checks)} would leave none of {len(self.rows)} rows: filter by fewer"
                " checks"
            )
        return found

    def _rows(self, name: str) -> Iterable[tuple[int, str]]:
        places = self.rows.places
        if name == "duplicates":
            for item in self.duplicates.dropped:
                yield (
                    item.row,
                    f"near duplicate of {places[item.kept]} (Jaccard similarity {item.similarity:.2f})",
                )
        elif name == "overlap":
            for row in self.overlap.training:
                yield row, "holds text of the evaluation"
        elif name == "labels":
            suggested = self.labels.suggested.tolist()
            for row in self.labels.suspects:
                yield row, f"label {self.rows.labels[row]!r}, rather {suggested[row]!r}"
        elif name == "dynamics":
            for row in self.dynamics.above(self.percentile):
                yield row, self.dynamics.course(row)
        else:
            for row in self.losses.above(self.percentile):
                yield row, f"{self.losses.nats[row]:.2f} nats a token"

    def to_markdown(self) -> str:
        """A page for people: each verdict, and the first rows that it is about."""
        lines = ["# What is in the data", "", f"{len(self.rows)} rows", ""]
        for name, found in self.made().items():
            lines += [f"## {_TITLES[name]}", "", f"{found.verdict[0].upper()}{found.verdict[1:]}.", ""]
            listed = list(self._rows(name))
            if listed:
                lines += ["| row | why | text |", "|---|---|---|"]
                lines += [
                    _line(self.rows.places[row], why, self.rows.texts[row]) for row, why in listed[:_SHOWN]
                ]
                lines += ["", f"... and {len(listed) - _SHOWN} more.", ""] if len(listed) > _SHOWN else [""]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: verdicts, and every row that a check is about."""
        checks = {
            name: {
                "verdict": found.verdict,
                "rows": [
                    {"row": row, "place": self.rows.places[row], "why": why} for row, why in self._rows(name)
                ],
            }
            for name, found in self.made().items()
        }
        if self.labels is not None:
            noise = self.labels
            checks["labels"] |= {
                "rate": noise.rate,
                "low": noise.low,
                "high": noise.high,
                "joint": noise.joint.tolist(),
            }
            checks["labels"]["classes"] = list(noise.classes)
        return {"rows": len(self.rows), "checks": checks}

    def draw(self, axes: Sequence[Axes]) -> None:
        """One plot a check, on as many axes as `made` has checks."""
        for found, place in zip(self.made().values(), axes, strict=True):
            found.draw(place)


_TITLES = {
    "duplicates": "Near duplicates",
    "overlap": "Training text in the evaluation",
    "labels": "Labels",
    "losses": "Losses",
    "dynamics": "Loss dynamics",
}


def _needs(name: str) -> str:
    return {
        "overlap": "it needs --eval-data",
        "labels": "it needs --label, the key of the rows' labels",
        "losses": "it needs --adapter or --model, under which to take the losses",
        "dynamics": "it needs --row-losses, which a run with `finetune --row-losses` writes",
    }.get(name, f"it is one of {', '.join(CHECKS)}")


def _line(place: str, why: str, text: str) -> str:
    short = text if len(text) <= _WIDTH else text[:_WIDTH] + "…"
    return (
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in (place, why, short)) + " |"
    )


def check_texts(
    rows: DataRows,
    evaluation: Sequence[str] = (),
    *,
    threshold: float = 0.8,
    size: int = 5,
    unit: str = "words",
    run: int = 13,
    coverage: float = 0.5,
    progress: bool = False,
) -> DataReport:
    """The checks that need no model: near duplicates among the rows, and their overlap with the evaluation's
    texts."""
    repeated = near_duplicates(rows.texts, threshold=threshold, size=size, unit=unit, progress=progress)
    shared = overlap(rows.texts, evaluation, run=run, threshold=coverage) if len(evaluation) else None
    return DataReport(rows=rows, duplicates=repeated, overlap=shared)


def write_rows(path: Path, rows: DataRows, leave_out: Iterable[int]) -> int:
    """Write the other rows as JSON lines, with all keys they were read with, whole or not at all; returns how
    many.

    Raises: OSError where it cannot be written.
    """
    out = set(leave_out)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n" for index, row in enumerate(rows.rows) if index not in out
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files(path.parent) as temporary:
        (temporary / path.name).write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_report(folder: Path, report: DataReport) -> None:
    """Write report.md, report.json and report.png to the folder, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = report.made()
    figure = Figure(figsize=(8, 3.2 * len(made)), layout="constrained")
    FigureCanvasAgg(figure)
    report.draw(list(figure.subplots(len(made), 1, squeeze=False)[:, 0]))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files(folder) as temporary:
        (temporary / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (temporary / "report.json").write_text(
            json.dumps(report.to_dict(), indent=2, default=str),
            encoding="utf-8",
        )
        figure.savefig(temporary / "report.png", dpi=110)
