"""Debiased linear CKA: how alike two sets of features of the same texts are, up to rotation, scale and shift.

Written by hand, as the packages at hand use the biased HSIC, by which independent features are alike where
texts are few, or average the quotient over batches, which is biased again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Cka", "cka", "cka_batches", "cka_matrix", "hsic"]

_BLOCKS = 10  # of the jackknife


@dataclass(frozen=True)
class Cka:
    """An estimate, about in [0, 1] (unbiased terms can make it slightly negative), and its standard error by
    a jackknife.
    """

    value: float
    se: float


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC_1 of linear kernels, in fp64 and without an n x n matrix where the features are few.

    [tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1] / (n (n - 3)), K = x x' and L = y y' with
    zero diagonals.

    Args: x [n, Dx], y [n, Dy], n > 3.
    Source: Song, Smola, Gretton, Bedo and Borgwardt, 2012, Feature Selection via Dependence Maximization,
    equation 5.
    """
    import numpy as np

    x, y = _centred(x), _centred(y)
    n = len(x)
    if n != len(y) or n < 4:
        raise ValueError(f"x, y: got {len(x)} and {len(y)} rows, expected as many in both, at least 4")
    kx, ky = (x * x).sum(1), (y * y).sum(1)  # the diagonals that are left out
    row_x, row_y = x @ x.sum(0) - kx, y @ y.sum(0) - ky
    wide = x.shape[1] * y.shape[1] > n * (x.shape[1] + y.shape[1])
    squares = ((x @ x.T) * (y @ y.T)).sum() if wide else np.square(x.T @ y).sum()
    trace = squares - kx @ ky
    total = row_x.sum() * row_y.sum() / ((n - 1) * (n - 2))
    return float(trace + total - 2 * (row_x @ row_y) / (n - 2)) / (n * (n - 3))


def _centred(x: np.ndarray) -> np.ndarray:
    """Shifted to mean zero in fp64: HSIC_1 does not change, its rounding error does."""
    import numpy as np

    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"features: got shape {x.shape}, expected [n, D]")
    return x - x.mean(0)


def cka(x: np.ndarray, y: np.ndarray) -> Cka:
    """HSIC_1(x, y) / sqrt(HSIC_1(x, x) HSIC_1(y, y)) of features x [n, Dx] and y [n, Dy] of the same n texts.

    0 in the mean for independent features, where the biased estimate is about D / (D + n); 1 where y is x
    rotated, scaled, shifted. NaN where a set of features varies no more than by chance. The standard error is
    a jackknife's, over 10 blocks of rows.
    Source: Kornblith et al., 2019, Similarity of Neural Network Representations Revisited; debiased as Nguyen
    et al., 2021.
    """
    import numpy as np

    value = cka_batches([(x, y)])
    blocks = np.array_split(np.arange(len(x)), _BLOCKS)
    if len(x) < 4 + _BLOCKS:
        return Cka(value, float("nan"))
    without = np.array([cka_batches([(np.delete(x, block, 0), np.delete(y, block, 0))]) for block in blocks])
    return Cka(value, float(np.sqrt((_BLOCKS - 1) / _BLOCKS * np.square(without - without.mean()).sum())))


def cka_batches(batches: Iterable[tuple[Any, Any]]) -> float:
    """CKA from batches of features (x, y) that never lie in memory together: the three HSIC terms are
    averaged, then divided.

    Source: Nguyen, Raghu and Kornblith, 2021, Do Wide and Deep Networks Learn the Same Things?, section 3.
    """
    terms = [0.0, 0.0, 0.0]
    for x, y in batches:
        for index, value in enumerate((hsic(x, y), hsic(x, x), hsic(y, y))):
            terms[index] += value
    scale = terms[1] * terms[2]
    return terms[0] / scale**0.5 if min(terms[1:]) > 0 else float("nan")


def cka_matrix(layers: Any) -> np.ndarray:
    """[depths, depths] of CKA between the layers' features [depths, n, D]."""
    import numpy as np

    own = [hsic(x, x) for x in layers]
    matrix = np.full((len(layers), len(layers)), np.nan)
    for i, x in enumerate(layers):
        for j in range(i, len(layers)):
            if min(own[i], own[j]) > 0:
                matrix[i, j] = matrix[j, i] = hsic(x, layers[j]) / (own[i] * own[j]) ** 0.5
    return matrix
