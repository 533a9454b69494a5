"""The QLoRA linear in plain PyTorch, fp32 accumulation (fp64 for fp64 weights): the op's definition, and its
fallback on any device.

y = x W^T + scaling * drop(x) A^T B^T + bias; with dyb = scaling * dy B:
dx = dy W + drop(dyb A), dA = dyb^T drop(x), dB = scaling * dy^T xa / scaling, xa = drop(x) A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dequantize.reference import dequantize_4bit

__all__ = ["backward", "dropout_scale", "forward", "philox_4x32"]

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


def dense_weight(weight: Tensor, quant: tuple, n: int, k: int) -> Tensor:
    """fp32 (fp64 stays) [n, k]; `quant` is the op's (code, absmax, ..., blocksize, nested_blocksize)."""
    code, *absmax, blocksize, nested_blocksize = quant
    if code is None:
        return weight if weight.dtype == torch.float64 else weight.float()
    return dequantize_4bit(weight, code, *absmax, (n, k), blocksize, nested_blocksize, torch.float32)


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> y [M, N] in x's dtype, xa fp32 [M, R] (empty without an adapter)."""
    acc = _accumulation(x)
    m, k = x.shape
    y = x.to(acc) @ dense_weight(weight, quant, n, k).to(acc).t()
    xa = x.new_empty((m, 0), dtype=acc)
    if lora_a is not None:
        dropped = x.to(acc) if seed is None else x.to(acc) * dropout_scale(m, k, dropout_p, seed).to(acc)
        xa = dropped @ lora_a.to(acc).t()
        y = y + scaling * (xa @ lora_b.to(acc).t())
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: tuple,
    k: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy [M, N] -> dx [M, K], d_bias fp32 [N], d_lora_a [R, K], d_lora_b [N, R]; each None unless `needs`
    names it (in that order)."""
    acc = _accumulation(dy)
    (m, n), g = dy.shape, dy.to(acc)
    need_x, need_bias, need_a, need_b = needs
    dx = d_bias = d_a = d_b = None
    keep = None if seed is None else dropout_scale(m, k, dropout_p, seed).to(acc)
    dyb = scaling * (g @ lora_b.to(acc)) if lora_b is not None and (need_x or need_a) else None
    if need_x:
        dx = g @ dense_weight(weight, quant, n, k).to(acc)
        if dyb is not None:
            low_rank = dyb @ lora_a.to(acc)
            dx = dx + (low_rank if keep is None else low_rank * keep)
        dx = dx.to(dy.dtype)
    if need_bias:
        d_bias = g.sum(0)
    if need_a:
        d_a = (dyb.t() @ (x.to(acc) if keep is None else x.to(acc) * keep)).to(lora_a.dtype)
    if need_b:
        d_b = (scaling * (g.t() @ xa)).to(lora_b.dtype)
    return dx, d_bias, d_a, d_b
