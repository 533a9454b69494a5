"""Debiased CKA against its definition, its bias on independent features, and its invariances."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from peftkern.transfer.cka import cka, cka_batches, cka_matrix, hsic


def _draw(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def _by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 as the mean over all ordered quadruples of distinct rows of k_ij (l_ij + l_qr - 2 l_iq)."""
    k, l = x @ x.T, y @ y.T
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(len(x)), 4)]
    return float(np.mean(terms))


@pytest.mark.parametrize(("dx", "dy"), [(3, 2), (40, 60)])
def test_hsic_is_the_mean_over_distinct_quadruples(dx: int, dy: int) -> None:
    x, y = _draw(7, dx, 0), _draw(7, dy, 1) + 5.0
    y[:, 0] += x[:, 0]
    assert hsic(x, y) == pytest.approx(_by_definition(x, y), rel=1e-10)
    assert hsic(x, y) == pytest.approx(hsic(x + 100, 3 + y), rel=1e-9)


def test_independent_features_are_not_alike_where_the_biased_estimate_says_so() -> None:
    values, biased = [], []
    for seed in range(40):
        x, y = _draw(32, 8, 2 * seed), _draw(32, 8, 2 * seed + 1)
        values.append(cka(x, y).value)
        cx, cy = x - x.mean(0), y - y.mean(0)
        norm = np.linalg.norm
        biased.append(norm(cx.T @ cy) ** 2 / (norm(cx.T @ cx) * norm(cy.T @ cy)))
    se = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * se
    assert np.mean(biased) > 0.15


def test_rotation_scale_and_shift_change_nothing() -> None:
    x = _draw(60, 6, 0)
    rotation = np.linalg.qr(_draw(6, 6, 1))[0]
    assert cka(x, 3 * x @ rotation + 7).value == pytest.approx(1.0, abs=1e-12)


def test_batches_average_the_terms_and_then_divide() -> None:
    shared = _draw(6000, 4, 0)
    x, y = np.hstack([shared, _draw(6000, 4, 1)]), np.hstack([shared, _draw(6000, 4, 2)])
    whole = cka(x, y)
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 6000, 6)]
    quotients = np.array([cka_batches([batch]) for batch in batches])
    assert abs(cka_batches(batches) - whole.value) < 4 * whole.se
    assert abs(np.nanmean(quotients) - whole.value) > 4 * whole.se  # what averaging the quotient gives


def test_the_jackknife_error_is_that_of_fresh_draws() -> None:
    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        x = _draw(200, 4, seed)
        return x, x + 2 * _draw(200, 4, 1000 + seed)

    estimates = [cka(*draw(seed)) for seed in range(60)]
    spread = np.std([estimate.value for estimate in estimates])
    assert 0.7 < np.mean([estimate.se for estimate in estimates]) / spread < 1.5


def test_a_matrix_of_layers_and_constant_features() -> None:
    x = _draw(50, 4, 0)
    matrix = cka_matrix([x, 2 * x, _draw(50, 4, 1), np.zeros((50, 4))])
    assert matrix[0, 1] == pytest.approx(1.0) and abs(matrix[0, 2]) < 0.3 and np.isnan(matrix[0, 3])
    with pytest.raises(ValueError, match="at least 4"):
        hsic(x[:3], x[:3])
