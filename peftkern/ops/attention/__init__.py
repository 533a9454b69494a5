"""Softmax attention of q, k and v, one op per direction; native on CPUs with bf16 tiles."""

from __future__ import annotations

import torch
from torch import Tensor, library

from .. import LIBRARY, autocast_off, backend, transformed, unobserved
from ..derivatives import derived, twice_differentiable
from ..flops import observe
from ..rope import empty_heads, seq_first
from . import config, reference

__all__ = ["attention", "config"]

LIBRARY.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> "
    "(Tensor y, Tensor lse)"
)
LIBRARY.define(
    "attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? mask, bool causal, "
    "float scale) -> (Tensor dq, Tensor dk, Tensor dv)"
)


@library.impl(LIBRARY, "attention_fwd", "CompositeExplicitAutograd")
def _fwd(q, k, v, mask, causal, scale):
    with autocast_off(q):
        return _backend(q, k, v, mask, scale).forward(q, k, v, mask, causal, scale)


@library.impl(LIBRARY, "attention_bwd", "CompositeExplicitAutograd")
def _bwd(dy, q, k, v, y, lse, mask, causal, scale):
    with autocast_off(dy):
        return _backend(q, k, v, mask, scale).backward(dy, q, k, v, y, lse, mask, causal, scale)


def _backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float):
    return backend("attention", "cpu" if config.native(q, k, v, mask, scale) else "reference")


@library.register_fake("peftkern::attention_fwd", lib=LIBRARY)
def _(q, k, v, mask, causal, scale):
    b, h, s, _ = q.shape
    return q.new_empty(b, s, h, v.shape[3]).transpose(1, 2), q.new_empty(b, h, s, dtype=torch.float32)


@library.register_fake("peftkern::attention_bwd", lib=LIBRARY)
def _(dy, q, k, v, y, lse, mask, causal, scale):
    return tuple(empty_heads(x, seq_first(x)) for x in (q, k, v))


def _again(ctx, dy):
    q, k, v, _, _, mask = ctx.saved_tensors

    def plain(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [reference.forward(q, k, v, mask, ctx.causal, ctx.scale)[0]]

    return (*derived(plain, (q, k, v), ctx.needs_input_grad[:3], (dy,)), None, None, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        run = _fwd if unobserved(q) else torch.ops.peftkern.attention_fwd
        y, lse = run(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, y, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return y

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        q, k, v, y, lse, mask = ctx.saved_tensors
        run = _bwd if unobserved(dy) else torch.ops.peftkern.attention_bwd
        grads = run(dy, q, k, v, y, lse, mask, ctx.causal, ctx.scale)
        needs = ctx.needs_input_grad[:3]
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [B, H, S, D], k and v [B, Hkv, T, D], mask bool [1 or B, 1, S, T] -> y [B, H, S, D];
    `functional.attention` has checked the arguments."""
    if transformed():
        return reference.forward(q, k, v, mask, causal, scale)[0]
    observe()
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, mask, causal, scale)
    run = _fwd if unobserved(q) else torch.ops.peftkern.attention_fwd
    return run(q, k, v, mask, causal, scale)[0]
