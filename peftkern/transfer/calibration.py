"""Whether probabilities mean what they say: expected calibration error and the Brier score, for any number of
classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["brier_score", "expected_calibration_error"]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over bins of equal width of the greatest probability, weighted by their
    rows.

    Args: probabilities [n, C], labels [n] of 0 ... C - 1. Biased upwards where rows are few (about 1 / sqrt(n
    / bins) for a good model).
    Source: Guo, Pleiss, Sun and Weinberger, 2017, On Calibration of Modern Neural Networks, equation 5.
    """
    import numpy as np

    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities [n, C] and the one-hot labels, in [0, 2] (Brier, 1950)."""
    import numpy as np

    return float(np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(1).mean())
