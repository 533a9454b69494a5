"""The penalty of a ridge classifier, chosen on grouped inner splits from one decomposition a split.

RidgeClassifierCV chooses by leave-one-out in closed form, which lets rows of one document choose for each
other; given splits, it fits each penalty anew, twenty times slower. The final fit is scikit-learn's.
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
        inside, outside = x[train] - mean, x[test] - mean
        wide = (
            inside.shape[1] > inside.shape[0]
        )  # then by the kernel: X' (X X' + a)^-1 instead of (X' X + a)^-1 X'
        values, vectors = np.linalg.eigh(inside @ inside.T if wide else inside.T @ inside)
        rotated = (outside @ inside.T if wide else outside) @ vectors
        targets = vectors.T @ ((signs[train] - offset) if wide else inside.T @ (signs[train] - offset))
        for index, penalty in enumerate(penalties):
            scores = rotated @ (targets / (np.maximum(values, 0) + penalty)[:, None]) + offset
            right[index] += (classes[scores.argmax(1)] == labels[test]).mean()
    return penalties[len(penalties) - 1 - int(right[::-1].argmax())]
