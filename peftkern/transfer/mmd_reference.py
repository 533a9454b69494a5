"""The squared maximum mean discrepancy by its definition, dense and differentiable: what the tiled one is
proven by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mmd2_reference"]


def mmd2_reference(x: Tensor, y: Tensor, variances: Sequence[float]) -> Tensor:
    """The unbiased estimate of MMD^2 between x [m, D] and y [n, D], the mean over kernels exp(-d^2 / (2
    variance)).

    Gretton et al., JMLR 13 (2012), lemma 6: the mean of k(x_i, x_j) over i != j, plus that of k(y_i, y_j),
    less twice the mean of k(x_i, y_j). It may be negative. Of d^2 nothing is expanded, so that nothing
    cancels.
    """
    m, n = len(x), len(y)
    within_x = (_kernel(x, x, variances).sum() - _kernel(x, x, variances).diagonal().sum()) / (m * (m - 1))
    within_y = (_kernel(y, y, variances).sum() - _kernel(y, y, variances).diagonal().sum()) / (n * (n - 1))
    return within_x + within_y - 2 * _kernel(x, y, variances).mean()


def _kernel(a: Tensor, b: Tensor, variances: Sequence[float]) -> Tensor:
    """[len(a), len(b)]"""
    distances = (a[:, None] - b).square().sum(2)
    return torch.stack([torch.exp(-distances / (2 * variance)) for variance in variances]).mean(0)
