"""Where the examples' figures and plots are written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "save_plot", "save_rows"]

RESULTS = Path(__file__).parent / "results"


def save_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the first one's columns to results/`name`.csv; floats with four places."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})


def save_plot(name: str, *drawn: Any) -> None:
    """Draw on one pair of axes (each of `drawn` is called with them) and write results/`name`.png."""
    from matplotlib.figure import Figure

    RESULTS.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for draw in drawn:
        draw(axes)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
