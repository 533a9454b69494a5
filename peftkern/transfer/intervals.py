"""Means with their uncertainty: over independent runs, and over the folds of a repeated cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "cross_validated", "over_runs", "paired_runs"]


@dataclass(frozen=True)
class Interval:
    """A mean, its standard error, and the two-sided confidence interval [low, high]; `count` values went into
    it.
    """

    mean: float
    se: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where zero lies below or above the interval, 0 where the interval holds it: then one cannot
        tell.
        """
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def over_runs(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values, runs with other seeds say; one value alone has an
    infinite one.
    """
    import numpy as np

    array = np.asarray(values, dtype=float)
    spread = float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else float("inf")
    return _student(float(array.mean()), spread, len(array), level)


def paired_runs(ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95) -> Interval:
    """The interval of the mean difference ours - theirs of runs that share a seed each."""
    return over_runs([a - b for a, b in zip(ours, theirs, strict=True)], level=level)


def cross_validated(scores: Sequence[float], *, folds: int, level: float = 0.95) -> Interval:
    """The interval of a mean over the folds of a repeated cross-validation, whose training sets overlap.

    The variance of the mean is s^2 (1 / J + n_test / n_train) with J scores and n_test / n_train = 1 / (folds
    - 1): the s^2 / J of independent scores is too small, as the overlap is not seen in s. For differences of
    two models give the scores' differences on the same splits. Source: Nadeau and Bengio, 2003, Inference for
    the Generalization Error, section 3.
    """
    import numpy as np

    array = np.asarray(scores, dtype=float)
    if len(array) < 2:
        return over_runs(array, level=level)
    spread = float(array.std(ddof=1)) * (1 / len(array) + 1 / (folds - 1)) ** 0.5
    return _student(float(array.mean()), spread, len(array), level)


def _student(mean: float, se: float, count: int, level: float) -> Interval:
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, count - 1)) * se if count > 1 else float("inf")
    return Interval(mean, se, mean - half, mean + half, count)
