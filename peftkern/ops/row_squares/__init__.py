"""||W||^2 of each row of a weight, 4-bit or dense: what DoRA's norm is made of."""

from __future__ import annotations

import torch
from torch import Tensor, library

from .. import LIBRARY, backend, serving, transformed, unobserved
from . import reference

__all__ = ["row_squares"]

LIBRARY.define(
    "row_squares(Tensor weight, Tensor? code, Tensor? absmax, Tensor? absmax_8bit, Tensor? absmax_code, "
    "Tensor? nested_absmax, "
    "Tensor? absmax_offset, int blocksize, int nested_blocksize, SymInt n, SymInt k) -> Tensor"
)


@library.impl(LIBRARY, "row_squares", "CompositeExplicitAutograd")
def _impl(weight: Tensor, *args: object) -> Tensor:
    return backend("row_squares", serving(weight, weight)).row_squares(weight, *args)


@library.register_fake("peftkern::row_squares", lib=LIBRARY)
def _(
    weight,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    blocksize,
    nested_blocksize,
    n,
    k,
):
    return weight.new_empty(n, dtype=torch.float32)


def row_squares(weight: Tensor, quant: tuple, n: int, k: int) -> Tensor:
    """fp32 [n] of a weight [n, k] as `nf4.operands` gives it; no gradient."""
    if transformed():
        return reference.row_squares(weight, *quant, n, k)
    run = _impl if unobserved(weight) else torch.ops.peftkern.row_squares
    return run(weight, *quant, n, k)
