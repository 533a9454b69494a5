"""Dropout's random numbers and mask in plain PyTorch: the definition (docs/numerics.md) of what
`triton_philox.py` and csrc/philox.h draw."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_scale", "philox_4x32"]

_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for a in [0, 2**32) held in int64."""
    a_hi, a_lo = a >> 16, a & 0xFFFF
    b_hi, b_lo = b >> 16, b & 0xFFFF
    middle = a_hi * b_lo + ((a_lo * b_lo) >> 16)
    carry = (middle & 0xFFFF) + a_lo * b_hi
    return a_hi * b_hi + (middle >> 16) + (carry >> 16), ((carry & 0xFFFF) << 16) | ((a_lo * b_lo) & 0xFFFF)


def philox_4x32(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four int64 tensors holding uint32 counters, int64 seed as the key
    -> four uint32 in int64."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def dropout_scale(m: int, k: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The mask times 1/(1-p), fp32 [m, k]: element (i, j) is the (j % 8)-th 16-bit half of philox(counter =
    (j // 8, i, 0, 0))."""
    threshold = round(dropout_p * 65536)
    if threshold >= 65536:
        return torch.zeros(m, k, dtype=torch.float32, device=seed.device)
    column = torch.arange((k + 7) // 8, dtype=torch.int64, device=seed.device).expand(m, -1)
    row = torch.arange(m, dtype=torch.int64, device=seed.device)[:, None].expand_as(column)
    zero = torch.zeros_like(column)
    words = torch.stack(philox_4x32([column, row, zero, zero], seed.reshape(())), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :k]
    return (halves >= threshold).float() * (65536.0 / (65536 - threshold))
