"""Attention with a soft cap on its scores, whole and in plain torch: what `capped_attention` has to compute.

s = scale * q k^T, c = cap * tanh(s / cap) or s, p = softmax(c + mask), out = p v."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with every score in memory, in the dtype given; autograd differentiates it.

    Args:
        q: [B, nH, S, d]. k: [B, nKV, S', d]. v: [B, nKV, S', e]; nKV divides nH.
        mask: added to the capped scores, broadcast to [B, nH, S, S'].
        softcap: scores lie between -softcap and softcap; None for no cap.
        is_causal: row i reads the keys up to i. window: and of these the last `window`.
        scale: None for 1 / sqrt(d).
    Returns: [B, nH, S, e].
    """
    heads = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    if is_causal:
        scores = scores.masked_fill(distance.to(q.device) < 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(distance.to(q.device) >= window, -torch.inf)
    return scores.softmax(-1) @ v
