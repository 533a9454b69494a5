"""Row and column sums of a layer's diagonal Fisher, from what the layer reads and the gradient of what it
gives."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SEQUENCE", "TOKEN", "UNITS", "marginals"]

# The unit whose gradients are squared: whole examples, by the definition, or single positions, as if each
# were independent.
SEQUENCE, TOKEN = "sequence", "token"
UNITS = (SEQUENCE, TOKEN)
_SLAB_BYTES = 2 << 20


def marginals(x: Tensor, delta: Tensor, *, unit: str = SEQUENCE) -> tuple[Tensor, Tensor]:
    """(rows [N], columns [K]) of sum_e G_e^2, the squares taken entry by entry, in fp32 (fp64 for fp64).

    With unit "sequence" G_e = sum_t delta_et x_et^T is the whole gradient of example e: the exact sums, from
    two T x T Gram matrices and without G: sum_j G_ij^2 = (delta^T X X^T delta)_ii, and likewise for the
    columns. With "token" every position counts for itself, rows_i = sum_t delta_ti^2 |x_t|^2, columns_j =
    sum_t x_tj^2 |delta_t|^2: this drops the products of two positions of one example.

    Args:
        x: [E, T, K], the layer's input for E examples of T positions; padding counts for nothing where its
            delta is 0.
        delta: [E, T, N], the gradient of the summed loss with respect to the layer's output.
    Scratch: E T^2 and some 4 MB.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if unit == TOKEN:
        return _by_token(delta, x, wide), _by_token(x, delta, wide)
    return _by_sequence(delta, _gram(x, wide), wide), _by_sequence(x, _gram(delta, wide), wide)


def _slabs(tensor: Tensor) -> tuple[Tensor, ...]:
    """Column slabs [E, T, width] of about 2 MB in fp32."""
    positions = tensor.shape[0] * tensor.shape[1]
    return tensor.split(max(1, _SLAB_BYTES // (4 * max(1, positions))), dim=2)


def _gram(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, T, T]: the products of every two positions of an example."""
    total = torch.zeros(*tensor.shape[:2], tensor.shape[1], dtype=dtype, device=tensor.device)
    for slab in _slabs(tensor):
        wide = slab.to(dtype)
        total.baddbmm_(wide, wide.transpose(1, 2))
    return total


def _by_sequence(values: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(V_e^T gram_e V_e), summed over e, of values [E, T, width]."""
    sums = []
    for slab in _slabs(values):
        wide = slab.to(dtype)
        sums.append((gram.bmm(wide) * wide).sum((0, 1)))
    return torch.cat(sums).clamp_(min=0)  # a quadratic form: below 0 by rounding alone


def _by_token(values: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Over all positions, the sum of values^2 times the squared norm of the others there."""
    norms = torch.zeros(*others.shape[:2], 1, dtype=dtype, device=others.device)
    for slab in _slabs(others):
        norms += slab.to(dtype).square().sum(2, keepdim=True)
    return torch.cat([(slab.to(dtype).square() * norms).sum((0, 1)) for slab in _slabs(values)])
