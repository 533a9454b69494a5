"""Attention with a learned prefix of keys and values that all samples share, without copying the other keys
and without a copy of the
prefix for each sample: the two softmaxes are computed apart and joined by their denominators."""

from __future__ import annotations

import torch
from torch import Tensor, library

from .. import LIBRARY, accumulation, autocast_off, transformed
from ..derivatives import derived, twice_differentiable
from . import own, reference

__all__ = ["gated", "joint"]

LIBRARY.define(
    "prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor prefix_k, Tensor prefix_v, bool causal, float scale) "
    "-> (Tensor y, Tensor lse)"
)
LIBRARY.define(
    "prefix_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor prefix_k, Tensor prefix_v, Tensor y, Tensor lse, "
    "bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_prefix_k, Tensor d_prefix_v)"
)
LIBRARY.define("prefix_gated_fwd(Tensor y, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor gate, float scale) -> Tensor")
LIBRARY.define(
    "prefix_gated_bwd(Tensor dy, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor gate, float scale) "
    "-> (Tensor dq, Tensor d_prefix_k, Tensor d_prefix_v, Tensor d_gate)"
)


@library.impl(LIBRARY, "prefix_attention_fwd", "CompositeExplicitAutograd")
def _fwd(q, k, v, mask, prefix_k, prefix_v, causal, scale):
    with autocast_off(q):
        y, lse = own.forward(q, k, v, mask, causal, scale)
        scores = _scores(q, prefix_k, scale)
        prefix_lse = _heads(torch.logsumexp(scores, -1, keepdim=True), q)[..., 0]
        # Of the two roundings of the lse a share takes a quarter at most, the slope of the sigmoid; exp(lse -
        # total) takes all.
        share = torch.sigmoid(lse - prefix_lse)[..., None]
        prefix_y = _heads(torch.softmax(scores, -1) @ prefix_v.to(scores.dtype), q)
        joined = torch.lerp(prefix_y, y.to(share.dtype), share)
        return _tokens_first(joined.to(y.dtype)), torch.logaddexp(lse, prefix_lse).contiguous()


@library.impl(LIBRARY, "prefix_attention_bwd", "CompositeExplicitAutograd")
def _bwd(dy, q, k, v, mask, prefix_k, prefix_v, y, lse, causal, scale):
    with autocast_off(q):
        dq, dk, dv = own.backward(dy, q, k, v, mask, y, lse, causal, scale)
        grads, delta = _rows(dy, prefix_k), _rows((dy.to(lse.dtype) * y).sum(-1, keepdim=True), prefix_k)
        scores = _scores(q, prefix_k, scale)
        # As softmax times the prefix's share, which is exactly 1 where a query sees nothing else: the lse is
        # rounded.
        share = (torch.logsumexp(scores, -1, keepdim=True) - _rows(lse[..., None], prefix_k)).exp_()
        weights = torch.softmax(scores, -1).mul_(share)
        d_prefix_v = weights.transpose(1, 2) @ grads
        d_scores = weights.mul_(grads @ prefix_v.to(grads.dtype).transpose(1, 2) - delta).mul_(scale)
        d_prefix_k = d_scores.transpose(1, 2) @ _rows(q, prefix_k)
        dq = (dq + _heads(d_scores @ prefix_k.to(grads.dtype), q)).to(q.dtype)
        dq, dk, dv = (_tokens_first(each) for each in (dq, dk, dv))
        return dq, dk, dv, d_prefix_k.to(prefix_k.dtype), d_prefix_v.to(prefix_v.dtype)


@library.impl(LIBRARY, "prefix_gated_fwd", "CompositeExplicitAutograd")
def _gated_fwd(y, q, prefix_k, prefix_v, gate, scale):
    with autocast_off(q):
        weights = torch.softmax(_scores(q, prefix_k, scale), -1)
        added = _heads(weights @ prefix_v.to(weights.dtype), q) * torch.tanh(gate)[:, None, None].to(
            weights.dtype,
        )
        return _tokens_first(y + added.to(y.dtype))


@library.impl(LIBRARY, "prefix_gated_bwd", "CompositeExplicitAutograd")
def _gated_bwd(dy, q, prefix_k, prefix_v, gate, scale):
    with autocast_off(q):
        weights = torch.softmax(_scores(q, prefix_k, scale), -1)
        wide_k, wide_v, opened = (each.to(weights.dtype) for each in (prefix_k, prefix_v, torch.tanh(gate)))
        d_opened = (dy.to(weights.dtype) * _heads(weights @ wide_v, q)).sum((0, 2, 3))
        grads = _rows(dy.to(weights.dtype) * opened[:, None, None], prefix_k)
        d_prefix_v = weights.transpose(1, 2) @ grads
        d_weights = grads @ wide_v.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        d_prefix_k = d_scores.transpose(1, 2) @ _rows(q, prefix_k)
        d_gate = (d_opened * (1 - opened * opened)).to(gate.dtype)
        dq = _tokens_first(_heads(d_scores @ wide_k, q).to(q.dtype))
        return dq, d_prefix_k.to(prefix_k.dtype), d_prefix_v.to(prefix_v.dtype), d_gate


def _rows(x: Tensor, prefix_k: Tensor) -> Tensor:
    """[B, H, S, E] as [Hkv, H / Hkv x B x S, E] in the accumulation dtype: the products with a prefix sum
    over the whole batch.
    """
    return x.transpose(0, 1).to(accumulation(x)).reshape(prefix_k.shape[0], -1, x.shape[-1])


def _heads(rows: Tensor, q: Tensor) -> Tensor:
    """Rows of `_rows` as [B, H, S, E] again."""
    return rows.reshape(q.shape[1], q.shape[0], q.shape[2], rows.shape[-1]).transpose(0, 1)


def _scores(q: Tensor, prefix_k: Tensor, scale: float) -> Tensor:
    """[Hkv, H / Hkv x B x S, P] in the accumulation dtype."""
    rows = _rows(q, prefix_k)
    return (rows @ prefix_k.to(rows.dtype).transpose(1, 2)).mul_(scale)


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, E] that lies in memory as [B, S, H, E], as the projections around attention have it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_tokens_first(like: Tensor, width: int) -> Tensor:
    b, h, s, _ = like.shape
    return like.new_empty((b, s, h, width)).transpose(1, 2)


@library.register_fake("peftkern::prefix_attention_fwd", lib=LIBRARY)
def _(q, k, v, mask, prefix_k, prefix_v, causal, scale):
    return _empty_tokens_first(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulation(q))


@library.register_fake("peftkern::prefix_attention_bwd", lib=LIBRARY)
def _(dy, q, k, v, mask, prefix_k, prefix_v, y, lse, causal, scale):
    own_grads = (_empty_tokens_first(each, each.shape[-1]) for each in (q, k, v))
    return *own_grads, prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)


@library.register_fake("peftkern::prefix_gated_fwd", lib=LIBRARY)
def _(y, q, prefix_k, prefix_v, gate, scale):
    return _empty_tokens_first(y, y.shape[-1])


@library.register_fake("peftkern::prefix_gated_bwd", lib=LIBRARY)
def _(dy, q, prefix_k, prefix_v, gate, scale):
    return _empty_tokens_first(q, q.shape[-1]), *(each.new_empty(each.shape) for each in (prefix_k, prefix_v, gate))


def _again(ctx, dy):
    q, k, v, mask, prefix_k, prefix_v, *_ = ctx.saved_tensors

    def plain(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> list[Tensor]:
        return [reference.joint(q, k, v, mask, prefix_k.to(q.dtype), prefix_v.to(q.dtype), ctx.causal, ctx.scale)]

    needs = ctx.needs_input_grad
    dq, dk, dv, d_prefix_k, d_prefix_v = derived(
        plain,
        (q, k, v, prefix_k, prefix_v),
        (*needs[:3], *needs[4:6]),
        (dy,),
    )
    return dq, dk, dv, None, d_prefix_k, d_prefix_v, None, None


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, prefix_k, prefix_v, causal, scale):
        y, lse = torch.ops.peftkern.prefix_attention_fwd(q, k, v, mask, prefix_k, prefix_v, causal, scale)
        ctx.save_for_backward(q, k, v, mask, prefix_k, prefix_v, y, lse)
        ctx.causal, ctx.scale = causal, scale
        return y

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        dq, dk, dv, d_prefix_k, d_prefix_v = torch.ops.peftkern.prefix_attention_bwd(
            dy,
            *ctx.saved_tensors,
            ctx.causal,
            ctx.scale,
        )
        return dq, dk, dv, None, d_prefix_k, d_prefix_v, None, None


def _gated_again(ctx, dy):
    q, prefix_k, prefix_v, gate = ctx.saved_tensors

    def plain(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor) -> list[Tensor]:
        return [reference.gated(torch.zeros_like(dy), q, *(each.to(q.dtype) for each in (prefix_k, prefix_v, gate)), ctx.scale)]

    return (dy, *derived(plain, (q, prefix_k, prefix_v, gate), ctx.needs_input_grad[1:5], (dy,)), None)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, q, prefix_k, prefix_v, gate, scale):
        ctx.save_for_backward(q, prefix_k, prefix_v, gate)
        ctx.scale = scale
        return torch.ops.peftkern.prefix_gated_fwd(y, q, prefix_k, prefix_v, gate, scale)

    @staticmethod
    @twice_differentiable(_gated_again)
    def backward(ctx, dy):
        return (dy, *torch.ops.peftkern.prefix_gated_bwd(dy, *ctx.saved_tensors, ctx.scale), None)


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
    """[B, H, S, Dv] as the reference's; `functional.prefix_attention` has checked the arguments.

    Saved for backward: what attention without a prefix saves (q, k, v, the mask, y, the lse).
    """
    if transformed():
        return reference.joint(q, k, v, mask, prefix_k.to(q.dtype), prefix_v.to(q.dtype), causal, scale)
    return _Joint.apply(q, k, v, mask, prefix_k, prefix_v, causal, scale)


def gated(y: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """As the reference's; where the gate is 0, y bit for bit (of a zero perhaps the sign). Saved for
    backward: q and the prefix.
    """
    if transformed():
        return reference.gated(y, q, prefix_k.to(q.dtype), prefix_v.to(q.dtype), gate.to(q.dtype), scale)
    return _Gated.apply(y, q, prefix_k, prefix_v, gate, scale)
