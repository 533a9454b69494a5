"""A frozen linear with a DoRA adapter on the CPU, its norm included, one op per direction; on a GPU `dora.py` composes it of others."""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from ...backends import forced, select
from ...nf4 import NF4Weight, operands
from .. import LIBRARY, accumulation, autocast_off, backend
from ..qlora_linear import _QUANT

__all__ = ["dora_linear", "served"]

_OPERANDS = f"Tensor weight, {_QUANT}, Tensor lora_a, Tensor lora_b, float scaling, Tensor magnitude"
LIBRARY.define(
    f"dora_linear_fwd(Tensor x, Tensor? bias, {_OPERANDS}, Tensor squares, bool with_u) -> (Tensor y, Tensor u, Tensor xa, Tensor norm)"
)
LIBRARY.define(
    f"dora_linear_bwd(Tensor dy, Tensor? x, {_OPERANDS}, Tensor norm, Tensor? u, Tensor? xa, bool[5] needs) -> "
    "(Tensor dx, Tensor d_bias, Tensor d_lora_a, Tensor d_lora_b, Tensor d_magnitude)"
)


def served(x: Tensor) -> bool:
    """Whether this op runs for tensors like x. Of no native function, which torch.compile could not trace."""
    return x.device.type == "cpu" and forced() in (None, "cpu", "reference")


@library.impl(LIBRARY, "dora_linear_fwd", "CompositeExplicitAutograd")
def _fwd(x, bias, weight, *args):
    quant, rest = args[:8], args[8:]
    with autocast_off(x):
        y, u, xa, norm = backend("dora_linear", select(x)).forward(x, bias, weight, quant, *rest)
    return y, x.new_empty(0) if u is None else u, xa, norm


@library.impl(LIBRARY, "dora_linear_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, weight, *args):
    quant, rest = args[:8], args[8:]
    with autocast_off(dy):
        grads = backend("dora_linear", select(dy)).backward(dy, x, weight, quant, *rest)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.register_fake("peftkern::dora_linear_fwd", lib=LIBRARY)
def _(x, bias, weight, *args):
    lora_a, lora_b, with_u = args[8], args[9], args[-1]
    wide, shape = accumulation(x), (x.shape[0], lora_b.shape[0])
    u = x.new_empty(shape if with_u else 0)
    return x.new_empty(shape), u, x.new_empty((x.shape[0], lora_a.shape[0]), dtype=wide), x.new_empty(lora_b.shape[0], dtype=wide)


@library.register_fake("peftkern::dora_linear_bwd", lib=LIBRARY)
def _(dy, x, weight, *args):
    lora_a, lora_b, needs = args[8], args[9], args[-1]
    (n, k), wide = (lora_b.shape[0], lora_a.shape[1]), accumulation(dy)
    shapes = ((dy.shape[0], k), (n,), lora_a.shape, lora_b.shape, (n,))
    dtypes = (dy.dtype, wide, lora_a.dtype, lora_b.dtype, wide)
    empty = dy.new_empty
    return tuple(empty(shape, dtype=dtype) if need else empty(0) for shape, dtype, need in zip(shapes, dtypes, needs, strict=True))


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_a, lora_b, magnitude, weight, quant, scaling, squares):
        trained = magnitude.requires_grad
        y, u, xa, norm = torch.ops.peftkern.dora_linear_fwd(x, bias, weight, *quant, lora_a, lora_b, scaling, magnitude, squares, trained)
        code, *absmax, blocksize, nested_blocksize = quant
        inputs = (x if lora_a.requires_grad else None, weight, code, *absmax, lora_a, lora_b, magnitude)
        ctx.save_for_backward(*inputs, norm, u if trained else None, xa if lora_b.requires_grad else None)
        ctx.rest = blocksize, nested_blocksize, scaling
        ctx.dtypes = None if bias is None else bias.dtype, magnitude.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, *quant, lora_a, lora_b, magnitude, norm, u, xa = ctx.saved_tensors
        blocksize, nested_blocksize, scaling = ctx.rest
        needs = list(ctx.needs_input_grad[:5])
        if not any(needs):
            return (None,) * 9
        operands_ = (weight, *quant, blocksize, nested_blocksize, lora_a, lora_b, scaling, magnitude)
        dx, d_bias, d_a, d_b, d_magnitude = torch.ops.peftkern.dora_linear_bwd(dy.contiguous(), x, *operands_, norm, u, xa, needs)
        bias_dtype, magnitude_dtype = ctx.dtypes
        grads = (dx, d_bias.to(bias_dtype) if needs[1] else None, d_a, d_b, d_magnitude.to(magnitude_dtype) if needs[4] else None)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4)


def dora_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    magnitude: Tensor,
    squares: Tensor,
) -> Tensor:
    """x [M, K] -> y [M, N]; `functional.dora_linear` has checked the arguments."""
    data, quant = operands(weight)
    if not torch.is_grad_enabled():
        args = (x.contiguous(), bias, data, *quant, lora_a, lora_b, scaling, magnitude, squares, False)
        return torch.ops.peftkern.dora_linear_fwd(*args)[0]
    return _DoraLinear.apply(x.contiguous(), bias, lora_a, lora_b, magnitude, data, quant, scaling, squares)
