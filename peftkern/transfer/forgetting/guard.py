"""Everything that watches over forgetting in one training run: penalties, forecast, measurements, budget,
checkpoints worth keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .budget import Calibration, ForgetBudget
from .fisher import FisherFactors
from .gradients import as_pretrained
from .layers import lora_factors, trained_elsewhere
from .measure import Nll, SourceRise, WindowLosses, language_nll, source_rise, window_losses
from .pareto import ParetoFront, Point
from .penalty import DeltaPenalty

__all__ = ["ForgettingGuard"]

# How much too low the uncalibrated forecast may be: measured 14 on SmolLM2 and on a small model of bytes.
_LOW = 20.0


class ForgettingGuard:
    """Holds a LoRA adapter near the pretrained model while it is trained, and measures what it forgets.

    A training loop calls `start()` once, `add_gradients()` after each step's backward and before its
    clipping, and `end_of_step(step)` after the optimizer; it stops where that returns True. `state_dict()`
    goes into its checkpoints.

    Example:
        fisher = collect_fisher(model, source_batches)
        guard = ForgettingGuard(model, source=windows, fisher=fisher, budget=0.02, planned=100)
        guard.start()
        for step, batch in enumerate(loader, 1):
            model(**batch).loss.backward()
            guard.add_gradients()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if guard.end_of_step(step):
                break
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Sequence[Mapping[str, Any]],
        planned: int,
        target: Sequence[Mapping[str, Any]] = (),
        fisher: FisherFactors | None = None,
        ewc: float = 0.0,
        l2_sp: float = 0.0,
        budget: float | None = None,
        every: int = 25,
        level: float = 0.05,
        folder: Path | None = None,
        nll: Nll = language_nll,
    ) -> None:
        """Take the model with its adapter, before or in the middle of training.

        Args:
            source: held-out windows of source text, batches of one sequence each: what must not be forgotten,
                and is not trained on.
            planned: the number of steps; the last one is measured too.
            target: held-out windows of the target; without them no checkpoints are kept.
            fisher: of other source text, for the forecast, `ewc` and `budget`.
            ewc: weight of the forecast in the loss, in nats of target loss a nat of forecast.
            l2_sp: weight of 1/2 |dW|^2.
            budget: the most nats per token that the source loss may rise: sets the weight of the penalty as
                it goes, and ends training once a one-sided test, of `level` for all measurements together,
                says that more is forgotten.
            every: steps between measurements. With a budget the first one comes earlier where a forecast 20
                times too low would have spent it by then, as the forecast is not calibrated before.
            folder: where adapters on the Pareto front of target and source loss are kept.
        Raises: ValueError for options that need a Fisher or an adapter of another kind.
        """
        if fisher is None and (ewc or budget is not None):
            raise ValueError(
                "ewc, budget: they need the Fisher information of source text: pass"
                " fisher=collect_fisher(model, batches)"
            )
        if ewc < 0 or l2_sp < 0 or every < 1 or planned < 1:
            raise ValueError(
                f"ewc, l2_sp: got {ewc}, {l2_sp}, expected 0 or more; every, planned: got {every}, {planned},"
                " expected 1 or more"
            )
        self.model, self.source, self.target, self.nll = model, source, target, nll
        self.every, self.level, self.planned, self.ewc, self.l2_sp = every, level, planned, ewc, l2_sp
        self.penalty = DeltaPenalty(model, fisher) if fisher is not None else None
        self.distance = DeltaPenalty(model) if l2_sp else None
        self.budget = ForgetBudget(budget) if budget is not None else None
        self.calibration = Calibration()
        self.front = ParetoFront(folder)
        self.before: WindowLosses | None = None
        self.stopped = False
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._forecast = 0.0
        self._weight = 0.0
        self._measured: dict[str, float] = {}

    def start(self) -> None:
        """Measure the source loss before training, with the adapters off; once, also in a run that is
        resumed."""
        if self.before is None:
            with as_pretrained(self.model):
                self.before = self._losses(self.source)

    def add_gradients(self, scale: float = 1.0) -> None:
        """Add the penalties' gradients, times the loss scale where gradients are scaled (fp16), and note the
        forecast."""
        self._weight = self.ewc + (self.budget.weight * self.calibration.slope if self.budget else 0.0)
        if self.penalty is not None:
            self._forecast = self.penalty.add_gradients(self._weight * scale).item()
        if self.distance is not None:
            self.distance.add_gradients(self.l2_sp * scale)
        if self.budget is not None:
            self.budget.observe(self.calibration.slope * self._forecast)

    def end_of_step(self, step: int) -> bool:
        """Measure where it is time; whether training is to end because the budget is spent."""
        self._measured = {}
        if step % self.every == 0 or step >= self.planned or self._first_is_due():
            self._measure(step)
        return self.stopped

    def _first_is_due(self) -> bool:
        """Whether, before any measurement, the forecast is such that a forecast 20 times too low would have
        spent the budget."""
        return (
            self.budget is not None
            and not self.calibration.points
            and _LOW * self._forecast > self.budget.nats
        )

    @property
    def evaluations(self) -> int:
        """How many measurements the run makes, which share the test's level."""
        early = 1 if self.budget is not None else 0
        return self.planned // self.every + (1 if self.planned % self.every else 0) + early

    def metrics(self) -> dict[str, float]:
        """For the log of a step: nats forecast (calibrated) and the penalty's weight, and what was measured
        in this step."""
        if self.penalty is None:
            return dict(self._measured)
        return {
            "forgetting": self.calibration.slope * self._forecast,
            "forgetting_weight": self._weight,
            **self._measured,
        }

    def best(self) -> Point | None:
        """The point to keep: the least target loss within the budget; None without a budget or where no point
        is within it."""
        return self.front.best(self.budget.nats) if self.budget is not None else None

    def rise(self) -> SourceRise:
        """How much is forgotten now, measured."""
        self.start()
        return source_rise(self.before, self._losses(self.source))

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: all that a resumed run needs to go on exactly as the unbroken one."""
        return {
            "before": None if self.before is None else [self.before.sums, self.before.counts],
            "calibration": self.calibration.points,
            "budget": self.budget.state_dict() if self.budget else None,
            "points": self.front.state_dict(),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        if state["before"] is not None:
            sums, counts = state["before"]
            self.before = WindowLosses(tuple(sums), tuple(counts))
        self.calibration.points = [tuple(point) for point in state["calibration"]]
        if self.budget is not None and state["budget"] is not None:
            self.budget.load_state_dict(state["budget"])
        self.front.load_state_dict(state["points"])
        self.stopped = state["stopped"]

    def _losses(self, windows: Sequence[Mapping[str, Any]]) -> WindowLosses:
        with self.autocast():
            return window_losses(self.model, windows, nll=self.nll)

    def _measure(self, step: int) -> None:
        rise = self.rise()
        forecast = self.penalty.value().item() if self.penalty is not None else None
        if forecast is not None:
            self.calibration.add(forecast, rise)
        self._measured = {"source_rise": rise.nats, "source_rise_error": rise.standard_error}
        if self.target:
            point = Point(
                step, self._losses(self.target).mean, rise.nats, rise.standard_error, forecast, self._weight
            )
            self.front.add(point, lambda folder: self.model.save_pretrained(folder))
            self._measured["target_loss"] = point.target
        if self.budget is not None:
            self.stopped = rise.exceeds(self.budget.nats, level=self.level / self.evaluations)


def unprotected(model: nn.Module) -> str | None:
    """Why a penalty cannot hold this model's adapter; None where it can."""
    try:
        others = trained_elsewhere(model, lora_factors(model))
    except ValueError as error:
        return str(error)
    return f"{others[0]} is trained and no factor of a LoRA update" if others else None
