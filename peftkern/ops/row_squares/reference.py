"""||W||^2 of each row in plain PyTorch: the sum of the squares of the decoded weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dequantize import reference

__all__ = ["row_squares"]

_SLICE = 1 << 22  # weights squared at a time: 16 MB of fp32


def row_squares(
    weight: Tensor,
    code: Tensor | None,
    absmax: Tensor | None,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    nested_absmax: Tensor | None,
    absmax_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    n: int,
    k: int,
) -> Tensor:
    """weight: the packed bytes of W [n, k], or, where code is None, W itself, fp32, bf16 or fp16 -> fp32
    [n]."""
    if code is not None:
        quant = (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset)
        weight = reference.dequantize_4bit(weight, *quant, (n, k), blocksize, nested_blocksize, torch.float32)
    # By way of the norm, whose square's root is itself: with B = 0 DoRA's norm has the bits PEFT starts the
    # magnitude with.
    rows = weight.split(max(1, _SLICE // max(1, k)))
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1).square() for part in rows])
