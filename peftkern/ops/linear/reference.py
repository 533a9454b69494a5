"""QLoRA linears on one input in plain PyTorch, fp32 accumulation (fp64 for fp64 inputs): the ops' definition,
and their fallback on any device. A single linear is the group of one.

y_i = x W_i^T + bias_i + sum over i's adapters, on their rows: scaling * drop(x) A^T B^T. With
dyb = scaling * dy_i B: dx = sum of dy_i W_i + drop(dyb A), dA = dyb^T drop(x), dB = scaling * dy_i^T xa,
xa = drop(x) A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import accumulation
from ..dequantize.reference import dequantize_4bit
from ..philox import dropout_scale
from .problem import Linear, Needs

__all__ = ["backward", "dense_weight", "forward", "group_backward", "group_forward", "quant_of"]


def dense_weight(weight: Tensor, quant: tuple, n: int, k: int) -> Tensor:
    """fp32 (fp64 stays) [n, k]; `quant` is the op's (code, absmax, ..., blocksize, nested_blocksize)."""
    code, *absmax, blocksize, nested_blocksize = quant
    if code is None:
        return weight if weight.dtype == torch.float64 else weight.float()
    return dequantize_4bit(weight, code, *absmax, (n, k), blocksize, nested_blocksize, torch.float32)


def quant_of(quants, blocksizes, i: int) -> tuple:
    """Member i's part of a group's lists, as `dense_weight` takes it."""
    return (*quants[6 * i : 6 * i + 6], *blocksizes[2 * i : 2 * i + 2])


def _keep(rows: int, k: int, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An adapter's mask, which begins with its rows; None without dropout."""
    return None if seed is None else dropout_scale(rows, k, p, seed).to(dtype)


def _times(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def group_forward(
    x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
):
    """x [M, K] -> [y_i [M, N_i]], [xa fp32 [rows, R]]; lists as in the op's schema."""
    acc, (m, k) = accumulation(x), x.shape
    wide, xa = x.to(acc), []
    y = [
        wide @ dense_weight(weight, quant_of(quants, blocksizes, i), n[i], k).to(acc).t()
        for i, weight in enumerate(weights)
    ]
    for j, member in enumerate(members):
        begin, end = rows[2 * j : 2 * j + 2]
        keep = _keep(end - begin, k, dropout_ps[j], seeds[j], acc)
        xa.append(_times(wide[begin:end], keep) @ lora_a[j].to(acc).t())
        part = scalings[j] * (xa[j] @ lora_b[j].to(acc).t())
        whole = begin == 0 and end == m
        y[member] = y[member] + (part if whole else F.pad(part, (0, 0, begin, m - end)))
    y = [part if bias is None else part + bias.to(acc) for part, bias in zip(y, biases, strict=True)]
    return [part.to(x.dtype) for part in y], xa


def group_backward(dy, x, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """dy_i [M, N_i] (None: not used) -> dx [M, K], fp32 d_bias_i, d_lora_a, d_lora_b; None unless `needs`
    names it. adapters: `group.spec.Adapters`."""
    lora_a, lora_b, members, rows, scalings, dropout_ps, seeds = adapters
    count = len(weights)
    first = next(g for g in dy if g is not None)
    acc = accumulation(first)
    wide = [None if g is None else g.to(acc) for g in dy]
    dx = first.new_zeros((m, k), dtype=acc) if needs[0] else None
    for i, g in enumerate(wide):
        if needs[0] and g is not None:
            dx += g @ dense_weight(weights[i], quant_of(quants, blocksizes, i), g.shape[1], k).to(acc)
    d_bias = [g.sum(0) if g is not None and needs[1 + i] else None for i, g in enumerate(wide)]
    d_a, d_b = [None] * len(members), [None] * len(members)
    for j, member in enumerate(members):
        if wide[member] is None:
            continue
        begin, end = rows[2 * j : 2 * j + 2]
        g, a, b = wide[member][begin:end], lora_a[j].to(acc), lora_b[j].to(acc)
        dyb = scalings[j] * (g @ b)
        keep = _keep(end - begin, k, dropout_ps[j], seeds[j], acc)
        if needs[0]:
            dx[begin:end] += _times(dyb @ a, keep)
        if needs[1 + count + j]:
            d_a[j] = (dyb.t() @ _times(x[begin:end].to(acc), keep)).to(lora_a[j].dtype)
        if needs[1 + count + len(members) + j]:
            d_b[j] = (scalings[j] * (g.t() @ xa[j])).to(lora_b[j].dtype)
    return None if dx is None else dx.to(first.dtype), d_bias, d_a, d_b


def _as_group(one: Linear) -> tuple[list[Tensor], tuple, tuple]:
    return [one.weight], one.quant[:6], one.quant[6:]


def _as_adapters(one: Linear, m: int) -> tuple[list, ...]:
    """A group's lists of adapters; empty without one."""
    if one.lora_a is None:
        return ([],) * 7
    return [one.lora_a], [one.lora_b], [0], [0, m], [one.scaling], [one.dropout_p], [one.seed]


def forward(x: Tensor, one: Linear) -> tuple[Tensor, Tensor]:
    """x [M, K] -> y [M, N] in x's dtype, xa fp32 [M, R] (empty without an adapter)."""
    m = x.shape[0]
    (y,), xa = group_forward(x, *_as_group(one), [one.n], [one.bias], *_as_adapters(one, m))
    return y, xa[0] if xa else x.new_empty((m, 0), dtype=accumulation(x))


def backward(
    dy: Tensor, x: Tensor | None, one: Linear, xa: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy [M, N] -> dx [M, K], d_bias fp32 [N], d_lora_a [R, K], d_lora_b [N, R]; each None unless `needs`
    names it. x is read for d_lora_a, xa (the forward pass's) for d_lora_b; no bias is read."""
    m, adapter = dy.shape[0], one.lora_a is not None
    wanted = needs if adapter else needs[:2]
    group = (*_as_group(one), m, one.k, _as_adapters(one, m), [xa] * adapter, wanted)
    dx, (d_bias,), d_a, d_b = group_backward([dy], x, *group)
    return dx, d_bias, *(d_a or [None]), *(d_b or [None])
