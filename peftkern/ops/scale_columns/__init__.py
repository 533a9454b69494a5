"""y = u * scale + bias by columns: DoRA's magnitude over norm, applied to a linear's output; one op per
direction."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...runtime.backends import select
from .. import LIBRARY, accumulation, backend, transformed
from ..derivatives import derived, stand_in, twice_differentiable
from . import reference

__all__ = ["scale_columns"]

LIBRARY.define("scale_columns_fwd(Tensor u, Tensor scale, Tensor? bias) -> Tensor")
LIBRARY.define(
    "scale_columns_bwd(Tensor dy, Tensor u, Tensor scale, bool[3] needs) -> (Tensor du, Tensor "
    "d_scale, Tensor d_bias)"
)


@library.impl(LIBRARY, "scale_columns_fwd", "CompositeExplicitAutograd")
def _fwd(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return backend("scale_columns", select(u)).forward(u, scale, bias)


@library.impl(LIBRARY, "scale_columns_bwd", "CompositeExplicitAutograd")
def _bwd(dy: Tensor, u: Tensor, scale: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    grads = backend("scale_columns", select(dy)).backward(dy, u, scale, needs)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.register_fake("peftkern::scale_columns_fwd", lib=LIBRARY)
def _(u, scale, bias):
    return u.new_empty(u.shape)


@library.register_fake("peftkern::scale_columns_bwd", lib=LIBRARY)
def _(dy, u, scale, needs):
    sums = [
        dy.new_empty(u.shape[1] if need else 0, dtype=accumulation(u) if need else dy.dtype)
        for need in needs[1:]
    ]
    return (u.new_empty(u.shape) if needs[0] else dy.new_empty(0), *sums)


def _again(ctx, dy):
    (u, scale), needs = ctx.saved_tensors, ctx.needs_input_grad
    bias = stand_in(dy, dy.shape[1:], ctx.bias_dtype) if needs[2] else None

    def plain(*inputs: Tensor | None) -> list[Tensor]:
        return [reference.forward(*inputs)]

    return tuple(derived(plain, (u, scale, bias), needs, (dy,)))


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, scale, bias):
        ctx.save_for_backward(u, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.ops.peftkern.scale_columns_fwd(u, scale, bias)

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad)
        du, d_scale, d_bias = torch.ops.peftkern.scale_columns_bwd(dy.contiguous(), *ctx.saved_tensors, needs)
        return (
            du if needs[0] else None,
            d_scale if needs[1] else None,
            d_bias.to(ctx.bias_dtype) if needs[2] else None,
        )


def scale_columns(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """u [M, N], scale fp32 [N], bias [N] -> [M, N] in u's dtype; the callers have checked the arguments."""
    if transformed():
        return reference.forward(u, scale, bias)
    return _ScaleColumns.apply(u.contiguous(), scale.contiguous(), bias)
