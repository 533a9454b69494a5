"""Linears with a DoRA adapter each in plain PyTorch, fp32 accumulation (fp64 for fp64 inputs): the op's
definition, and its fallback.

norm = ||W + s B A|| by rows, a constant to autograd; g = magnitude / norm; u = x W^T + s x A^T B^T; y = g u +
bias. du = g dy, dx = sum of du W + s du B A, dA = s (du B)^T x, dB = s du^T xa, xa = x A^T; d_magnitude = sum
of dy u / norm; d_bias = sum of dy.
"""

from __future__ import annotations

import torch

from ... import accumulation
from ..reference import dense_weight, quant_of
from .spec import split_needs

__all__ = ["backward", "forward", "norms", "scaled"]


def forward(x, biases, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, squares, with_u):
    """[y], [u] [M, N] in x's dtype (u None unless asked for), [xa] [M, R], [norm] [N]; `squares` is not
    needed here."""
    operands, wide = (weights, quants, blocksizes, scalings), accumulation(x)
    norm = norms(*operands, lora_a, lora_b, wide)
    u = _products(x, *operands, lora_a, lora_b)
    y = _scale(u, biases, magnitudes, norm)
    xa = [x.to(wide) @ a.to(wide).t() for a in lora_a]
    return (
        [t.to(x.dtype) for t in y],
        [t.to(x.dtype) if wanted else None for t, wanted in zip(u, with_u, strict=True)],
        xa,
        norm,
    )


def scaled(x, weights, quants, blocksizes, scalings, norms, biases, lora_a, lora_b, magnitudes):
    """[y] for given norms."""
    u = _products(x, weights, quants, blocksizes, scalings, lora_a, lora_b)
    return [y.to(x.dtype) for y in _scale(u, biases, magnitudes, norms)]


def norms(weights, quants, blocksizes, scalings, lora_a, lora_b, wide=torch.float32):
    """[||W + s B A|| by rows]."""
    found = []
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        w = dense_weight(weights[i], quant_of(quants, blocksizes, i), b.shape[0], a.shape[1])
        found.append((w.to(wide) + scalings[i] * (b.to(wide) @ a.to(wide))).norm(dim=1))
    return found


def _products(x, weights, quants, blocksizes, scalings, lora_a, lora_b):
    """[u], wide."""
    found, wide = [], accumulation(x)
    for i in range(len(weights)):
        w = dense_weight(weights[i], quant_of(quants, blocksizes, i), lora_b[i].shape[0], x.shape[1])
        w, a, b, x_wide = (t.to(wide) for t in (w, lora_a[i], lora_b[i], x))
        found.append(x_wide @ w.t() + scalings[i] * (x_wide @ a.t() @ b.t()))
    return found


def _scale(u, biases, magnitudes, norm):
    products = [
        part * (magnitude.to(part.dtype) / length)
        for part, magnitude, length in zip(u, magnitudes, norm, strict=True)
    ]
    return [y if bias is None else y + bias.to(y.dtype) for y, bias in zip(products, biases, strict=True)]


def backward(dy, x, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, norms, u, xa, needs):
    """dy_i [M, N_i] (None: not used) -> dx in dy's dtype, fp32 d_bias_i, d_lora_a, d_lora_b in the adapters'
    dtype, fp32 d_magnitude; None unless `needs` names it."""
    count = len(weights)
    need_x, need_bias, need_a, need_b, need_magnitude = split_needs(needs, count)
    first = next(g for g in dy if g is not None)
    wide = accumulation(first)
    dx = first.new_zeros((first.shape[0], lora_a[0].shape[1]), dtype=wide) if need_x else None
    d_bias, d_a, d_b, d_magnitude = ([None] * count for _ in range(4))
    for i, g in enumerate(dy):
        if g is None:
            continue
        g = g.to(wide)
        w = dense_weight(weights[i], quant_of(quants, blocksizes, i), lora_b[i].shape[0], lora_a[i].shape[1])
        w, a, b = (t.to(wide) for t in (w, lora_a[i], lora_b[i]))
        du = g * (magnitudes[i].to(wide) / norms[i])
        dyb = scalings[i] * (du @ b)
        if need_x:
            dx += du @ w + dyb @ a
        d_bias[i] = g.sum(0) if need_bias[i] else None
        d_a[i] = (dyb.t() @ x.to(wide)).to(lora_a[i].dtype) if need_a[i] else None
        d_b[i] = (scalings[i] * (du.t() @ xa[i])).to(lora_b[i].dtype) if need_b[i] else None
        d_magnitude[i] = (g * u[i].to(wide)).sum(0) / norms[i] if need_magnitude[i] else None
    return None if dx is None else dx.to(first.dtype), d_bias, d_a, d_b, d_magnitude
