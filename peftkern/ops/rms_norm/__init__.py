"""RMSNorm with the two orders of casting that models use, one op per direction; alone, or of the next sum of
a residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...runtime.backends import select
from .. import LIBRARY, backend, entry, transformed, unobserved
from ..derivatives import derived, twice_differentiable
from . import reference

__all__ = ["CASTS", "add_rms_norm", "result_dtype", "rms_norm"]

CASTS = ("llama", "gemma")  # in the order of the C ABI's pk_cast

LIBRARY.define(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, str cast) -> (Tensor y, Tensor rstd)"
)
LIBRARY.define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, str cast, bool[2] "
    "needs) -> (Tensor dx, Tensor d_weight)"
)
LIBRARY.define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float offset, str cast) -> "
    "(Tensor y, Tensor s, Tensor rstd)"
)
LIBRARY.define(
    "add_rms_norm_bwd(Tensor dy, Tensor ds, Tensor s, Tensor weight, Tensor rstd, float offset, str "
    "cast, bool with_d_weight)"
    " -> (Tensor d_sum, Tensor d_weight)"
)


def result_dtype(x: Tensor, weight: Tensor, cast: str) -> torch.dtype:
    """Of y: in the "llama" order a product of a tensor of x's dtype with the weight promotes as PyTorch
    does."""
    return torch.promote_types(x.dtype, weight.dtype) if cast == "llama" else x.dtype


@library.impl(LIBRARY, "rms_norm_fwd", "CompositeExplicitAutograd")
def _fwd(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    return backend("rms_norm", select(x)).forward(x, weight, eps, offset, cast)


@library.impl(LIBRARY, "rms_norm_bwd", "CompositeExplicitAutograd")
def _bwd(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    grads = backend("rms_norm", select(x)).backward(dy, x, weight, rstd, offset, cast, needs)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@library.impl(LIBRARY, "add_rms_norm_fwd", "CompositeExplicitAutograd")
def _add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backend("rms_norm", select(x)).add_forward(x, residual, weight, eps, offset, cast)


@library.impl(LIBRARY, "add_rms_norm_bwd", "CompositeExplicitAutograd")
def _add_bwd(
    dy: Tensor,
    ds: Tensor,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    cast: str,
    with_d_weight: bool,
) -> tuple[Tensor, Tensor]:
    d_sum, d_weight = backend("rms_norm", select(s)).add_backward(
        dy, ds, s, weight, rstd, offset, cast, with_d_weight
    )
    return d_sum, dy.new_empty(0) if d_weight is None else d_weight


@library.register_fake("peftkern::rms_norm_fwd", lib=LIBRARY)
def _(x, weight, eps, offset, cast):
    rstd = x.new_empty(
        x.numel() // x.shape[-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )
    return x.new_empty(x.shape, dtype=result_dtype(x, weight, cast)), rstd


@library.register_fake("peftkern::rms_norm_bwd", lib=LIBRARY)
def _(dy, x, weight, rstd, offset, cast, needs):
    return x.new_empty(x.shape) if needs[0] else dy.new_empty(0), weight.new_empty(weight.shape) if needs[
        1
    ] else dy.new_empty(0)


@library.register_fake("peftkern::add_rms_norm_fwd", lib=LIBRARY)
def _(x, residual, weight, eps, offset, cast):
    rstd = x.new_empty(
        x.numel() // x.shape[-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )
    return x.new_empty(x.shape, dtype=result_dtype(x, weight, cast)), x.new_empty(x.shape), rstd


@library.register_fake("peftkern::add_rms_norm_bwd", lib=LIBRARY)
def _(dy, ds, s, weight, rstd, offset, cast, with_d_weight):
    return s.new_empty(s.shape), weight.new_empty(weight.shape) if with_d_weight else dy.new_empty(0)


def _again(ctx, dy):
    x, weight, _ = ctx.saved_tensors

    def plain(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [reference.forward(x, weight, *ctx.options)[0]]

    return (*derived(plain, (x, weight), ctx.needs_input_grad[:2], (dy,)), None, None, None)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast):
        y, rstd = entry(x, _fwd, "rms_norm_fwd")(x, weight, eps, offset, cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = eps, offset, cast
        return y

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:2])
        dx, d_weight = entry(dy, _bwd, "rms_norm_bwd")(dy, *ctx.saved_tensors, *ctx.options[1:], needs)
        return dx if needs[0] else None, d_weight if needs[1] else None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> Tensor:
    """x [..., N], weight [N] -> [..., N]; `functional.rms_norm` has checked the arguments."""
    if unobserved(x):  # autograd's bookkeeping costs more than one row's arithmetic
        return _fwd(x, weight, eps, offset, cast)[0]
    if transformed():
        return reference.forward(x, weight, eps, offset, cast)[0]
    if not torch.is_grad_enabled():
        return torch.ops.peftkern.rms_norm_fwd(x, weight, eps, offset, cast)[0]
    return _RMSNorm.apply(x, weight, eps, offset, cast)


def _add_again(ctx, dy, ds):
    s, weight, _ = ctx.saved_tensors
    need_x, need_residual, need_weight = ctx.needs_input_grad[:3]

    def plain(s: Tensor, weight: Tensor) -> list[Tensor]:
        return [reference.forward(s, weight, *ctx.options)[0]]

    d_sum, d_weight = derived(plain, (s, weight), (need_x or need_residual, need_weight), (dy,))
    if ds is not None:
        d_sum = ds if d_sum is None else d_sum + ds
    return d_sum if need_x else None, d_sum if need_residual else None, d_weight, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """y and the stream s = x + residual (x itself without a residual), whose gradients meet in one launch."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, cast):
        ctx.set_materialize_grads(False)
        if residual is None:
            s, (y, rstd) = x, entry(x, _fwd, "rms_norm_fwd")(x, weight, eps, offset, cast)
        else:
            y, s, rstd = entry(x, _add_fwd, "add_rms_norm_fwd")(x, residual, weight, eps, offset, cast)
        ctx.save_for_backward(s, weight, rstd)
        ctx.options = eps, offset, cast
        return y, s

    @staticmethod
    @twice_differentiable(_add_again)
    def backward(ctx, dy, ds):
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        d_sum, d_weight = _sum_gradients(
            dy, ds, *ctx.saved_tensors, *ctx.options[1:], need_x or need_residual, need_weight
        )
        return d_sum if need_x else None, d_sum if need_residual else None, d_weight, None, None, None


def _sum_gradients(
    dy, ds, s, weight, rstd, offset, cast, need_sum: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the sum and of the weight. An output that nobody used has none: the other's is all
    there is."""
    if dy is None:
        return ds, None
    if ds is None or not need_sum:
        run = entry(dy, _bwd, "rms_norm_bwd")
        d_sum, d_weight = run(dy, s, weight, rstd, offset, cast, [need_sum, need_weight])
    else:
        run = entry(dy, _add_bwd, "add_rms_norm_bwd")
        d_sum, d_weight = run(dy, ds, s, weight, rstd, offset, cast, need_weight)
    return d_sum if need_sum else None, d_weight if need_weight else None


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor]:
    """x, residual [..., N], weight [N] -> y, s [..., N]; `functional.add_rms_norm` has checked the
    arguments."""
    if transformed():
        s = x if residual is None else residual + x
        return reference.forward(s, weight, eps, offset, cast)[0], s
    if torch.is_grad_enabled():
        return _AddRMSNorm.apply(x, residual, weight, eps, offset, cast)
    if residual is None:
        return rms_norm(x, weight, eps, offset, cast), x
    return entry(x, _add_fwd, "add_rms_norm_fwd")(x, residual, weight, eps, offset, cast)[:2]
