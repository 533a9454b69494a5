"""A budget of forgetting, in nats: the weight of the penalty follows from it by dual ascent, and measurements
calibrate the forecast."""

from __future__ import annotations

import math
from typing import Any

from .measure import SourceRise

__all__ = ["Calibration", "ForgetBudget"]

# The forecast starts as if it were exact to within this factor of ten or so; what is measured weighs by its
# error.
_PRIOR_ERROR = 10.0
_LEAST_SLOPE = 0.05


class Calibration:
    """Measured nats for each forecast one: the slope through the origin of the measurements so far, each
    weighted by its error."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float, float]] = []  # forecast, measured, standard error

    def add(self, forecast: float, rise: SourceRise) -> None:
        """A measurement of what was forecast."""
        self.points.append((forecast, rise.nats, rise.standard_error))

    @property
    def slope(self) -> float:
        """1 before the first measurement; never below 0.05, so that a lucky one does not switch the penalty
        off."""
        weight = 1 / _PRIOR_ERROR**2
        products = squares = 0.0
        for forecast, measured, error in self.points:
            precision = 1 / max(error, 1e-6) ** 2
            products += precision * forecast * measured
            squares += precision * forecast * forecast
        return max(_LEAST_SLOPE, (products + weight) / (squares + weight))


class ForgetBudget:
    """min loss(target) such that slope * forecast <= nats, by dual ascent on the weight of the penalty.

    With v = slope * forecast / aim - 1, the relative violation, each step raises the multiplier by gain * v
    (never below 0), and the weight of the penalty is multiplier + stiffness * v where that is positive: an
    augmented Lagrangian, whose second part answers at once. A weight is in nats of target loss for each nat
    forgotten, so neither depends on the model or the data. It aims at nine tenths of the budget, as the
    measured rise scatters around the forecast.

    Its state is a few numbers that a checkpoint holds: a resumed run goes on exactly as it would have.
    """

    def __init__(
        self, nats: float, *, gain: float = 1.0, stiffness: float = 10.0, margin: float = 0.1
    ) -> None:
        if not 0 < nats < math.inf:
            raise ValueError(f"nats: got {nats}, expected a budget above 0, as 0.02 nats per token")
        self.nats, self.gain, self.stiffness, self.margin = nats, gain, stiffness, margin
        self.multiplier = 0.0
        self.violation = -1.0

    @property
    def weight(self) -> float:
        """Of the forecast in nats, calibrated, in the loss of the next step."""
        return max(0.0, self.multiplier + self.stiffness * self.violation)

    def observe(self, forecast: float) -> None:
        """Take in the calibrated forecast of the weights as they are now."""
        self.violation = forecast / (self.nats * (1 - self.margin)) - 1
        self.multiplier = max(0.0, self.multiplier + self.gain * self.violation)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"multiplier": self.multiplier, "violation": self.violation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        self.multiplier, self.violation = state["multiplier"], state["violation"]
