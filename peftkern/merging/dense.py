"""A merged weight in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from .branches import Branch, folded_rows
from .slabs import Rows, full_precision, row_slabs

__all__ = ["merge_dense"]


@full_precision
def merge_dense(
    weight: NF4Weight | Tensor,
    branches: Sequence[Branch],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    base: Rows | None = None,
) -> Tensor:
    """W + the branches, computed in fp32 and rounded once.

    Args:
        weight: [N, K], 4-bit (its dequantized values are the base) or dense.
        branches: the adapters, in the order they run.
        dtype: of the result; default: the dense weight's, or the one that the 4-bit weight was quantized
            from.
        base: rows of another base, [n, K] in fp32, to merge into in the place of `weight`.
        out: [N, K] to fill; may be the dense weight itself, or a transposed view.
    Returns: [N, K] of `dtype`; `out` where it is given. Scratch: a few slabs of rows.
    """
    merged = out
    if merged is None:
        merged = torch.empty(tuple(weight.shape), dtype=dtype or weight.dtype, device=weight.device)
    rows = folded_rows(weight, branches, base)
    for start, stop in row_slabs(weight):
        merged[start:stop] = rows(start, stop)
    return merged
