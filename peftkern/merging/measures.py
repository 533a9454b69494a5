"""What a merge did to one weight, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from .branches import Branch, fold
from .slabs import Rows, dense_rows, full_precision, row_slabs

__all__ = ["Measures", "measure"]


@dataclass(frozen=True)
class Measures:
    """Norms of one weight: W0 is the base that the adapter was trained on, W the merged weight as stored.

    weight     ||W0||
    delta      ||delta||, what the adapters add to W0
    error      ||W - goal||; goal: the base that was merged into, and what the adapters add to it
    effective  ||W - W0||
    along      <delta, W - W0>, no norm
    mismatch   ||W16 - W0||, of the weight W16 that W0 was quantized from; None where it is not known
    """

    weight: float
    delta: float
    error: float
    effective: float
    along: float
    mismatch: float | None = None

    @property
    def delta_ratio(self) -> float:
        """||delta|| / ||W0||."""
        return _over(self.delta, self.weight)

    @property
    def error_ratio(self) -> float:
        """The error over ||delta||: above 1, rounding moves the weight more than the adapter does."""
        return _over(self.error, self.delta)

    @property
    def survival(self) -> float:
        """<delta, W - W0> / ||delta||^2: 1 where all of delta arrived, 0 where all was rounded away."""
        return _over(self.along, self.delta**2)

    @property
    def cosine(self) -> float:
        """Between delta and W - W0."""
        return _over(self.along, self.delta * self.effective)

    @property
    def mismatch_ratio(self) -> float | None:
        """||W16 - W0|| / ||delta||: what merging into W16 adds that the adapter never saw."""
        return None if self.mismatch is None else _over(self.mismatch, self.delta)

    @classmethod
    def total(cls, parts: Sequence[Measures]) -> Measures:
        """Of several weights as if they were one."""
        names = ("weight", "delta", "error", "effective")
        norms = [[getattr(part, name) for part in parts] for name in names]
        mismatch = [part.mismatch for part in parts]
        known = None if None in mismatch else math.hypot(*mismatch)
        return cls(*(math.hypot(*norm) for norm in norms), sum(part.along for part in parts), known)


@full_precision
def measure(
    weight: NF4Weight | Tensor,
    branches: Sequence[Branch],
    merged: NF4Weight | Tensor,
    *,
    original: Rows | None = None,
    onto_original: bool = False,
    residual: tuple[Tensor, Tensor] | None = None,
) -> Measures:
    """Compare a merged weight with the base that the adapter was trained on, slab by slab.

    Args:
        weight: W0 [N, K], as the adapter was trained on it.
        branches: the adapters.
        merged: W, the merged weight as stored, [N, K].
        original: rows of W16, the weight that W0 was quantized from, for the mismatch.
        onto_original: the branches were merged into W16, not into W0.
        residual: up [N, k] and down [k, K] of an adapter that runs beside W and counts as part of it.
    Returns: Measures; elements are compared in fp32 (fp64 for an fp64 weight), sums over rows are fp64.
    """
    of_weight, of_merged = dense_rows(weight), dense_rows(merged)
    sums = torch.zeros(6, dtype=torch.float64, device=weight.device)
    for start, stop in row_slabs(weight):
        origin, stored = of_weight(start, stop), of_merged(start, stop)
        if residual is not None:
            up, down = (side.to(stored.dtype) for side in (residual[0][start:stop], residual[1]))
            stored = torch.addmm(stored, up, down)
        other = None if original is None else original(start, stop).to(origin.dtype)
        sums += _slab(origin, stored, branches, start, other, onto_original)
    *squares, along, mismatch = sums.tolist()
    known = None if original is None else math.sqrt(mismatch)
    return Measures(*map(math.sqrt, squares), along, known)


def _slab(
    origin: Tensor,
    stored: Tensor,
    branches: Sequence[Branch],
    start: int,
    other: Tensor | None,
    onto_other: bool,
) -> Tensor:
    """Squares of weight, delta, error, effective; along; square of mismatch: fp64 [6]."""
    goal = fold(origin, branches, start)
    delta, effective = goal - origin, stored - origin
    if onto_other and other is not None:
        goal = fold(other, branches, start)
    error = stored - goal
    mismatch = origin.new_zeros(1) if other is None else other - origin
    along = (delta * effective).sum(-1).double().sum()
    squares = [_square(part) for part in (origin, delta, error, effective)]
    return torch.stack([*squares, along, _square(mismatch)])


def _square(part: Tensor) -> Tensor:
    """||part||^2: the norms of its rows in their own dtype, their squares summed in fp64."""
    return torch.linalg.vector_norm(part, dim=-1).double().square().sum()


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
