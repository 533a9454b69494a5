"""RMSNorm with the two orders of casting that models use, one op per direction."""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from ...backends import select
from .. import LIBRARY, backend, unobserved

__all__ = ["CASTS", "result_dtype", "rms_norm"]

CASTS = ("llama", "gemma")  # in the order of the C ABI's pk_cast

LIBRARY.define("rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, str cast) -> (Tensor y, Tensor rstd)")
LIBRARY.define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, str cast, bool[2] needs) -> (Tensor dx, Tensor d_weight)"
)


def result_dtype(x: Tensor, weight: Tensor, cast: str) -> torch.dtype:
    """Of y: in the "llama" order a product of a tensor of x's dtype with the weight promotes as PyTorch does."""
    return torch.promote_types(x.dtype, weight.dtype) if cast == "llama" else x.dtype


@library.impl(LIBRARY, "rms_norm_fwd", "CompositeExplicitAutograd")
def _fwd(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    return backend("rms_norm", select(x)).forward(x, weight, eps, offset, cast)


@library.impl(LIBRARY, "rms_norm_bwd", "CompositeExplicitAutograd")
def _bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    grads = backend("rms_norm", select(x)).backward(dy, x, weight, rstd, offset, cast, needs)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.register_fake("peftkern::rms_norm_fwd", lib=LIBRARY)
def _(x, weight, eps, offset, cast):
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape, dtype=result_dtype(x, weight, cast)), rstd


@library.register_fake("peftkern::rms_norm_bwd", lib=LIBRARY)
def _(dy, x, weight, rstd, offset, cast, needs):
    return x.new_empty(x.shape) if needs[0] else dy.new_empty(0), weight.new_empty(weight.shape) if needs[1] else dy.new_empty(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast):
        y, rstd = torch.ops.peftkern.rms_norm_fwd(x, weight, eps, offset, cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast = offset, cast
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:2])
        dx, d_weight = torch.ops.peftkern.rms_norm_bwd(dy, *ctx.saved_tensors, ctx.offset, ctx.cast, needs)
        return dx if needs[0] else None, d_weight if needs[1] else None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> Tensor:
    """x [..., N], weight [N] -> [..., N]; `functional.rms_norm` has checked the arguments."""
    if not torch.is_grad_enabled():  # autograd's bookkeeping costs more than one row's arithmetic
        return (_fwd if unobserved(x) else torch.ops.peftkern.rms_norm_fwd)(x, weight, eps, offset, cast)[0]
    return _RMSNorm.apply(x, weight, eps, offset, cast)
