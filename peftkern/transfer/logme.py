"""LogME: the log evidence of a Bayesian linear model of the labels given the features, a score of a layer
without training a head.

Written by hand: no maintained package has it (the `logme` of the package index is a logger). Fixed-point
iteration, fp64, one SVD a layer for all classes. Where there are more dimensions than texts the prior of the
directions that no text spans integrates to one and must cancel: the evidence has min(n, D) / 2 log(alpha),
not D / 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["evidence", "logme"]

_STEPS, _TOLERANCE = 500, 1e-10


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """The greatest log evidence per text, averaged over the classes (one against the rest) or, for real
    labels, over their columns.

    y = F w + e, w ~ N(0, I / alpha), e ~ N(0, I / beta): max over alpha, beta of log p(y | F, alpha, beta) /
    n. Higher is better; comparable between features of the same texts and labels only. There is no intercept
    and the prior treats all dimensions alike: features whose scales differ by orders of magnitude are to be
    divided by their standard deviations before.

    Args:
        features: [n, D].
        labels: [n] of classes (integers or strings), or [n] or [n, T] of floats.
    Source: You, Liu, Wang, Jordan and Long, 2022, Ranking and Tuning Pre-trained Models, JMLR 23, algorithm 3
    (2021: LogME).
    """
    import numpy as np

    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features: got shape {features.shape} with {len(labels)} labels, expected [n, D] with n labels"
        )
    if labels.dtype.kind == "f":
        targets = labels.reshape(len(labels), -1).astype(np.float64)
    else:
        targets = (labels[:, None] == np.unique(labels)[None]).astype(np.float64)
        if targets.shape[1] < 2:
            raise ValueError(f"labels: got the one class {labels[0]!r}, expected at least two")
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    projected = np.square(u.T @ targets)  # [k, T]
    outside = np.maximum(np.square(targets).sum(0) - projected.sum(0), 0.0)
    return float(
        np.mean(
            [evidence(s**2, projected[:, t], outside[t], len(features)) for t in range(targets.shape[1])],
        ),
    )


def evidence(sigma: np.ndarray, projected: np.ndarray, outside: float, n: int) -> float:
    """max log p(y) / n by MacKay's fixed point in t = alpha / beta.

    Args:
        sigma: [k] squared singular values of F; projected: [k] squares of U'y.
        outside: the squared length of y outside F's range.
        n: the number of texts.
    """
    import numpy as np

    t, best = 1.0, -math.inf
    for _ in range(_STEPS):
        gamma = float((sigma / (sigma + t)).sum())
        weights = float((sigma * projected / np.square(sigma + t)).sum())  # |m|^2
        residual = float((projected * np.square(t / (sigma + t))).sum()) + outside  # |y - F m|^2
        alpha = gamma / max(weights, 1e-300)
        beta = (n - gamma) / max(residual, 1e-300)
        value = _log_evidence(alpha, beta, sigma, projected, outside, n)
        step = alpha / beta
        done = abs(value - best) <= _TOLERANCE * max(1.0, abs(value))
        best = max(best, value)
        if done or not 1e-15 < step < 1e15:
            break
        t = step
    return best


def _log_evidence(
    alpha: float,
    beta: float,
    sigma: np.ndarray,
    projected: np.ndarray,
    outside: float,
    n: int,
) -> float:
    """log N(y; 0, F F' / alpha + I / beta) / n: along each direction of U a variance sigma / alpha + 1 /
    beta, else 1 / beta.
    """
    import numpy as np

    variance = sigma / alpha + 1 / beta
    along = (np.log(variance) + projected / variance).sum()
    across = (n - len(sigma)) * -math.log(beta) + beta * outside
    return -0.5 * (along + across + n * math.log(2 * math.pi)) / n
