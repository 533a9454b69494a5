"""The runs of examples/transfer/forgetting.py as a table, and its two plots: the frontier of target and
source, and the forecast against what was measured.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Row", "arms", "mean_error", "plot", "read", "write"]

COLORS = {
    "nothing": "black",
    "EWC": "tab:blue",
    "L2-SP": "tab:orange",
    "replay": "tab:green",
    "budget": "tab:red",
}


@dataclass(frozen=True)
class Row:
    """One measurement: losses and rises in nats per token; forecasts before calibration; terms of the
    expansion on source text."""

    method: str
    strength: float
    weight: float
    seed: int
    target_loss: float
    source_rise: float
    source_rise_error: float
    forecast: float
    distance: float
    linear: float
    fisher: float
    blocks: float
    diagonal: float
    seconds: float


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    kinds = {field.name: {"str": str, "float": float, "int": int}[field.type] for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(
            {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()} for row in rows
        )


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; 0 for a single one."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def arms(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """The runs of each method and strength."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row.method, row.strength].append(row)
    return dict(grouped)


def calibrated(rows: Sequence[Row]) -> tuple[float, float]:
    """The slope through the origin of measured on forecast rises, and their correlation."""
    forecast, measured = [row.forecast for row in rows], [row.source_rise for row in rows]
    slope = sum(f * m for f, m in zip(forecast, measured, strict=True)) / sum(f * f for f in forecast)
    return slope, statistics.correlation(forecast, measured) if len(rows) > 1 else float("nan")


def plot(rows: Sequence[Row], folder: Path, name: str) -> None:
    """The frontier and the forecast."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    draw_frontier(figure.subplots(), rows)
    figure.savefig(folder / f"{name}_frontier.png", dpi=120)
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    draw_forecast(figure.subplots(), rows)
    figure.savefig(folder / f"{name}_forecast.png", dpi=120)


def draw_frontier(axes: Any, rows: Sequence[Row]) -> None:
    for method, color in COLORS.items():
        points = sorted((strength, runs) for (name, strength), runs in arms(rows).items() if name == method)
        values = [
            [mean_error([getattr(row, n) for row in runs]) for n in ("source_rise", "target_loss")]
            for _, runs in points
        ]
        xs, ys = ([pair[side][0] for pair in values] for side in (0, 1))
        errors = [[pair[side][1] for pair in values] for side in (0, 1)]
        axes.errorbar(xs, ys, errors[1], errors[0], marker="o", capsize=3, color=color, label=method)
        for x, y, (strength, _) in zip(xs, ys, points, strict=True):
            axes.annotate(
                f"{strength:g}" if strength else "",
                (x, y),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(
        xlabel="forgotten of Python's reference (nats per token)",
        ylabel="loss on held-out King James (nats per token)",
        title=verdict(rows),
    )
    axes.legend(title="strength beside the mark")
    axes.grid(alpha=0.3)


def frontier(rows: Sequence[Row], method: str) -> list[tuple[float, float]]:
    """A method's mean (source rise, target loss) at each strength, by rise."""
    runs = [each for (name, _), each in arms(rows).items() if name == method]
    return sorted(
        tuple(statistics.mean(getattr(row, n) for row in each) for n in ("source_rise", "target_loss"))
        for each in runs
    )


def verdict(rows: Sequence[Row]) -> str:
    """Whether EWC's frontier, straight between its points, lies below L2-SP's points."""
    ewc, gaps = frontier(rows, "EWC"), []
    for x, y in frontier(rows, "L2-SP"):
        for (left, high), (right, low) in zip(ewc, ewc[1:], strict=False):
            if left <= x <= right:
                gaps.append(y - high - (low - high) * (x - left) / (right - left))
    if not gaps:
        return "EWC and L2-SP forget different amounts here"
    where = "below" if min(gaps) > 0 else "above" if max(gaps) < 0 else "across"
    return f"EWC's frontier lies {where} L2-SP's: {statistics.mean(gaps):+.3f} nats between them"


def draw_forecast(axes: Any, rows: Sequence[Row]) -> None:
    slope, correlation = calibrated(rows)
    for method, color in COLORS.items():
        of = [row for row in rows if row.method == method]
        values = [
            [getattr(row, name) for row in of] for name in ("forecast", "source_rise", "source_rise_error")
        ]
        axes.errorbar(*values, linestyle="none", marker="o", capsize=3, color=color, label=method)
    most = max(row.forecast for row in rows)
    axes.plot(
        [0, most],
        [0, slope * most],
        color="black",
        linestyle="--",
        label=f"measured = {slope:.1f} x forecast",
    )
    axes.set(
        xlabel="forecast: factored Fisher (nats per token)",
        ylabel="measured on held-out source (nats per token)",
        title=f"Forecast and measured forgetting correlate by {correlation:.2f}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
