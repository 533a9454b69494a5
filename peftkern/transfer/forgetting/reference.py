"""Forgetting by its definition, dense and slow: what the factored forms are tested against.

Of a layer y = x W^T with the gradient G_e = dL_e/dW [N, K] of the summed negative log-likelihood L_e of
example e, the diagonal Fisher information is F_ij = sum_e G_e,ij^2 / T, with T the number of predictions in
all examples: squares of the gradients of single examples, never the square of a batch's. One half of sum F
dW^2 is the second-order rise of the loss in nats per prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dense_diagonal_fisher", "factored", "penalty"]


def dense_diagonal_fisher(
    weights: dict[str, nn.Parameter],
    examples: Iterable[Any],
    nll: Callable[[Any], Tensor],
    *,
    predictions: int,
) -> dict[str, Tensor]:
    """The diagonal Fisher of each weight, of its shape: one backward for each example.

    nll: the summed negative log-likelihood of one example, a scalar; predictions: the number of predictions
        in all examples.
    """
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for example in examples:
        gradients = torch.autograd.grad(nll(example), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.square() / predictions
    return total


def factored(fisher: Tensor) -> Tensor:
    """The outer product of the row and column sums of a Fisher [N, K], divided by its total: it has the same
    sums."""
    return torch.outer(fisher.sum(1), fisher.sum(0)) / fisher.sum()


def penalty(fisher: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """One half of sum F_ij (s B A)_ij^2; fisher [N, K], a [r, K], b [N, r]."""
    return 0.5 * (fisher * (scaling * b @ a).square()).sum()
