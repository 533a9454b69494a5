"""Rotary position embedding of q and k together, one op for both directions."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...runtime.backends import select
from .. import LIBRARY, backend, entry, transformed
from . import reference

__all__ = ["empty_heads", "rope", "seq_first"]

# seq_first: whether q's (k's) result lies in memory as [B, S, H, D], else as [B, H, S, D]; its shape is [B,
# H, S, D] in either case.
LIBRARY.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse, bool[2] seq_first) -> (Tensor "
    "rotated_q, Tensor rotated_k)"
)


def seq_first(x: Tensor) -> bool:
    """How [B, H, S, D] lies in memory."""
    return x.stride(2) >= x.stride(1)


def empty_heads(x: Tensor, by_seq: bool) -> Tensor:
    """A new tensor of x's shape, a view of [B, S, H, D] or [B, H, S, D]."""
    b, h, s, d = x.shape
    return x.new_empty(b, s, h, d).transpose(1, 2) if by_seq else x.new_empty(b, h, s, d)


@library.impl(LIBRARY, "rope", "CompositeExplicitAutograd")
def _impl(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, seq_first: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    outs = empty_heads(q, seq_first[0]), empty_heads(k, seq_first[1])
    backend("rope", select(q)).rope(q, k, cos, sin, inverse, *outs)
    return outs


@library.register_fake("peftkern::rope", lib=LIBRARY)
def _(q, k, cos, sin, inverse, seq_first):
    return empty_heads(q, seq_first[0]), empty_heads(k, seq_first[1])


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.seq_first, ctx.inverse = [seq_first(q), seq_first(k)], inverse
        return tuple(entry(q, _impl, "rope")(q, k, cos, sin, inverse, ctx.seq_first))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # to be differentiated again: of a linear map the same with dq, dk
            grads = _RoPE.apply(dq, dk, cos, sin, not ctx.inverse)
        else:  # The gradients lie in memory as q and k do, so that the projections read them without a copy.
            grads = entry(dq, _impl, "rope")(dq, dk, cos, sin, not ctx.inverse, ctx.seq_first)
        return (
            *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
            None,
        )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, Hq, S, D], k [B, Hk, S, D], cos, sin [B or 1, S, Dr]; `functional.rope` has checked the
    arguments."""
    if transformed():
        return reference.rotated(q, cos, sin, False), reference.rotated(k, cos, sin, False)
    if not torch.is_grad_enabled():  # autograd's bookkeeping costs more than one row's arithmetic
        return tuple(entry(q, _impl, "rope")(q, k, cos, sin, False, [seq_first(q), seq_first(k)]))
    return _RoPE.apply(q, k, cos, sin, False)
