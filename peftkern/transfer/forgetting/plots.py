"""Both losses over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .guard import ForgettingGuard

__all__ = ["draw_layers", "draw_losses", "draw_rise", "plot_forgetting"]

_TARGET, _SOURCE = "tab:blue", "tab:red"


def draw_losses(axes: Axes, guard: ForgettingGuard) -> None:
    """The losses on held-out target and source text over the steps."""
    points = guard.front.points
    steps = [point.step for point in points]
    before = guard.before.mean
    axes.plot(steps, [point.target for point in points], marker="o", color=_TARGET, label="target")
    axes.plot(
        [0, *steps],
        [before, *(before + point.rise for point in points)],
        marker="o",
        color=_SOURCE,
        label="source",
    )
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)", title=_title(guard))
    axes.legend()
    axes.grid(alpha=0.3)


def draw_rise(axes: Axes, guard: ForgettingGuard, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """What was forgotten, with standard errors, beside the forecast of every step and the budget."""
    points = guard.front.points
    axes.errorbar(
        [0, *(point.step for point in points)],
        [0.0, *(point.rise for point in points)],
        [0.0, *(point.standard_error for point in points)],
        marker="o",
        capsize=3,
        color=_SOURCE,
        label="measured, with its standard error",
    )
    forecast = [(row["step"], row["forgetting"]) for row in rows if "forgetting" in row]
    if forecast:
        axes.plot(*zip(*forecast, strict=True), color="tab:gray", label="forecast without source data")
    if guard.budget is not None:
        axes.axhline(guard.budget.nats, color="black", linestyle="--", label="budget")
    axes.set(xlabel="step", ylabel="rise of the source loss (nats per token)", title="What was forgotten")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_layers(axes: Axes, by_layer: Mapping[str, float]) -> None:
    """Where the forecast comes from: the nats of each of the model's layers, from
    `DeltaPenalty.by_layer()`."""
    depths: dict[int, float] = {}
    for name, value in by_layer.items():
        depth = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        depths[depth] = depths.get(depth, 0.0) + value
    axes.bar(list(depths), list(depths.values()), color="tab:gray")
    most = max(depths, key=lambda depth: depths[depth])
    axes.set(
        xlabel="layer",
        ylabel="forecast (nats per token)",
        title=f"Layer {most} forgets most, by the forecast",
    )


def plot_forgetting(guard: ForgettingGuard, path: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write both as one PNG; `rows` are the lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_losses(left, guard)
    draw_rise(right, guard, rows)
    figure.savefig(path, format="png", dpi=120)


def _title(guard: ForgettingGuard) -> str:
    first, last = guard.front.points[0], guard.front.points[-1]
    change = last.target - first.target
    verb = "fell" if change < 0 else "rose"
    return (
        f"From step {first.step} to {last.step} the target loss {verb} by {abs(change):.3f}; the source lost"
        f" {last.rise:+.3f}"
    )
