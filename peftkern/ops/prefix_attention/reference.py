"""Attention with a learned prefix in plain PyTorch: the definition, differentiable by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gated", "joint"]


def joint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """softmax over [q prefix_k^T scale, q k^T scale + mask] of [prefix_v, v]: the prefix is seen by every
    query and never masked.

    q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], prefix_k [Hkv, P, D], prefix_v [Hkv, P, Dv]; mask is
    broadcast to [B, H, S, T], bool (True is seen) or added; `causal`: query i sees the keys 0 ... i. Returns
    [B, H, S, Dv].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
    prefix_k, prefix_v = (each.repeat_interleave(groups, 0) for each in (prefix_k, prefix_v))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(~scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(torch.cat([q @ prefix_k.transpose(-1, -2) * scale, scores], -1), -1)
    length = prefix_k.shape[1]
    return weights[..., :length] @ prefix_v + weights[..., length:] @ v


def gated(y: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """y + tanh(gate) softmax(q prefix_k^T scale) prefix_v: what attention gives for its own keys stays as it
    is.

    y [B, H, S, Dv], q [B, H, S, D], prefix_k [Hkv, P, D], prefix_v [Hkv, P, Dv], gate [H].
    """
    groups = q.shape[1] // prefix_k.shape[0]
    prefix_k, prefix_v = (each.repeat_interleave(groups, 0) for each in (prefix_k, prefix_v))
    weights = torch.softmax(q @ prefix_k.transpose(-1, -2) * scale, -1)
    return y + torch.tanh(gate)[:, None, None] * (weights @ prefix_v)
