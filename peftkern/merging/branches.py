"""What adapters add to a weight: low-rank branches in turn, as PEFT's forward in evaluation runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from .slabs import Rows, dense_rows, full_precision, row_slabs

__all__ = ["Branch", "fold", "folded_bias", "folded_rows"]


class Branch(NamedTuple):
    """One adapter of one linear.

    up         [N, R], the scaling in it: s B
    down       [R, K]: A
    magnitude  [N] of DoRA, else None
    bias       [N] of `lora_bias`, the scaling in it, else None
    """

    up: Tensor
    down: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None


def fold(base: Tensor, branches: Sequence[Branch], start: int = 0) -> Tensor:
    """Rows of the merged weight, [n, K] in base's dtype, for the rows `start` ... of the base weight, [n, K].

    W <- W + s B A for LoRA; W <- g (W + s B A), g = magnitude / ||W0 + s B A|| of each row, for DoRA: the
    norm is that of the base alone, however many adapters there are.

    Source: LoRA (Hu et al., 2021), section 4.1; DoRA (Liu et al., 2024), equation 5.
    """
    merged, rows = base.clone(), slice(start, start + base.shape[0])
    for branch in branches:
        up, down = branch.up[rows].to(base.dtype), branch.down.to(base.dtype)
        gain = _gain(base, branch, start)
        merged.addmm_(up, down)
        if gain is not None:
            merged.mul_(gain[:, None])
    return merged


def folded_rows(
    weight: NF4Weight | Tensor,
    branches: Sequence[Branch],
    base: Rows | None = None,
) -> Rows:
    """What gives rows of the merged weight, on `weight` or on the rows of another base."""
    rows = dense_rows(weight) if base is None else base
    return lambda start, stop: fold(rows(start, stop), branches, start)


@full_precision
def folded_bias(weight: NF4Weight | Tensor, branches: Sequence[Branch], bias: Tensor) -> Tensor:
    """The merged bias [N], in bias's dtype: DoRA scales what the branches before it added."""
    rows, work = dense_rows(weight), torch.promote_types(bias.dtype, torch.float32)
    added = torch.zeros_like(bias, dtype=work)
    for index, branch in enumerate(branches):
        if branch.bias is not None:
            added += branch.bias
        if branch.magnitude is None or not any(earlier.bias is not None for earlier in branches[:index]):
            continue
        for start, stop in row_slabs(weight):
            added[start:stop] *= _gain(rows(start, stop), branch, start)
    return (bias + added).to(bias.dtype)


def _gain(base: Tensor, branch: Branch, start: int) -> Tensor | None:
    """By what a DoRA branch scales each of the rows."""
    if branch.magnitude is None:
        return None
    rows = slice(start, start + base.shape[0])
    updated = torch.addmm(base, branch.up[rows].to(base.dtype), branch.down.to(base.dtype))
    return branch.magnitude[rows].to(base.dtype) / torch.linalg.vector_norm(updated, dim=1)
