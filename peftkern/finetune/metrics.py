"""The record of a run: one JSON line a step, a progress bar, a loss curve."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..files import TEMP_PREFIX
from .memory import current_memory, peak_memory

__all__ = ["MetricsCallback", "RandomState", "plot_loss", "read_metrics", "restore_metrics"]


_ROW = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory",
    "wall",
)


# What a run with --source-data has besides, in nats per token but for the weight.
_FORGETTING = ("forgetting", "forgetting_weight", "source_rise", "source_rise_error", "target_loss")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line up to the first that is none: a killed process leaves its last one unfinished."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or any(key not in row for key in _ROW) or row["step"] != len(rows) + 1:
            break
        rows.append(row)
    return rows


def restore_metrics(
    path: Path, step: int, logged: list[dict[str, Any]], *, write: bool = True
) -> tuple[list[dict[str, Any]], int]:
    """Keep the lines up to `step`, so that a resumed run writes no step twice; returns them, and how many of
    them were lost.

    For a lost line stands what the trainer `logged` of that step, with no tokens and no time. write: False in
    a process that only reads along.
    """
    rows = read_metrics(path)[:step]
    known, lost = {entry.get("step"): entry for entry in logged if "loss" in entry}, step - len(rows)
    for number in range(len(rows) + 1, step + 1):
        entry = known.get(number, {})
        row = dict.fromkeys(_ROW, 0) | {
            "step": number,
            "loss": entry.get("loss", math.nan),
            "lr": entry.get("learning_rate", math.nan),
        }
        rows.append(
            row
            | {
                "epoch": entry.get("epoch", 0.0),
                "grad_norm": entry.get("grad_norm"),
                "wall": rows[-1]["wall"] if rows else 0.0,
            }
        )
    if write:
        _write(path, rows)
    return rows, lost


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f"{TEMP_PREFIX}{path.name}")
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path}: {error}. Check the free disk space and the permissions"
        ) from error


class RandomState:
    """The state of every generator that training draws from, as it is now."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = (
            random.getstate(),
            numpy.random.get_state(),
            torch.get_rng_state(),
        )
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Put the generators back to it."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl and drives the progress bar; `tokens` is set by the trainer before each step
    ends."""

    def __init__(
        self, path: Path, earlier: list[dict[str, Any]], *, quiet: bool = False, write: bool = True
    ) -> None:
        self.path = path
        self.rows = earlier
        self.quiet = quiet
        self.write = write
        self.tokens = 0
        self.random_state = RandomState()
        self._wall_before = earlier[-1]["wall"] if earlier else 0.0
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # each process drops out other elements; the order of the rows is drawn already
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)
        self._begin = self._step_begin = time.perf_counter()
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="Training", unit="step", disable=self.quiet
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_begin = time.perf_counter()
        self.tokens = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = time.perf_counter() - self._step_begin
        self.random_state = RandomState()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
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
        row |= {name: value for name, value in logs.items() if name in _FORGETTING}
        self.rows.append(row)
        if self.write:
            self._append(row)
        forgotten = f", forgets {row['forgetting']:.3f} nats" if "forgetting" in row else ""
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}{forgotten}, {row['tokens_per_second']:.0f} tok/s, "
            f"{current_memory() / 2**30:.2f} GiB",
            refresh=False,
        )
        self._bar.update(state.global_step - self._bar.n)

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(
                f"could not write {self.path}: {error}. Free some disk space, then go on with --resume"
            ) from error

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
    smooth = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
    axes.plot(steps, smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="Fine-tuning loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
