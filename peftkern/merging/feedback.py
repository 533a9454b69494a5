"""A merged weight in 4 bits whose rounding errors are fed back into the columns not yet rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from .branches import Branch, folded_rows
from .quantize import coded
from .slabs import Rows, full_precision

__all__ = ["feedback_4bit"]

_BATCH = 128  # columns whose effect on the later ones is applied in one product


@full_precision
def feedback_4bit(
    weight: NF4Weight,
    branches: Sequence[Branch],
    moments: Tensor,
    *,
    damping: float = 0.01,
    base: Rows | None = None,
) -> NF4Weight:
    """As `requantize_4bit`, but minimizing ||(W - merged) x||^2 over the inputs x that the layer sees.

    Columns are rounded in the order of falling E[x_k^2]; what one loses is taken over by those after it, by
    the Cholesky factor of the inverse of the moments. Each block's absmax is fixed beforehand.

    Args:
        moments: E[x x^T] of the layer's input, [K, K]; a positive multiple of it gives the same.
        damping: added to the diagonal, as a part of its mean.
    Returns: NF4Weight. Scratch: a few slabs of rows, and three K x K matrices.
    Raises: ValueError for moments of another shape or that are not finite.
    Source: GPTQ (Frantar et al., 2022), algorithm 1, with its order by the diagonal ("act-order").
    """
    k = weight.shape[1]
    if tuple(moments.shape) != (k, k):
        raise ValueError(f"moments: got {tuple(moments.shape)}, expected {(k, k)}, in_features squared")
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("moments: hold NaN or inf; check the probe's inputs")
    order, factor = _factor(moments.to(weight.device, torch.float32), damping)
    ordered, codes = torch.sort(weight.code)

    def choose(rows: Tensor, scale: Tensor) -> Tensor:
        return codes[_rounded(rows, scale, order, factor, ordered)]

    return coded(weight, folded_rows(weight, branches, base), choose)


def _factor(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The order of the columns, and the upper Cholesky factor of the inverse of the moments in that order."""
    diagonal = moments.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = moments[order][:, order].clone()
    floor = diagonal.mean()
    damped.diagonal().add_(torch.where(floor > 0, damping * floor, 1.0))
    lower = torch.linalg.cholesky(damped)
    return order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _rounded(rows: Tensor, scale: Tensor, order: Tensor, factor: Tensor, ordered: Tensor) -> Tensor:
    """The index into the sorted codes of each element, [n, K]."""
    bounds = (ordered[:-1] + ordered[1:]) / 2
    left, scale = rows.t()[order], scale.t()[order]  # [K, n]
    divisor = torch.where(scale == 0, 1.0, scale)
    index = torch.empty_like(left, dtype=torch.int64)
    for first in range(0, len(order), _BATCH):
        last = min(first + _BATCH, len(order))
        errors = torch.empty_like(left[first:last])
        for k in range(first, last):
            index[k] = torch.bucketize(left[k] / divisor[k], bounds)
            errors[k - first] = (left[k] - ordered[index[k]] * scale[k]) / factor[k, k]
            left[k:last].addr_(factor[k, k:last], errors[k - first], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return torch.empty_like(index).index_copy_(0, order, index).t()
