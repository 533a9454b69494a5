"""The low-rank branch alone, added onto the output of any base layer: for bases whose product is another
library's."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ... import LIBRARY, accumulation, autocast_off, backend, serving, transformed
from ...derivatives import derived, known_input, stand_in, twice_differentiable
from ...flops import observe
from . import reference

__all__ = ["lora_add"]

LIBRARY.define(
    "lora_add_fwd(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling, float "
    "dropout_p, Tensor? seed) "
    "-> (Tensor out, Tensor xa)"
)
LIBRARY.define(
    "lora_add_bwd(Tensor dy, Tensor? x, Tensor lora_a, Tensor lora_b, Tensor? xa, float scaling, float "
    "dropout_p, Tensor? seed, "
    "bool[4] needs) -> (Tensor dx, Tensor d_bias, Tensor d_lora_a, Tensor d_lora_b)"
)


@library.impl(LIBRARY, "lora_add_fwd", "CompositeExplicitAutograd")
def _fwd(y, x, lora_a, lora_b, *args):
    with autocast_off(x):
        return backend("linear.lora_add", serving(x, lora_a, lora_b)).forward(y, x, lora_a, lora_b, *args)


@library.impl(LIBRARY, "lora_add_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, lora_a, lora_b, *args):
    with autocast_off(dy):
        grads = backend("linear.lora_add", serving(dy, lora_a, lora_b)).backward(dy, x, lora_a, lora_b, *args)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.register_fake("peftkern::lora_add_fwd", lib=LIBRARY)
def _(y, x, lora_a, *args):
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, x.new_empty((x.shape[0], lora_a.shape[0]), dtype=accumulation(x))


@library.register_fake("peftkern::lora_add_bwd", lib=LIBRARY)
def _(dy, x, lora_a, lora_b, xa, scaling, dropout_p, seed, needs):
    like = (
        lambda: dy.new_empty((dy.shape[0], lora_a.shape[1])),
        lambda: dy.new_empty(dy.shape[1], dtype=accumulation(dy)),
        lambda: torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        lambda: torch.empty_like(lora_b, memory_format=torch.contiguous_format),
    )
    return tuple(make() if need else dy.new_empty(0) for make, need in zip(like, needs, strict=True))


def _again(ctx, dy):
    x, lora_a, lora_b, _, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:5]
    x = known_input("lora_add", x, dy, (dy.shape[0], lora_a.shape[1]), needs[3])
    bias = stand_in(dy, dy.shape[1:], ctx.bias_dtype) if needs[1] else None

    def plain(x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> list[Tensor]:
        return [
            reference.forward(
                torch.zeros_like(dy), x, lora_a, lora_b, bias, ctx.scaling, ctx.dropout_p, seed
            )[0]
        ]

    return (dy, *derived(plain, (x, bias, lora_a, lora_b), needs, (dy,)), None, None, None)


class _LoRAAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, bias, lora_a, lora_b, scaling, dropout_p, seed):
        out, xa = torch.ops.peftkern.lora_add_fwd(y, x, lora_a, lora_b, bias, scaling, dropout_p, seed)
        # x is wanted by dA alone, xa by dB alone: what no gradient needs is not kept.
        kept = (
            x if lora_a.requires_grad else None,
            lora_a,
            lora_b,
            xa if lora_b.requires_grad else None,
            seed,
        )
        ctx.save_for_backward(*kept)
        ctx.scaling, ctx.dropout_p, ctx.bias_dtype = scaling, dropout_p, None if bias is None else bias.dtype
        return out

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        x, lora_a, lora_b, xa, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:5])
        if not any(needs):
            return (dy, *(None,) * 7)
        args = (lora_a, lora_b, xa, ctx.scaling, ctx.dropout_p, seed, needs)
        dx, d_bias, d_a, d_b = torch.ops.peftkern.lora_add_bwd(dy.contiguous(), x, *args)
        grads = (dx, d_bias.to(ctx.bias_dtype) if needs[1] else None, d_a, d_b)
        return (dy, *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 3)


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """y [M, N], x [M, K] -> [M, N]; `functional.lora_add` has checked the arguments."""
    if transformed():
        return reference.forward(y, x, lora_a, lora_b, bias, scaling, dropout_p, seed)[0]
    observe()
    return _LoRAAdd.apply(y.contiguous(), x.contiguous(), bias, lora_a, lora_b, scaling, dropout_p, seed)
