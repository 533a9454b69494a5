"""Cuts tried out: short LoRA runs from each of some layers on, on the task itself, beside the time and memory
of their steps.

The probes of `where_to_cut` need labels and see what a linear classifier sees; these runs need neither, and
cost training.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .cut import StepCost, step_cost
from .depth import below
from .features import layer_stack
from .intervals import Interval, over_runs, paired_runs
from .tasks import Task

__all__ = ["TrainedCut", "TrainedCuts", "trained_cuts"]


@dataclass(frozen=True)
class TrainedCut:
    """Runs that trained the layers from `first` on: held-out loss by seed, the median step and the bytes
    saved for backward.
    """

    first: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    cost: StepCost


@dataclass(frozen=True)
class TrainedCuts:
    """The cuts that were tried, and the loss before training."""

    cuts: tuple[TrainedCut, ...]
    layers: int
    before: float
    steps: int

    def behind(self, cut: TrainedCut) -> Interval:
        """The paired difference in loss of a cut and of the least cut that was tried; positive: the cut costs
        loss.
        """
        return paired_runs(cut.losses, self.cuts[0].losses)

    @property
    def recommended(self) -> TrainedCut:
        """The deepest cut of those before the first that measurably loses."""
        last = self.cuts[0]
        for cut in self.cuts[1:]:
            if self.behind(cut).sign == 1:
                break
            last = cut
        return last

    @property
    def verdict(self) -> str:
        """In words, with what the cut saves."""
        cut, uncut = self.recommended, self.cuts[0]
        if cut is uncut:
            return (
                f"Cut nowhere above {uncut.first}: {self.cuts[1].first} of {self.layers} already loses"
                f" {self.behind(self.cuts[1])} nats."
            )
        return (
            f"Cut at {cut.first} of {self.layers}: after {self.steps} steps its loss cannot be told from an"
            f" uncut run's ({self.behind(cut)} nats); a step takes"
            f" ×{cut.cost.seconds / uncut.cost.seconds:.2f} of the time and keeps"
            f" ×{cut.cost.saved_bytes / uncut.cost.saved_bytes:.2f} of the bytes for backward."
        )

    def table(self) -> str:
        """The cuts as a table of Markdown."""
        lines = [
            "| from layer | held-out loss | s.e. | behind the first | step | saved for backward |",
            "|--:|--:|--:|--:|--:|--:|",
        ]
        for cut in self.cuts:
            loss = over_runs(cut.losses)
            step = f"{cut.cost.seconds:.3f} s (×{cut.cost.seconds / self.cuts[0].cost.seconds:.2f})"
            lines.append(
                f"| {cut.first} | {loss.mean:.4f} | {loss.se:.4f} | {self.behind(cut)} | {step} |"
                f" {cut.cost.saved_bytes / 2**20:.1f} MiB |"
            )
        return "\n".join([*lines, "", f"Before training: {self.before:.4f}. {self.verdict}"])

    def draw(self, axes: Any) -> None:
        """Held-out loss by cut with standard errors, beside the loss before training."""
        points = [over_runs(cut.losses) for cut in self.cuts]
        axes.errorbar(
            [cut.first for cut in self.cuts],
            [p.mean for p in points],
            [p.se for p in points],
            marker="o",
            label="trained",
        )
        axes.axhline(self.before, color="black", linestyle=":", label="before")
        axes.axvline(
            self.recommended.first,
            color="tab:red",
            alpha=0.5,
            label=f"cut at {self.recommended.first}",
        )
        axes.set(
            xlabel="first trained layer",
            ylabel="held-out loss, nats (± s.e.)",
            title=self.verdict.split(":")[0],
        )
        axes.legend()


def trained_cuts(
    model: nn.Module,
    task: Task,
    *,
    firsts: Sequence[int] | None = None,
    steps: int = 30,
    seeds: Sequence[int] = (0, 1, 2),
    rate: float = 1e-3,
    r: int = 8,
    targets: str | Sequence[str] = "all-linear",
    head: Sequence[str] = (),
    budget: float = 600.0,
    progress: bool = False,
) -> TrainedCuts:
    """Train LoRA adapters of the layers from each of `firsts` on, with the same data in the same order for
    each seed, and compare.

    Args:
        model: a dense or 4-bit model without adapters; it is as it was afterwards.
        firsts: in rising order; default: five evenly spaced ones from 0.
        rate, steps: AdamW with a tenth of warm-up and a linear fall to zero.
        targets: PEFT's `target_modules`.
        head: names of modules that are new for the task and trained whole (PEFT's `modules_to_save`).
        budget: seconds; the cost is measured and printed first.
    Raises: InputError above the budget, or for fewer than two seeds or cuts.
    """
    from peft import LoraConfig, get_peft_model

    layers = len(layer_stack(model)[1])
    chosen = (
        sorted(set(firsts))
        if firsts is not None
        else sorted(
            {round(index * layers / 5) for index in range(5)},
        )
    )
    if len(set(seeds)) < 2 or len(chosen) < 2:
        raise InputError(
            f"seeds, firsts: got {tuple(seeds)} and {tuple(chosen)}, at least two of each are needed to"
            " compare"
        )
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = task.score(model, task.test).loss
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, modules_to_save=list(head) or None)
    tuned = get_peft_model(model, config)
    initial = {
        name: parameter.detach().clone()
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    try:
        costs = _costs(tuned, task, chosen, initial)
        seconds = len(seeds) * sum(steps * cost.seconds for cost in costs)
        text = (
            f"{len(chosen)} cuts x {len(seeds)} seeds x {steps} steps, about {seconds:.0f} s and the"
            " evaluations"
        )
        print(text, file=sys.stderr)
        if seconds > budget:
            raise InputError(
                f"{text}, more than the budget of {budget:.0f} s: give fewer steps, cuts or seeds, or a"
                " larger budget"
            )
        cuts = [_tried(tuned, task, cost, initial, steps, seeds, rate, progress) for cost in costs]
    finally:
        _restored(tuned, model, flags)
    return TrainedCuts(tuple(cuts), layers, before, steps)


def _restored(tuned: Any, model: nn.Module, flags: dict[str, bool]) -> None:
    """Take the adapters out again."""
    tuned.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    if hasattr(model, "peft_config"):
        del model.peft_config


def _costs(model: nn.Module, task: Task, firsts: Sequence[int], initial: dict[str, Any]) -> list[StepCost]:
    device = next(model.parameters()).device
    inputs, labels = task.batch(0, 0, device)
    costs = []
    for first in firsts:
        _reset(model, initial, first, 0)
        model.train()
        costs.append(
            step_cost(
                model,
                inputs,
                first,
                loss=lambda output: task.loss(lambda **_: output, (inputs, labels)),
            ),
        )
    return costs


def _reset(model: nn.Module, initial: dict[str, Any], first: int, seed: int) -> list[nn.Parameter]:
    """Fresh adapters of this seed, trainable from layer `first` on; the trainable parameters."""
    frozen = {name for name, _ in below(model, first)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in initial:
                parameter.copy_(initial[name])
                parameter.requires_grad_(name not in frozen)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in initial and "lora_A" in name:  # as PEFT draws them: uniform, of variance 1 / (3 K)
                bound = parameter.shape[-1] ** -0.5
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _tried(
    model: nn.Module,
    task: Task,
    cost: StepCost,
    initial: dict[str, Any],
    steps: int,
    seeds: Sequence[int],
    rate: float,
    progress: bool,
) -> TrainedCut:
    from tqdm import tqdm

    losses, accuracies, times = [], [], [cost.seconds]
    for seed in seeds:
        parameters = _reset(model, initial, cost.first, seed)
        model.train()
        if parameters:  # none where everything lies below the cut and there is no head
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
            for step in tqdm(
                range(steps),
                desc=f"from layer {cost.first}, seed {seed}",
                disable=not progress,
                leave=False,
            ):
                times.append(_step(model, task, optimizer, seed, step, rate, steps))
        score = task.score(model, task.test)
        losses.append(score.loss)
        accuracies.append(float("nan") if score.accuracy is None else score.accuracy)
    median = StepCost(cost.first, statistics.median(times), cost.saved_bytes)
    return TrainedCut(cost.first, tuple(losses), tuple(accuracies), median)


def _step(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
    rate: float,
    steps: int,
) -> float:
    """One step; the seconds it took."""
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + step)
        loss = task.loss(model, task.batch(seed, step, next(model.parameters()).device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - begin
