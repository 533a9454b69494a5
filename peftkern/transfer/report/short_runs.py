"""A few real steps from several first layers: what a cut costs in loss and saves in time, and what is
forgotten meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..features import adapters_disabled
from ..first_layer import freeze_below
from ..intervals import Interval, over_runs, paired_runs

__all__ = ["ShortRun", "ShortRuns", "paired_gain", "per_window", "short_runs"]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ShortRun:
    """Losses after a few steps with the layers below `first` frozen: nats a token of each held-out window of
    target and source."""

    first: int
    target: tuple[float, ...]
    source: tuple[float, ...]
    seconds: float  # of a step, the median


@dataclass(frozen=True)
class ShortRuns:
    """Runs of `steps` steps by first layer, all from the same start; `before` is that start, with adapters
    off.

    `forecast`: nats a token that an expansion of the source's loss says the run from layer 0 to have cost,
    None where it was not measured.
    """

    layers: int
    steps: int
    before: ShortRun
    runs: tuple[ShortRun, ...]
    forecast: float | None = None

    @property
    def whole(self) -> ShortRun:
        """The run that trains all layers."""
        return self.runs[0]

    @property
    def gain(self) -> Interval:
        """Nats a token that the run of all layers took off the target's loss, paired over windows."""
        return paired_gain(self.before.target, self.whole.target)

    @property
    def forgotten(self) -> Interval:
        """Nats a token that it put on the source's loss."""
        return paired_gain(self.whole.source, self.before.source)

    def behind(self, run: ShortRun) -> Interval:
        """Nats a token that a cut run is behind the one of all layers, on the target."""
        return paired_gain(run.target, self.whole.target)

    def cut(self, share: float = 0.1) -> int:
        """The highest first layer whose run is certainly behind by no more than this share of the gain; 0
        without a certain gain."""
        if self.gain.sign != 1:
            return 0
        good = [
            run.first
            for run in self.runs
            if self.behind(run).high <= share * self.gain.mean or run.first == 0
        ]
        return max(good)


def paired_gain(higher: Sequence[float], lower: Sequence[float]) -> Interval:
    """The interval of the mean of higher - lower over the same windows; of one window alone it is
    infinite."""
    return paired_runs(higher, lower) if len(higher) > 1 else over_runs([higher[0] - lower[0]])


def per_window(nll: Callable[[Batch], Tensor], windows: Sequence[Batch]) -> tuple[float, ...]:
    """Nats a token of each window, where `nll` gives the sum over its labels (those after the first)."""
    with torch.no_grad():
        return tuple(nll(window).item() / int((window["labels"][:, 1:] != -100).sum()) for window in windows)


def short_runs(
    model: nn.Module,
    batches: Sequence[Batch],
    target: Sequence[Batch],
    source: Sequence[Batch],
    *,
    nll: Callable[[Batch], Tensor],
    firsts: Sequence[int],
    layers: int,
    lr: float,
    forecast: Callable[[], float] | None = None,
    progress: bool = False,
) -> ShortRuns:
    """Train on `batches` in order, one step each, from each first layer in turn, and measure held-out
    windows; the model is put back.

    Args:
        model: with LoRA adapters that are the identity at the start.
        batches, target, source: mappings that the model takes, with labels; of target and source, of one
            window each.
        nll: the summed loss of a window under the model as it is.
        firsts: the first layers, 0 first.
        lr: of AdamW, constant after two steps of warm-up; gradients are clipped to norm 1.
        forecast: called after the run from layer 0, while its adapter is in place.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trainable]
    modes = [(module, module.training) for module in model.modules()]
    with adapters_disabled(model):
        model.eval()
        before = ShortRun(0, per_window(nll, target), per_window(nll, source), 0.0)
    runs, predicted = [], None
    try:
        for first in _shown(firsts, progress):
            frozen = freeze_below(model, first) if first else None
            seconds = _train(model, batches, lr)
            if frozen is not None:
                frozen.remove()
            model.eval()
            runs.append(ShortRun(first, per_window(nll, target), per_window(nll, source), seconds))
            if first == 0 and forecast is not None:
                predicted = forecast()
            _restore(trainable, start)
    finally:
        _restore(trainable, start)
        for module, mode in modes:
            module.training = mode
    return ShortRuns(layers, len(batches), before, tuple(runs), predicted)


def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def _train(model: nn.Module, batches: Sequence[Batch], lr: float) -> float:
    """One step a batch; the median seconds of a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    model.train()
    times = []
    for batch in batches:
        begun = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def _shown(firsts: Sequence[int], progress: bool) -> Iterator[int]:
    if not progress:
        yield from firsts
        return
    from tqdm import tqdm

    yield from tqdm(firsts, desc="short runs", unit="run")
