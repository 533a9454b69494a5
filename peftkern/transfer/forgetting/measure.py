"""Forgetting, measured: the rise of the loss on held-out source text against the pretrained model, paired
window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .gradients import as_pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Nll",
    "SourceRise",
    "WindowLosses",
    "language_nll",
    "measure_forgetting",
    "source_rise",
    "window_losses",
]

# (model, batch) -> (negative log-likelihood summed over the batch's predictions, their number)
Nll = Callable[[nn.Module, Mapping[str, Any]], "tuple[Tensor, int]"]
_IGNORED = -100


@dataclass(frozen=True)
class WindowLosses:
    """The summed negative log-likelihood of each window in nats, and how many predictions it has."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per prediction."""
        return math.fsum(self.sums) / sum(self.counts)


@dataclass(frozen=True)
class SourceRise:
    """How much the source loss rose, in nats per prediction, with the standard error of the paired
    difference.

    Windows are taken as independent: those that follow each other in one document are not quite, and the
    error is a little larger.
    """

    nats: float
    standard_error: float
    windows: int
    predictions: int

    def bounds(self, level: float = 0.05) -> tuple[float, float]:
        """The two-sided interval that holds the true rise but for a share `level` of all samples (Student's
        t)."""
        from scipy.stats import t

        half = float(t.ppf(1 - level / 2, self.windows - 1)) * self.standard_error
        return self.nats - half, self.nats + half

    def exceeds(self, budget: float, *, level: float = 0.05) -> bool:
        """Whether a one-sided test of this level says that more than `budget` was forgotten."""
        return self.bounds(2 * level)[0] > budget

    def verdict(self, budget: float = 0.0, *, level: float = 0.05) -> str:
        """One sentence: forgotten more than the budget, within it, or cannot tell."""
        low, high = self.bounds(level)
        shown = (
            f"the source loss rose by {self.nats:+.4f} nats ({1 - level:.0%} interval {low:+.4f} to"
            f" {high:+.4f})"
        )
        if low > budget:
            return f"Forgets more than {budget:g} nats: {shown}."
        if high <= budget:
            return f"Within {budget:g} nats: {shown}."
        return (
            f"Cannot tell whether it forgets more than {budget:g} nats: {shown}; more held-out windows would."
        )

    def draw(self, axes: Axes, budget: float = 0.0, *, level: float = 0.05) -> None:
        """The rise with its interval, beside the budget."""
        low, high = self.bounds(level)
        errors = [[self.nats - low], [high - self.nats]]
        axes.errorbar([self.nats], [0], xerr=errors, marker="o", capsize=4, color="tab:red")
        axes.axvline(budget, color="black", linestyle="--", label=f"budget {budget:g}")
        title = self.verdict(budget, level=level).partition(":")[0]
        axes.set(xlabel="rise of the source loss (nats per token)", yticks=[], title=title)
        axes.legend()


def language_nll(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Of a causal language model's batch: without logits where the model's patched loss can."""
    from ...finetune.loss import summed_nll

    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return summed_nll(inner, {**batch, "labels": labels}), int((labels[:, 1:] != _IGNORED).sum())


@torch.no_grad()
def window_losses(
    model: nn.Module, windows: Sequence[Mapping[str, Any]], *, nll: Nll = language_nll
) -> WindowLosses:
    """The loss of each window, in evaluation mode, with the adapters as they are; modes are left as they
    were.

    windows: batches, the units of the paired test: one sequence each. Raises: ValueError where there is none,
        or none with a prediction.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    pairs = []
    try:
        for window in windows:
            moved = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in window.items()
            }
            total, count = nll(model, moved)
            pairs.append((total, count))
    finally:
        for module, mode in modes:
            module.training = mode
    used = [(float(total), count) for total, count in pairs if count]
    if len(used) < 2:
        raise ValueError(
            f"windows: {len(used)} of {len(windows)} have anything to predict; a paired test needs at least"
            " 2: give more text"
        )
    sums, counts = zip(*used, strict=True)
    return WindowLosses(sums, counts)


def source_rise(before: WindowLosses, now: WindowLosses) -> SourceRise:
    """The paired rise of the mean per prediction, a ratio of sums, with its standard error over windows."""
    if before.counts != now.counts:
        raise ValueError(
            "before, now: they are losses of other windows: measure both on the same ones, in the same order"
        )
    total, windows = sum(now.counts), len(now.counts)
    differences = [a - b for a, b in zip(now.sums, before.sums, strict=True)]
    rise = math.fsum(differences) / total
    squares = math.fsum((d - rise * count) ** 2 for d, count in zip(differences, now.counts, strict=True))
    return SourceRise(rise, math.sqrt(windows / (windows - 1) * squares) / total, windows, total)


def measure_forgetting(
    model: nn.Module, windows: Sequence[Mapping[str, Any]], *, nll: Nll = language_nll
) -> SourceRise:
    """How much the active adapter raises the loss on source text: "before" is the same model with its
    adapters off."""
    with as_pretrained(model):
        before = window_losses(model, windows, nll=nll)
    return source_rise(before, window_losses(model, windows, nll=nll))
