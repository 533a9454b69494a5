"""A group of QLoRA linears on one input: each member by the single linear's definition, each further adapter
on its rows alone.

y_i = x W_i^T + bias_i + sum over adapters of i, on their rows: scaling * drop(x) A^T B^T; dx is the sum over
members.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..qlora_linear import reference as single
from ..qlora_linear.reference import dropout_scale

__all__ = ["backward", "forward"]


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x of the adapter's rows alone: its mask begins with them."""
    return x if seed is None else x * dropout_scale(*x.shape, p, seed).to(x.dtype)


def quant_of(quants, blocksizes, i):
    return (*quants[6 * i : 6 * i + 6], *blocksizes[2 * i : 2 * i + 2])


def forward(
    x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
):
    """x [M, K] -> [y_i [M, N_i]], [xa fp32 [rows, R]]."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, y, xa = x.to(acc), [], []
    for i, weight in enumerate(weights):
        dense = single.dense_weight(weight, quant_of(quants, blocksizes, i), n[i], x.shape[1]).to(acc)
        y.append(wide @ dense.t() + (0 if biases[i] is None else biases[i].to(acc)))
    for j, member in enumerate(members):
        begin, end = rows[2 * j : 2 * j + 2]
        xa.append(_dropped(wide[begin:end], dropout_ps[j], seeds[j]) @ lora_a[j].to(acc).t())
        part = scalings[j] * (xa[j] @ lora_b[j].to(acc).t())
        whole = begin == 0 and end == x.shape[0]
        y[member] = y[member] + (part if whole else F.pad(part, (0, 0, begin, x.shape[0] - end)))
    return [part.to(x.dtype) for part in y], xa


def backward(dy, x, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """dy_i [M, N_i] (None: not used) -> dx [M, K], fp32 d_bias_i, d_lora_a, d_lora_b; None unless `needs`
    names it. adapters: `spec.Adapters`."""
    lora_a, lora_b, members, rows, scalings, dropout_ps, seeds = adapters
    count = len(weights)
    first = next(g for g in dy if g is not None)
    acc = torch.float64 if first.dtype == torch.float64 else torch.float32
    wide = [None if g is None else g.to(acc) for g in dy]
    dx = first.new_zeros((m, k), dtype=acc) if needs[0] else None
    for i, g in enumerate(wide):
        if needs[0] and g is not None:
            dx += g @ single.dense_weight(weights[i], quant_of(quants, blocksizes, i), g.shape[1], k).to(acc)
    d_bias = [g.sum(0) if g is not None and needs[1 + i] else None for i, g in enumerate(wide)]
    d_a, d_b = [None] * len(members), [None] * len(members)
    for j, member in enumerate(members):
        if wide[member] is None:
            continue
        begin, end = rows[2 * j : 2 * j + 2]
        g, a, b = wide[member][begin:end], lora_a[j].to(acc), lora_b[j].to(acc)
        dyb = scalings[j] * (g @ b)
        keep = None if seeds[j] is None else dropout_scale(end - begin, k, dropout_ps[j], seeds[j]).to(acc)
        if needs[0]:
            dx[begin:end] += dyb @ a if keep is None else (dyb @ a) * keep
        if needs[1 + count + j]:
            part = x[begin:end].to(acc)
            d_a[j] = (dyb.t() @ (part if keep is None else part * keep)).to(lora_a[j].dtype)
        if needs[1 + count + len(members) + j]:
            d_b[j] = (scalings[j] * (g.t() @ xa[j])).to(lora_b[j].dtype)
    return None if dx is None else dx.to(first.dtype), d_bias, d_a, d_b
