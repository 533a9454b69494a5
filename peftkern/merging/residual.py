"""The rounding error of a merged weight as an adapter, found without forming the error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from .branches import Branch, folded_rows
from .slabs import Rows, dense_rows, full_precision, row_slabs

__all__ = ["rounding_residual"]

_OVERSAMPLING, _PASSES = 8, 4


@full_precision
def rounding_residual(
    weight: NF4Weight,
    branches: Sequence[Branch],
    merged: NF4Weight,
    rank: int,
    *,
    seed: int = 0,
    base: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """up [N, rank], down [rank, K], fp32: the best approximation of (W0 + delta) - merged of that rank.

    Subspace iteration: the error is decoded again in slabs for each of its passes and never held. The
    singular values are split evenly.

    Args:
        weight, branches: what was merged; merged: its 4-bit form.
        rank: at most min(N, K).
        seed: of the first, random, subspace; equal seeds give equal bits on one device.
    Raises: ValueError for a rank out of range.
    Source: Halko, Martinsson, Tropp (2011), algorithms 4.4 and 5.1; LoftQ (Li et al., 2023) for the use of
        the rounding error.
    """
    n, k = weight.shape
    if not 1 <= rank <= min(n, k):
        raise ValueError(f"rank: got {rank}, expected 1 to {min(n, k)} for a weight of shape {(n, k)}")
    goal, stored = folded_rows(weight, branches, base), dense_rows(merged)
    slabs = list(row_slabs(weight))
    width = min(rank + _OVERSAMPLING, n, k)
    start = torch.randn(k, width, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    right = torch.linalg.qr(start).Q  # [K, width]
    for _ in range(_PASSES):
        left = torch.linalg.qr(_times(goal, stored, slabs, right)).Q  # [N, width]
        across = _transposed_times(goal, stored, slabs, left)  # [K, width]
        right = torch.linalg.qr(across).Q
    u, s, vh = torch.linalg.svd(across.t(), full_matrices=False)  # error ~ left across^T
    root = s[:rank].sqrt()
    return (left @ u[:, :rank]) * root, root[:, None] * vh[:rank]


def _times(goal: Rows, stored: Rows, slabs: list[tuple[int, int]], right: Tensor) -> Tensor:
    """error @ right, [N, width]."""
    return torch.cat([goal(*slab).sub_(stored(*slab)) @ right for slab in slabs])


def _transposed_times(goal: Rows, stored: Rows, slabs: list[tuple[int, int]], left: Tensor) -> Tensor:
    """error^T @ left, [K, width]."""
    parts = (goal(*slab).sub_(stored(*slab)).t() @ left[slab[0] : slab[1]] for slab in slabs)
    total = next(parts)
    for part in parts:
        total += part
    return total
