"""The QLoRA linear: a frozen 4-bit (or dense) linear with its trainable low-rank branch, one op per
direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from ...runtime.abi import addresses
from ...runtime.backends import select
from .. import LIBRARY, accumulation, autocast_off, backend, transformed, undispatched, unobserved
from ..derivatives import derived, known_input, stand_in, twice_differentiable
from ..flops import observe
from . import reference
from .problem import Linear, Needs

__all__ = ["apply", "prepared"]

QUANT_SCHEMA = (
    "Tensor? code, Tensor? absmax, Tensor? absmax_8bit, Tensor? absmax_code, Tensor? nested_absmax, "
    "Tensor? absmax_offset, "
)
QUANT_SCHEMA += "int blocksize, int nested_blocksize"

LIBRARY.define(
    f"qlora_linear_fwd(Tensor x, Tensor weight, {QUANT_SCHEMA}, SymInt n, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, "
    "float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    f"qlora_linear_bwd(Tensor dy, Tensor? x, Tensor weight, {QUANT_SCHEMA}, SymInt k, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? xa, "
    "float scaling, float dropout_p, Tensor? seed, bool[4] needs) -> (Tensor dx, Tensor d_bias, Tensor "
    "d_lora_a, Tensor d_lora_b)"
)


def _forward(x: Tensor, one: Linear) -> tuple[Tensor, Tensor]:
    with autocast_off(x):
        name = select(x) if one.weight.numel() else "reference"
        return backend("linear", name).forward(x, one)


def _backward(
    dy: Tensor, x: Tensor | None, one: Linear, xa: Tensor | None, needs: Needs
) -> tuple[Tensor | None, ...]:
    with autocast_off(dy):
        return backend("linear", select(dy) if one.weight.numel() else "reference").backward(
            dy, x, one, xa, needs
        )


@library.impl(LIBRARY, "qlora_linear_fwd", "CompositeExplicitAutograd")
def _fwd(x, weight, *args):
    return _forward(x, Linear(weight, args[:8], args[8], x.shape[1], *args[9:]))


@library.impl(LIBRARY, "qlora_linear_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, weight, *args):
    quant, (k, lora_a, lora_b, xa, scaling, dropout_p, seed, needs) = args[:8], args[8:]
    one = Linear(weight, quant, dy.shape[1], k, None, lora_a, lora_b, scaling, dropout_p, seed)
    grads = _backward(dy, x, one, xa, Needs(*needs))
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.register_fake("peftkern::qlora_linear_fwd", lib=LIBRARY)
def _(x, weight, *args):
    n, lora_a = args[8], args[10]
    rank = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], rank), dtype=accumulation(x))


@library.register_fake("peftkern::qlora_linear_bwd", lib=LIBRARY)
def _(dy, x, weight, *args):
    k, lora_a, lora_b, needs = args[8], args[9], args[10], args[-1]
    like = (
        lambda: dy.new_empty((dy.shape[0], k)),
        lambda: dy.new_empty(dy.shape[1], dtype=accumulation(dy)),
        lambda: torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        lambda: torch.empty_like(lora_b, memory_format=torch.contiguous_format),
    )
    return tuple(make() if need else dy.new_empty(0) for make, need in zip(like, needs, strict=True))


def _again(ctx, dy):
    x, weight, *quant, lora_a, lora_b, _, seed = ctx.saved_tensors
    needs, n = ctx.needs_input_grad[:4], dy.shape[-1]
    x = known_input("qlora_linear", x, dy, (dy.shape[:-1].numel(), ctx.k), needs[3])
    bias = stand_in(dy, (n,), ctx.bias_dtype) if needs[1] else None
    quant = (*quant, ctx.blocksize, ctx.nested_blocksize)

    def plain(x: Tensor, *trainable: Tensor | None) -> list[Tensor]:
        one = Linear(weight, quant, n, ctx.k, *trainable, ctx.scaling, ctx.dropout_p, seed)
        return [reference.forward(x, one)[0].view(dy.shape)]

    return (*derived(plain, (x, bias, lora_a, lora_b), needs, (dy,)), *(None,) * 4)


class _QLoRALinear(torch.autograd.Function):
    """described, lead: of a linear that a backend has described before, and the leading sizes of y, which is
    [M, N] without."""

    @staticmethod
    def forward(ctx, x, bias, lora_a, lora_b, fixed, seed, described, lead):
        weight, quant, n, scaling, dropout_p = fixed
        rest = bias, lora_a, lora_b, scaling, dropout_p, seed
        if described is not None:
            y, xa = described.forward(x, lead, seed)
        elif unobserved(x):
            y, xa = _forward(x, Linear(weight, quant, n, x.shape[1], *rest))
        else:
            y, xa = torch.ops.peftkern.qlora_linear_fwd(x, weight, *quant, n, *rest)
        need_a, need_b = (
            (lora_a is not None and lora_a.requires_grad),
            (lora_b is not None and lora_b.requires_grad),
        )
        code, *absmax, ctx.blocksize, ctx.nested_blocksize = quant
        # x is wanted by dA alone, xa by dB alone: what no gradient needs is not kept.
        ctx.save_for_backward(
            x if need_a else None, weight, code, *absmax, lora_a, lora_b, xa if need_b else None, seed
        )
        ctx.k, ctx.scaling, ctx.dropout_p, ctx.described = x.shape[1], scaling, dropout_p, described
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        x, weight, *quant, lora_a, lora_b, xa, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if not any(needs):
            return (None,) * 8
        quant = *quant, ctx.blocksize, ctx.nested_blocksize
        low, known = (ctx.scaling, ctx.dropout_p, seed), ctx.described
        if (
            known is not None
            and unobserved(dy)
            and known.at == addresses((weight, *quant[:6], lora_a, lora_b))
        ):
            dx, d_bias, d_a, d_b = known.backward(dy, x, xa, needs, seed)
            return dx, None if d_bias is None else d_bias.to(ctx.bias_dtype), d_a, d_b, *(None,) * 4
        dy = dy.contiguous() if known is None else dy.reshape(-1, dy.shape[-1])
        if unobserved(dy):
            one = Linear(weight, quant, dy.shape[1], ctx.k, None, lora_a, lora_b, *low)
            dx, d_bias, d_a, d_b = _backward(dy, x, one, xa, Needs(*needs))
        else:
            args = (dy, x, weight, *quant, ctx.k, lora_a, lora_b, xa, *low, needs)
            dx, d_bias, d_a, d_b = torch.ops.peftkern.qlora_linear_bwd(*args)
        grads = (dx, d_bias.to(ctx.bias_dtype) if needs[1] else None, d_a, d_b)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4)


def apply(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """x [M, K] -> y [M, N]; weight, quant as `formats.nf4.operands` gives them. `functional.qlora_linear` has
    checked the arguments."""
    if transformed():
        one = Linear(weight, quant, n, x.shape[1], bias, lora_a, lora_b, scaling, dropout_p, seed)
        return reference.forward(x, one)[0]
    observe()
    if torch.is_grad_enabled():
        fixed = weight, quant, n, scaling, dropout_p
        return _QLoRALinear.apply(x.contiguous(), bias, lora_a, lora_b, fixed, seed, None, None)
    x = x.contiguous()
    if unobserved(x):
        one = Linear(weight, quant, n, x.shape[1], bias, lora_a, lora_b, scaling, dropout_p, seed)
        return _forward(x, one)[0]
    rest = bias, lora_a, lora_b, scaling, dropout_p, seed
    return torch.ops.peftkern.qlora_linear_fwd(x, weight, *quant, n, *rest)[0]


def prepared(
    weight: Tensor,
    quant: tuple,
    n: int,
    k: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Callable[..., Tensor]:
    """`apply` for calls to come, of x [..., K], with dropout of a seed too, which give y [..., N]: what a
    backend can say of the linear beforehand is said once. The tensors are held; they stay where and what they
    are."""
    one = Linear(weight, quant, n, k, bias, lora_a, lora_b, scaling, dropout_p)
    fixed, rest = (weight, quant, n, scaling, dropout_p), (bias, lora_a, lora_b, scaling, dropout_p)
    known: dict[str, Any] = {}  # by the backend

    def run(x: Tensor, seed: Tensor | None = None) -> Tensor:
        lead = x.shape[:-1]
        flat = (x if len(lead) == 1 else x.reshape(lead.numel(), k)).contiguous()
        name = select(x) if undispatched(x) else "reference"
        if name not in known:
            known[name] = None if name == "reference" else backend("linear", name).held(one)
        described = known[name]
        if described is not None:
            if torch.is_grad_enabled():
                return _QLoRALinear.apply(flat, bias, lora_a, lora_b, fixed, seed, described, lead)
            return described.forward(flat, lead, seed)[0]
        return apply(flat, weight, quant, n, *rest, seed).reshape(*lead, n)

    return run
