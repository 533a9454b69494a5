"""Which calls the native kernel serves: those it was measured to be faster for than torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import backends
from ..linear import cpu_rows

__all__ = ["FEWEST_QUERIES", "MOST_SCRATCH", "MOST_WIDTH", "available", "native"]

FEWEST_QUERIES = 16  # a tile has 32 rows; of one query torch reads the keys once
MOST_WIDTH = 256
MOST_SCRATCH = 1 << 28  # bytes: packed operands of a head of keys with its heads of queries


def available() -> bool:
    """Whether the level in use of this CPU has the kernel, and it is the faster one there (the row's
    `attention` in ops/linear/config.py, or what `peftkern tune` measured)."""
    if not backends.available("cpu")[0]:
        return False
    return backends.native().attention_served() and cpu_rows.row(backends.native().isa()).attention


def native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether the native kernel takes a call: bf16 on the CPU, [B, H, S, D], one width for k and v, a
    positive scale and no mask or a bool one that all heads share."""
    if not (q.is_cpu and q.dtype == torch.bfloat16 and backends.select(q) == "cpu" and available()):
        return False
    if q.shape[2] < FEWEST_QUERIES:
        return False
    if not 0 < q.shape[3] <= MOST_WIDTH or v.shape[3] != q.shape[3] or not scale > 0.0:
        return False
    if mask is not None and not _shared(mask, q.shape[0], q.shape[2], k.shape[2]):
        return False
    rows = 3 * k.shape[2] + 4 * q.shape[1] // k.shape[1] * q.shape[2]
    return 2 * rows * (q.shape[3] + 31) <= MOST_SCRATCH


def _shared(mask: Tensor, batch: int, queries: int, keys: int) -> bool:
    """Whether it is a bool mask of whole rows, [1 or B, 1, S, T]."""
    return mask.dtype == torch.bool and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, queries, keys)
