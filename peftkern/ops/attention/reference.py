"""Definition of attention in plain PyTorch, and of its gradients in terms of the rows' log-sum-exp.

Sources: Vaswani et al., 2017, equation 1; Dao, FlashAttention-2, 2023, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import accumulation

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D]; k, v [B, Hkv, T, D]; mask bool [1 or B, 1, S, T], True is seen. y [B, H, S, D], 0 where
    nothing is seen, in memory [B, S, H, D]; lse [B, H, S] = log of the sum of exp(scores), inf where nothing
    is seen."""
    scores, seen = _scores(q, k, mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(seen.any(-1), lse, math.inf)
    y = torch.exp(scores - lse[..., None]) @ _heads(q, v)
    by_rows = torch.empty_strided(
        y.shape, y.transpose(1, 2).contiguous().transpose(1, 2).stride(), dtype=q.dtype, device=q.device
    )
    return (y.to(q.dtype) if y.requires_grad else by_rows.copy_(y)), lse.to(accumulation(q))


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, summed in fp32 (fp64)."""
    wide = accumulation(q)
    p = torch.exp(_scores(q, k, mask, causal, scale)[0] - lse[..., None].to(wide))
    dy, y = dy.to(wide), y.to(wide)
    ds = p * (dy @ _heads(q, v).transpose(-1, -2) - (dy * y).sum(-1, keepdim=True)) * scale
    dq = ds @ _heads(q, k)
    dk, dv = ds.transpose(-1, -2) @ q.to(wide), p.transpose(-1, -2) @ dy
    shared = k.shape[0], k.shape[1], -1, *k.shape[2:]
    return dq.to(q.dtype), dk.reshape(shared).sum(2).to(k.dtype), dv.reshape(shared).sum(2).to(v.dtype)


def _heads(q: Tensor, x: Tensor) -> Tensor:
    """k or v with a head for each of q's."""
    return x.to(accumulation(q)).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """scale q k^T, -inf where not seen; and what is seen."""
    scores = q.to(accumulation(q)) @ _heads(q, k).transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    seen = (seen.tril() if causal else seen).expand(scores.shape)
    seen = seen if mask is None else seen & mask
    return scores.masked_fill(~seen, -math.inf), seen
