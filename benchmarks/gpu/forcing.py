"""The dispatch table's row of this card, to be changed in one field: how a benchmark forces a kernel."""

from __future__ import annotations

import torch

from peftkern.ops.linear import config
from peftkern.runtime import backends

__all__ = ["ALWAYS", "NEVER", "gpu_row"]

NEVER, ALWAYS = 0, 1 << 30  # largest M of a regime; as the smallest (mma_min_m) ALWAYS keeps it out
_WITHOUT_A_CARD = 89


def gpu_row() -> config.GPUConfig:
    return config.GPU_TABLE[
        config.nearest_arch(backends.gpu_arch() if torch.cuda.is_available() else _WITHOUT_A_CARD)
    ]
