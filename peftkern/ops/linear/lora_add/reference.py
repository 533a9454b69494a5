"""The low-rank branch alone in plain PyTorch, fp32 accumulation (fp64 for fp64): the op's definition, and its
fallback on any device.

out = y + scaling * drop(x) A^T B^T + bias; with g = d out and dyb = scaling * g B:
dy = g, dx = drop(dyb A), dA = dyb^T drop(x), dB = scaling * g^T xa, xa = drop(x) A^T, d_bias = sum of g over
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...philox import dropout_scale

__all__ = ["backward", "forward"]


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    wide = x.to(_accumulation(x))
    return wide if seed is None else wide * dropout_scale(*x.shape, dropout_p, seed).to(wide.dtype)


def forward(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M, N], x [M, K] -> out [M, N] in y's dtype, xa fp32 [M, R]; y is left as it is."""
    acc = _accumulation(x)
    xa = _dropped(x, dropout_p, seed) @ lora_a.to(acc).t()
    out = y.to(acc) + scaling * (xa @ lora_b.to(acc).t())
    if bias is not None:
        out = out + bias.to(acc)
    return out.to(y.dtype), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy [M, N] -> dx [M, K], d_bias fp32 [N], d_lora_a [R, K], d_lora_b [N, R]; each None unless `needs`
    names it (in that order)."""
    acc = _accumulation(dy)
    g, a, b = dy.to(acc), lora_a.to(acc), lora_b.to(acc)
    dyb = scaling * (g @ b)
    dx = d_bias = d_a = d_b = None
    if needs[0]:
        dx = dyb @ a
        if seed is not None:
            dx = dx * dropout_scale(*dx.shape, dropout_p, seed).to(acc)
        dx = dx.to(dy.dtype)
    if needs[1]:
        d_bias = g.sum(0)
    if needs[2]:
        d_a = (dyb.t() @ _dropped(x, dropout_p, seed)).to(lora_a.dtype)
    if needs[3]:
        d_b = (scaling * (g.t() @ xa)).to(lora_b.dtype)
    return dx, d_bias, d_a, d_b
