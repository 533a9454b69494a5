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
    "prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor prefix_k, Tensor prefix_v, bool"
    " causal, float scale) -> (Tensor y, Tensor lse)"
)
LIBRARY.define(
    "prefix_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor prefix_k, Tensor"
    " prefix_v, Tensor y, Tensor lse, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor"
    " d_prefix_k, Tensor d_prefix_v)"
)
LIBRARY.define(
    "prefix_gated_fwd(Tensor y, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor gate, float scale) ->"
    " Tensor"
)
LIBRARY.define(
    "prefix_gated_bwd(Tensor dy, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor gate, float scale) "
    "-> (Tensor dq, Tensor d_prefix_k, Tensor d_prefix_v, Tensor d_gate)"
)


@library.impl(LIBRARY, "prefix_attention_fwd", "CompositeExplicitAutograd")
def _fwd(q, k, v, mask, prefix_k, prefix_v, causal, scale):
    with autocast_off(q):
        y, lse = own.forward(q, k, v, mask, causal, scale)
        weights, prefix_lse = _softmax(_scores(_tokens_first(q), prefix_k, scale))
        prefix_lse = prefix_lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
        # Of the two roundings of the lse a share takes a quarter at most, the slope of the sigmoid; exp(lse -
        # total) takes all.
        share = torch.sigmoid(lse - prefix_lse).transpose(1, 2)[..., None]
        joined = torch.lerp(_product(weights, prefix_v, q), _tokens_first(y), share)
        return joined.to(y.dtype).transpose(1, 2), torch.logaddexp(lse, prefix_lse).contiguous()


@library.impl(LIBRARY, "prefix_attention_bwd", "CompositeExplicitAutograd")
def _bwd(dy, q, k, v, mask, prefix_k, prefix_v, y, lse, causal, scale):
    with autocast_off(q):
        tokens, grads = _tokens_first(q), _tokens_first(dy)
        weights, prefix_lse = _softmax(_scores(tokens, prefix_k, scale))
        # As softmax times the prefix's share, which is exactly 1 where a query sees nothing else: the lse is
        # rounded.
        weights.mul_((prefix_lse - lse.transpose(0, 1).reshape(prefix_lse.shape)).exp_())
        d_prefix_v = _summed(weights, grads, prefix_v)
        d_weights = _rows(grads) @ _of_heads(prefix_v, q).transpose(1, 2)
        others = (weights * d_weights).sum(-1).view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
        dq, dk, dv, delta = own.backward(dy, q, k, v, mask, y, lse, causal, scale, others)
        delta = delta.transpose(0, 1).reshape(prefix_lse.shape)
        d_scores = weights.mul_(d_weights.sub_(delta)).mul_(scale)
        d_prefix_k = _summed(d_scores, tokens, prefix_k)
        dq = _product(d_scores, prefix_k, q).add_(dq.transpose(1, 2)).to(q.dtype).transpose(1, 2)
        dk, dv = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (dk, dv))
        return dq, dk, dv, d_prefix_k, d_prefix_v


@library.impl(LIBRARY, "prefix_gated_fwd", "CompositeExplicitAutograd")
def _gated_fwd(y, q, prefix_k, prefix_v, gate, scale):
    with autocast_off(q):
        weights = torch.softmax(_scores(_tokens_first(q), prefix_k, scale), -1)
        added = _product(weights, prefix_v, q)
        added = added.mul_(torch.tanh(gate).to(added.dtype)[:, None]).to(y.dtype)
        return added.add_(y.transpose(1, 2)).transpose(1, 2)


@library.impl(LIBRARY, "prefix_gated_bwd", "CompositeExplicitAutograd")
def _gated_bwd(dy, q, prefix_k, prefix_v, gate, scale):
    with autocast_off(q):
        tokens, grads = _tokens_first(q), _tokens_first(dy)
        weights = torch.softmax(_scores(tokens, prefix_k, scale), -1)
        opened = torch.tanh(gate).to(weights.dtype)
        d_opened = (grads * _product(weights, prefix_v, q)).sum((0, 1, 3))
        grads = grads * opened[:, None]
        d_prefix_v = _summed(weights, grads, prefix_v)
        d_weights = _rows(grads) @ _of_heads(prefix_v, q).transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        d_gate = (d_opened * (1 - opened * opened)).to(gate.dtype)
        dq = _product(d_scores, prefix_k, q).to(q.dtype).transpose(1, 2)
        return dq, _summed(d_scores, tokens, prefix_k), d_prefix_v, d_gate


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, E] as [B, S, H, E], contiguous, in the accumulation dtype: as the projections lay it out."""
    return x.transpose(1, 2).to(accumulation(x)).contiguous()


def _rows(tokens: Tensor) -> Tensor:
    """[B, S, H, E] as [H, B x S, E], a view: a product with a prefix takes all rows of the batch."""
    return tokens.flatten(0, 1).transpose(0, 1)


def _of_heads(prefix: Tensor, q: Tensor) -> Tensor:
    """[Hkv, P, E] as [H, P, E] in the accumulation dtype."""
    return prefix.to(accumulation(q)).repeat_interleave(q.shape[1] // prefix.shape[0], 0)


def _scores(tokens: Tensor, prefix_k: Tensor, scale: float) -> Tensor:
    """[H, B x S, P]."""
    heads = prefix_k.to(tokens.dtype).repeat_interleave(tokens.shape[2] // prefix_k.shape[0], 0)
    return (_rows(tokens) @ heads.transpose(1, 2)).mul_(scale)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of the last dimension and the lse [..., 1]; overwrites the scores."""
    largest = scores.amax(-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    return scores.div_(total), largest + total.log()


def _product(weights: Tensor, prefix: Tensor, q: Tensor) -> Tensor:
    """[H, B x S, P] times a prefix [Hkv, P, E], as [B, S, H, E]."""
    b, h, s, _ = q.shape
    out = weights.new_empty((b * s, h, prefix.shape[-1]))
    torch.bmm(weights, _of_heads(prefix, q), out=out.transpose(0, 1))
    return out.view(b, s, h, -1)


def _summed(weights: Tensor, tokens: Tensor, prefix: Tensor) -> Tensor:
    """The sum over all rows, and over the heads that share keys, of weights [H, B x S, P] times tokens
    [B, S, H, E], as `prefix` is.
    """
    heads = weights.transpose(1, 2) @ _rows(tokens)
    return heads.unflatten(0, (prefix.shape[0], -1)).sum(1).to(prefix.dtype)


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
    return _empty_tokens_first(q, q.shape[-1]), *(
        each.new_empty(each.shape) for each in (prefix_k, prefix_v, gate)
    )


def _again(ctx, dy):
    q, k, v, mask, prefix_k, prefix_v, *_ = ctx.saved_tensors

    def plain(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> list[Tensor]:
        return [
            reference.joint(q, k, v, mask, prefix_k.to(q.dtype), prefix_v.to(q.dtype), ctx.causal, ctx.scale)
        ]

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
        return [
            reference.gated(
                torch.zeros_like(dy), q, *(each.to(q.dtype) for each in (prefix_k, prefix_v, gate)), ctx.scale
            )
        ]

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
