"""The record of a run: one JSON line a step, a progress bar, a loss curve."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .memory import current_memory, peak_memory

__all__ = ["MetricsCallback", "plot_loss", "read_metrics", "truncate_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; one that a killed process left unfinished is ignored."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to `step`, so that a resumed run writes no step twice; returns them."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_name(f".incomplete-{path.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return rows


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl and drives the progress bar; `tokens` is set by the trainer before each step ends."""

    def __init__(self, path: Path, earlier: list[dict[str, Any]], *, quiet: bool = False) -> None:
        self.path = path
        self.rows = earlier
        self.quiet = quiet
        self.tokens = 0
        self._wall_before = earlier[-1]["wall"] if earlier else 0.0
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin = self._step_begin = time.perf_counter()
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step", disable=self.quiet)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_begin = time.perf_counter()
        self.tokens = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._step_begin

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self.tokens,
            "seconds": self._seconds,
            "tokens_per_second": self.tokens / self._seconds,
            "peak_memory": peak_memory(),
            "wall": self._wall_before + time.perf_counter() - self._begin,
        }
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, {current_memory() / 2**30:.2f} GiB", refresh=False
        )
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal's line in order, also after an error."""
        if self._bar is not None:
            self._bar.close()


def plot_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the loss over steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, alpha=0.35, label="each step")
    window = max(1, len(rows) // 10)
    smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="Fine-tuning loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
