"""Negative transfer: whether pretrained weights help on a task, hurt, or make no difference that a given
budget shows.

Three arms get the same data, steps and learning-rate search: the pretrained weights, random ones with the
same moments tensor by tensor, and the pretrained ones shuffled within each tensor. Curves are compared, not
end points: given long enough, training from scratch catches up (He, Girshick and Dollar, 2019). All
parameters are trained, as adapters on a frozen random base would be no rival.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .controls import copy_first, matched_random, shuffled
from .intervals import Interval, over_runs, paired_runs
from .tasks import Score, Task

__all__ = ["Arm", "NegativeReport", "Run", "arms_of", "compare_arms", "cost", "negative_transfer"]

Arm = Callable[[int], nn.Module]
_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its scores on the test set after so many training examples."""

    arm: str
    seed: int
    rate: float
    examples: tuple[int, ...]
    scores: tuple[Score, ...]

    @property
    def area(self) -> float:
        """The mean loss over the budget: the area under the curve divided by its width.

        It begins at the first evaluation after training began: before, the loss is that of an untrained head.
        """
        loss, x = [score.loss for score in self.scores[1:]], self.examples[1:]
        pieces = [(b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], loss, loss[1:], strict=False)]
        return sum(pieces) / (x[-1] - x[0])

    def reaches(self, loss: float) -> float:
        """After how many examples the loss was first at most so much, interpolated; infinite where it never
        was.
        """
        values = [score.loss for score in self.scores]
        for index, value in enumerate(values):
            if value <= loss:
                if index == 0:
                    return float(self.examples[0])
                before, start, end = values[index - 1], self.examples[index - 1], self.examples[index]
                return start + (end - start) * (before - loss) / (before - value)
        return math.inf


@dataclass(frozen=True)
class NegativeReport:
    """The runs of all arms, and what they say of one arm against another on the seeds they share."""

    runs: tuple[Run, ...]
    seconds: float

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, by seed."""
        found = sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)
        if not found:
            raise ValueError(
                f"arm: got {arm!r}, expected one of {tuple(dict.fromkeys(run.arm for run in self.runs))}"
            )
        return found

    def gain(self, arm: str = "pretrained", against: str = "random", *, of: str = "area") -> Interval:
        """The paired difference in favour of `arm`: of the mean loss over the budget ("area"), or the last
        loss, accuracy, ece, brier.

        Positive: `arm` is better, by less loss, a greater accuracy, a smaller calibration error.
        """
        sign = 1 if of == "accuracy" else -1
        ours, theirs = ([_value(run, of) for run in self.of(name)] for name in (arm, against))
        return paired_runs([sign * value for value in ours], [sign * value for value in theirs])

    def verdict(self, arm: str = "pretrained", against: str = "random") -> str:
        """ "helps", "hurts" or "cannot tell", by the 95 % interval of the area between the curves."""
        return {1: "helps", -1: "hurts", 0: "cannot tell"}[self.gain(arm, against).sign]

    def worth(self, arm: str = "pretrained", against: str = "random") -> tuple[float, bool]:
        """How many times the data the arm is worth, and whether that is a bound.

        The examples that `against` needed for the loss both reach, divided by those that `arm` needed: the
            geometric mean over seeds.
        A bound (at least, above 1; at most, below) where the faster arm was there before its first
        evaluation.
        """
        logs, bound = [], False
        for ours, theirs in zip(self.of(arm), self.of(against), strict=True):
            common = max(min(score.loss for score in run.scores) for run in (ours, theirs))
            needed = [run.reaches(common) for run in (ours, theirs)]
            floor = [float(run.examples[1]) for run in (ours, theirs)]
            bound = bound or (min(needed) < min(floor) and needed[0] != needed[1])
            logs.append(math.log(max(needed[1], floor[1]) / max(needed[0], floor[0])))
        return math.exp(sum(logs) / len(logs)), bound

    def describe(self, arm: str = "pretrained", against: str = "random") -> str:
        """The verdict with its numbers, in a sentence or two."""
        word = {"helps": "help", "hurts": "hurt"}.get(self.verdict(arm, against))
        gain, last = self.gain(arm, against), self.gain(arm, against, of="loss")
        value, bound = self.worth(arm, against)
        opening = (
            f"{_named(arm)} {word} against {against} ones"
            if word
            else f"Cannot tell whether {_named(arm).lower()} help or hurt"
        )
        times = f"{'at least ' if value > 1 else 'at most '}" if bound else ""
        return (
            f"{opening}: mean loss over the budget lower by {gain} nats, at its end by {last}; worth"
            f" {times}{value:.1f} times the data ({gain.count} seeds)."
        )

    def table(self) -> str:
        """The arms as a table of Markdown."""
        head = "| arm | learning rate | mean loss over the budget | last loss | accuracy | ECE | Brier |"
        lines = [head, "|---|--:|--:|--:|--:|--:|--:|"]
        arms = list(dict.fromkeys(run.arm for run in self.runs))
        for arm in arms:
            runs = self.of(arm)
            cells = [
                _cell([_value(run, of) for run in runs])
                for of in (
                    "area",
                    "loss",
                    "accuracy",
                    "ece",
                    "brier",
                )
            ]
            lines.append(f"| {arm} | {runs[0].rate:g} | " + " | ".join(cells) + " |")
        said = [self.describe(arm, "random") for arm in arms if arm != "random"] if "random" in arms else []
        return "\n".join([*lines, "", *said])

    def draw(self, axes: Any) -> None:
        """The mean curve of each arm with its standard error."""
        for arm in dict.fromkeys(run.arm for run in self.runs):
            runs = self.of(arm)
            points = [over_runs([run.scores[i].loss for run in runs]) for i in range(len(runs[0].scores))]
            means, errors = (
                [point.mean for point in points],
                [point.se if point.count > 1 else 0.0 for point in points],
            )
            (line,) = axes.plot(runs[0].examples, means, marker=".", label=arm)
            low, high = ([m + side * e for m, e in zip(means, errors, strict=True)] for side in (-1, 1))
            axes.fill_between(runs[0].examples, low, high, color=line.get_color(), alpha=0.2)
        arms = {run.arm for run in self.runs}
        title = self.describe().split(":")[0] if {"pretrained", "random"} <= arms else "Loss by examples"
        axes.set(xlabel="training examples", ylabel="held-out loss, nats (± s.e.)", title=title)
        axes.legend()


def _value(run: Run, of: str) -> float:
    if of not in ("area", "loss", "accuracy", "ece", "brier"):
        raise ValueError(f"of: got {of!r}, expected area, loss, accuracy, ece or brier")
    value = run.area if of == "area" else getattr(run.scores[-1], of)
    return math.nan if value is None else value


def _cell(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "-"
    mean = over_runs(values)
    return f"{mean.mean:.4f} ± {mean.se:.4f}"


def _named(arm: str) -> str:
    return {"pretrained": "The pretrained weights", "shuffled": "Shuffled weights"}.get(
        arm,
        f"The weights of arm '{arm}'",
    )


def arms_of(model: nn.Module, *, head: Sequence[str] = (), depths: Sequence[int] = ()) -> dict[str, Arm]:
    """The arms "pretrained", "random" and "shuffled", and "first n" of each n of `depths`, whose other layers
    are random.

    Args:
        head: prefixes of the names of the parameters that are new for the task: drawn anew for each seed,
            alike in all arms.
    """
    arms: dict[str, Arm] = {
        "pretrained": lambda seed: _with_head(copy.deepcopy(model), head, seed),
        "random": lambda seed: _with_head(matched_random(model, seed=seed, keep=head), head, seed),
        "shuffled": lambda seed: _with_head(shuffled(model, seed=seed, keep=head), head, seed),
    }
    for n in depths:
        arms[f"first {n}"] = lambda seed, n=n: _with_head(
            copy_first(model, matched_random(model, seed=seed, keep=head), n),
            head,
            seed,
        )
    return arms


def _with_head(model: nn.Module, head: Sequence[str], seed: int) -> nn.Module:
    """A new head of the usual scale: a smaller one would slow the arms whose features are still to be
    learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if head and name.startswith(tuple(head)):
                draw = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                parameter.copy_(draw if parameter.dim() > 1 else torch.zeros_like(draw))
    return model.requires_grad_(True)


def negative_transfer(
    model: nn.Module, task: Task, *, head: Sequence[str] = (), depths: Sequence[int] = (), **options: Any
) -> NegativeReport:
    """Train the three arms of `model` (and partial transfer of the first n layers) on a task and compare
    them; `compare_arms`' options.
    """
    return compare_arms(arms_of(model, head=head, depths=depths), task, **options)


def compare_arms(
    arms: Mapping[str, Arm],
    task: Task,
    *,
    steps: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = _RATES,
    range_steps: int | None = None,
    evaluations: int = 8,
    budget: float = 600.0,
    progress: bool = False,
) -> NegativeReport:
    """Train each arm with each seed for `steps` steps of AdamW (a tenth warm-up, cosine to zero) at its own
    best learning rate.

    The rate is the one of `rates` with the least validation loss after `range_steps` (default: a fifth of the
    steps) with a seed of its own; the test set plays no part. Before anything is trained the cost is measured
    on a few steps and printed.

    Raises: InputError where it would take more than `budget` seconds, with what would fit; for fewer than two
    seeds.
    Source: Wang, Dai, Poczos and Carbonell, 2019, Characterizing and Avoiding Negative Transfer, section 3
    (same algorithm and budget).
    """
    if len(set(seeds)) < 2:
        raise InputError(f"seeds: got {tuple(seeds)}, at least two are needed for an interval")
    if steps < 2 or evaluations < 2:
        raise InputError(f"steps and evaluations must be at least 2, got {steps} and {evaluations}")
    searched = (range_steps or max(2, steps // 5)) if len(rates) > 1 else 0
    seconds, text = cost(
        arms,
        task,
        steps=steps,
        seeds=len(seeds),
        rates=len(rates),
        range_steps=searched,
        evaluations=evaluations,
    )
    print(text, file=sys.stderr)
    if seconds > budget:
        raise InputError(
            f"{text}, more than the budget of {budget:.0f} s: about {max(2, int(steps * budget / seconds))}"
            " steps would fit; or give a larger budget, a smaller model, or fewer seeds or rates. Of a large"
            " model compare probes instead (where_to_cut's random twin)"
        )
    bar = _bar(len(arms) * (len(seeds) * steps + len(rates) * searched), progress)
    start, runs = time.perf_counter(), []
    for name, make in arms.items():
        rate = _best_rate(make, task, rates, searched, bar)
        runs += [_run(name, make, task, seed, rate, steps, evaluations, bar) for seed in seeds]
    bar.close()
    return NegativeReport(tuple(runs), time.perf_counter() - start)


def cost(
    arms: Mapping[str, Arm],
    task: Task,
    *,
    steps: int,
    seeds: int,
    rates: int,
    range_steps: int,
    evaluations: int,
) -> tuple[float, str]:
    """The seconds a comparison will take, from two timed steps and one timed evaluation batch, and a line
    that says so.
    """
    model = next(iter(arms.values()))(0).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    times = [_timed_step(model, task, optimizer, step, device) for step in range(3)]
    rows = min(4 * task.batch_size, len(task.test[1]))
    part = ({name: value[:rows] for name, value in task.test[0].items()}, task.test[1][:rows])
    begin = time.perf_counter()
    task.score(model, part)
    scoring = (time.perf_counter() - begin) * len(task.test[1]) / rows
    total = len(arms) * (seeds * steps + rates * range_steps)
    seconds = total * min(times[1:]) + len(arms) * seeds * (evaluations + 1) * scoring
    counts = f"{len(arms)} arms x ({seeds} seeds x {steps} steps + {rates} rates x {range_steps} steps)"
    return seconds, f"{counts} = {total} steps, about {seconds:.0f} s"


def _timed_step(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    step: int,
    device: torch.device,
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    _step(model, task, optimizer, 0, step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _step(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
    loss = task.loss(model, task.batch(seed, step, next(model.parameters()).device))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _best_rate(make: Arm, task: Task, rates: Sequence[float], steps: int, bar: Any) -> float:
    if len(rates) == 1:
        return rates[0]
    losses = {}
    for rate in rates:
        model = make(-1).train()
        for _ in _trained(model, task, -1, rate, steps, bar):
            pass
        loss = task.score(model, task.validation).loss
        losses[rate] = loss if math.isfinite(loss) else math.inf
    return min(losses, key=lambda rate: losses[rate])


def _trained(model: nn.Module, task: Task, seed: int, rate: float, steps: int, bar: Any) -> Any:
    """Train step by step, yielding the number of steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                rate
                * min(
                    1.0,
                    (step + 1) / max(1, steps // 10),
                )
                * (1 + math.cos(math.pi * step / steps))
                / 2
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout
            _step(model, task, optimizer, seed, step)
        bar.update()
        yield step + 1


def _run(
    name: str,
    make: Arm,
    task: Task,
    seed: int,
    rate: float,
    steps: int,
    evaluations: int,
    bar: Any,
) -> Run:
    model = make(seed).train()
    marks = {round(index * steps / evaluations) for index in range(1, evaluations + 1)}
    examples, scores = [0], [task.score(model, task.test)]
    for done in _trained(model, task, seed, rate, steps, bar):
        if done in marks:
            examples.append(done * task.batch_size)
            scores.append(task.score(model, task.test))
    return Run(name, seed, rate, tuple(examples), tuple(scores))


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="arms", unit="step", disable=not progress)
