"""Rotary position embedding in plain PyTorch: the definition, in the rotate_half convention."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope", "rotated"]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotate_half_transposed(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, -first], dim=-1)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor
) -> None:
    """x cos + rotate_half(x) sin over the first Dr of D elements, the others copied, in fp32 and rounded
    once; q, k [B, H, S, D], cos, sin [B or 1, S, Dr]. `inverse`: the transposed map, x cos + rotate_half^T(x
    sin). Fills the last two arguments."""
    for x, out in ((q, rotated_q), (k, rotated_k)):
        out.copy_(rotated(x, cos, sin, inverse))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """One of the two."""
    rotary, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]
    wide = x if x.dtype == torch.float64 else x.float()
    turned = wide[..., :rotary]
    part = turned * cos + (_rotate_half_transposed(turned * sin) if inverse else _rotate_half(turned) * sin)
    return torch.cat([part, wide[..., rotary:]], dim=-1).to(x.dtype)
