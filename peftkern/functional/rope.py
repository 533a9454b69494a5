"""Rotary position embeddings."""

from __future__ import annotations

from torch import Tensor

from ..ops import rope as _rope
from . import checks

__all__ = ["rope"]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys: x cos + rotate_half(x) sin, where rotate_half([x1, x2])
    = [-x2, x1].

    Computed in fp32 and rounded once; PyTorch's own arithmetic in 16 bits rounds three times.

    Args:
        q: [B, Hq, S, D], fp32, bf16 or fp16, any strides; k: [B, Hk, S, D], q's dtype. Usually transposed
            views of [B, S, H * D].
        cos, sin: [B or 1, S, Dr], one dtype of the three; Dr is even and at most D, elements of q and k from
            Dr on are copied (partial rotation). They get no gradient.
    Returns: rotated q and k, in their shapes and dtype, lying in memory as q and k do ([B, S, H, D] or [B, H,
    S, D]), so that the reshape
        after attention needs no copy; the gradients do as well. Saved for backward: cos and sin.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: RoFormer (Su et al., 2021), section 3.2; the order of elements is GPT-NeoX's.

    >>> q, k = torch.randn(2, 7, 4, 16).transpose(1, 2), torch.randn(2, 7, 2, 16).transpose(1, 2)
    >>> angles = torch.rand(1, 7, 16)
    >>> [tuple(x.shape) for x in rope(q, k, angles.cos(), angles.sin())]
    [(2, 4, 7, 16), (2, 2, 7, 16)]
    """
    for name, value in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        checks.floating(name, value)
        if value.device != q.device:
            raise ValueError(f"{name}: is on {value.device}, q is on {q.device}; move one of them")
    _check_heads(q, k)
    b, _, s, d = q.shape
    if (
        cos.dim() != 3
        or cos.shape[0] not in (1, b)
        or cos.shape[1] != s
        or cos.shape[2] > d
        or cos.shape[2] % 2
    ):
        raise ValueError(
            f"cos: got shape {tuple(cos.shape)}, expected [{b} or 1, {s}, an even number up to {d}]"
        )
    if (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
        raise ValueError(
            f"sin: got {sin.dtype} {tuple(sin.shape)}, expected cos's {cos.dtype} {tuple(cos.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos, sin: require grad, but angles get none here; detach them")
    return _rope.rope(q, k, cos, sin)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [batch, heads, seq, dim]")
    b, _, s, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (b, s, d):
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected [{b}, heads, {s}, {d}]")
    if k.dtype != q.dtype:
        raise ValueError(f"k: got {k.dtype}, q is {q.dtype}; both must have one dtype")
