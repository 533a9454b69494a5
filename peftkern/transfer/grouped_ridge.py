"""The penalty of a ridge classifier, chosen on grouped inner splits from one decomposition a split.

RidgeClassifierCV chooses by leave-one-out in closed form, which lets rows of one document choose for each other;
given splits, it fits each penalty anew, twenty times slower. The final fit is scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["choose_penalty"]


def choose_penalty(
    x: np.ndarray,
    labels: np.ndarray,
    splits: Sequence[tuple[Any, Any]],
    penalties: Sequence[float],
) -> float:
    """The penalty of the best mean accuracy over the splits, the largest of equally good ones.

    Args:
        x: [n, D]; labels: [n] of 0 ... C - 1; splits: (train, test) rows; penalties: in rising order.
    """
    import numpy as np

    classes = np.unique(labels)
    signs = np.where(labels[:, None] == classes[None], 1.0, -1.0)  # [n, C], as RidgeClassifier codes them
    right = np.zeros(len(penalties))
    for train, test in splits:
        mean, offset = x[train].mean(0), signs[train].mean(0)
        u, s, vt = np.linalg.svd(x[train] - mean, full_matrices=False)
        projected, rotated = u.T @ (signs[train] - offset), (x[test] - mean) @ vt.T
        for index, penalty in enumerate(penalties):
            scores = rotated @ ((s / (s**2 + penalty))[:, None] * projected) + offset
            right[index] += (classes[scores.argmax(1)] == labels[test]).mean()
    return penalties[len(penalties) - 1 - int(right[::-1].argmax())]
