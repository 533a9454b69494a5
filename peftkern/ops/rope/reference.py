"""Rotary position embedding in plain PyTorch: the definition, in the rotate_half convention."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope"]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotate_half_transposed(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, -first], dim=-1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor) -> None:
    """x cos + rotate_half(x) sin over the first Dr of D elements, the others copied, in fp32 and rounded once; q, k [B, H, S, D],
    cos, sin [B or 1, S, Dr]. `inverse`: the transposed map, x cos + rotate_half^T(x sin). Fills the last two arguments."""
    rotary = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    for x, out in ((q, rotated_q), (k, rotated_k)):
        wide = x if x.dtype == torch.float64 else x.float()
        turned = wide[..., :rotary]
        rotated = turned * cos + (_rotate_half_transposed(turned * sin) if inverse else _rotate_half(turned) * sin)
        out.copy_(torch.cat([rotated, wide[..., rotary:]], dim=-1))
