"""The hidden states [B, S, D] of texts as one vector a text; differentiable, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POOLS", "pool_last", "pool_mean"]

POOLS = ("mean", "last")


def pool_mean(hidden: Tensor, mask: Tensor | None = None, *, skip_first: bool = True) -> Tensor:
    """The mean over the tokens of each row, without padding and, with `skip_first`, without the first token.

    The first token of a causal model is an attention sink whose norm is some hundred times the others' (Sun
    et al., 2024, Massive Activations). A row of a single token gives that token, a row without any gives
    zeros. Differentiable.

    Args:
        hidden: [B, S, D], any floating dtype.
        mask: [B, S], 1 for a token and 0 for padding on either side; None: all are tokens.
    Returns: [B, D] in fp32 (fp64 for fp64).
    """
    weights = _token_mask(hidden, mask)
    if skip_first:
        first = (weights.cumsum(1) == 1) & (weights == 1)
        weights = weights * ~(first & (weights.sum(1, keepdim=True) > 1))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.bmm(weights[:, None].to(dtype), hidden.to(dtype))[:, 0]
    return sums / weights.sum(1, keepdim=True).clamp(min=1)


def pool_last(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last token of each row that is no padding: [B, D] in fp32 (fp64 for fp64) of hidden [B, S, D].
    Differentiable.
    """
    weights = _token_mask(hidden, mask)
    last = (weights * torch.arange(1, weights.shape[1] + 1, device=weights.device)).argmax(1)
    rows = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return rows.to(torch.promote_types(hidden.dtype, torch.float32))


def _token_mask(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S] of integers; virtual tokens that a prompt puts before the text count as padding."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    virtual = hidden.shape[1] - mask.shape[1]
    if mask.dim() != 2 or len(mask) != len(hidden) or virtual < 0:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected [{hidden.shape[0]}, {hidden.shape[1]}]"
        )
    mask = (mask != 0).long().to(hidden.device)
    return torch.cat([mask.new_zeros(len(mask), virtual), mask], dim=1)
