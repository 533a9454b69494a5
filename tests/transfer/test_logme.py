"""LogME against the evidence of its definition, maximised by scipy's general optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from peftkern.transfer.logme import logme


def _direct(features: np.ndarray, target: np.ndarray) -> float:
    """max over alpha, beta of log N(y; 0, F F' / alpha + I / beta) / n, nothing of linear algebra shared with
    logme.
    """
    gram, n = features @ features.T, len(target)

    def negative(logs: np.ndarray) -> float:
        covariance = gram * np.exp(-logs[0]) + np.eye(n) * np.exp(-logs[1])
        return -multivariate_normal(np.zeros(n), covariance).logpdf(target)

    starts = ([0.0, 0.0], [3.0, 1.0], [-3.0, 1.0], [6.0, -1.0])
    options = {"xatol": 1e-8, "fatol": 1e-11, "maxiter": 4000}
    return -min(minimize(negative, start, method="Nelder-Mead", options=options).fun for start in starts) / n


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 30), (25, 60)])
def test_it_is_the_greatest_evidence(n: int, d: int) -> None:
    rng = np.random.default_rng(n)
    features = rng.standard_normal((n, d)) * np.linspace(0.2, 3, d)
    labels = (features[:, 0] + features[:, -1] + rng.standard_normal(n) > 0).astype(int)
    direct = np.mean([_direct(features, (labels == label).astype(float)) for label in (0, 1)])
    assert logme(features, labels) == pytest.approx(direct, abs=1e-6)
    target = features @ rng.standard_normal(d) / d**0.5 + 0.5 * rng.standard_normal(n)
    assert logme(features, target) == pytest.approx(_direct(features, target), abs=1e-6)


def test_better_features_score_higher_and_strings_are_classes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    signal = np.eye(3)[labels] @ rng.standard_normal((3, 10))
    scores = [logme(signal + noise * rng.standard_normal((200, 10)), labels) for noise in (0.3, 1.0, 3.0)]
    assert scores == sorted(scores, reverse=True)
    names = np.array(["a", "b", "c"])[labels]
    assert logme(signal, names) == logme(signal, labels)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="the one class"):
        logme(np.ones((4, 2)), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="features: got shape"):
        logme(np.ones((4, 2)), np.zeros(3))
