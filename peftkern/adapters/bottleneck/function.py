"""The bottleneck adapter as one step of autograd: what is kept for backward is x and z = x A^T + a, [M, R].

Forward: z = x A^T + a; u = act(z); y + s (u B^T + b) as one product that adds onto y, its bias in a further
column of u and B.
Backward, from g: g^T u and the sums of g's columns give B's and b's gradients and, against B and b, that of
s; du = s g B; dz = du act'(z); dA = dz^T x; dx = dz A, added onto g by the same product where x is y. The
activation is computed again from z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import accumulation, autocast_off, transformed
from ...ops.derivatives import derived, stand_in, twice_differentiable
from . import reference

__all__ = ["bottleneck"]

_SLOPE = 0.01  # of torch's leaky_relu


def bottleneck(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
) -> Tensor:
    """A bottleneck adapter on y: y + scaling * (drop(act(x A^T + a)) B^T + b), with A = down, B = up.

    Products are computed in autocast's dtype where it is on, else in y's; A and B are rounded to it.

    Args:
        y: [..., N], what is adapted; its gradient is the result's where x is another tensor. Not written.
        x: [..., K], what the adapter reads: y itself (pass the same tensor), or another one of y's leading
            shape.
        down: [R, K]; up: [N, R]; down_bias: [R] or None; up_bias: [N] or None: any float dtype.
        scaling: a number, or a tensor [1] or [N], which may require grad.
        activation: a key of `reference.ACTIVATIONS`.
        dropout_p: in [0, 1), on the activation. Pass 0.0 in evaluation.
    Returns: [..., N] in y's dtype; y's bits where up and up_bias are 0. Saved for backward: x, z [M, R],
        the parameters, and with dropout what it leaves [M, R].
    Raises: ValueError naming the argument, what was got and what was expected.
    Source: Houlsby et al., 2019, section 2; He et al., 2022, section 3 (parallel, scaled).

    >>> y, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.zeros(16, 4)
    >>> torch.equal(bottleneck(y, y, a, b), y)
    True
    """
    _check(y, x, down, up, down_bias, up_bias, scaling, activation)
    flat_y = y.reshape(-1, y.shape[-1])
    flat_x = flat_y if x is y else x.reshape(-1, x.shape[-1])
    keep = None
    if dropout_p:
        keep = F.dropout(
            torch.ones(flat_x.shape[0], down.shape[0], device=x.device, dtype=x.dtype),
            dropout_p,
            training=True,
        )
    args = (down, up, down_bias, up_bias, scaling)
    if transformed():
        out = reference.bottleneck(
            flat_y, flat_x, *(_like(value, y) for value in args), activation=activation, keep=keep
        )
    else:
        compute = _compute_dtype(y)
        out = _Bottleneck.apply(flat_y, None if x is y else flat_x, *args, keep, activation, compute)
    return out.reshape(y.shape)


def _like(value: Any, y: Tensor) -> Any:
    return value.to(y.dtype) if isinstance(value, Tensor) else value


def _compute_dtype(y: Tensor) -> torch.dtype:
    device = y.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and y.dtype != torch.float64
        else y.dtype
    )


def _again(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, by the definition."""
    x, _, down, up, down_bias, up_bias, factor, keep = ctx.saved_tensors
    if x is None:
        raise RuntimeError(
            "bottleneck: its gradients cannot be differentiated again where `down` needs none, as x was not"
            " kept"
        )
    wide = torch.promote_types(g.dtype, ctx.compute)

    def plain(y, x, down, up, down_bias, up_bias, scaling):
        cast = [None if value is None else value.to(wide) for value in (down, up, down_bias, up_bias)]
        scaling = ctx.scaling if scaling is None else scaling.to(wide)
        source = y if x is None else x
        out = reference.bottleneck(
            y.to(wide), source.to(wide), *cast, scaling, activation=ctx.activation, keep=keep
        )
        return [out.to(g.dtype)]

    y = x if ctx.same else stand_in(g, g.shape)
    inputs = (y, None if ctx.same else x, down, up, down_bias, up_bias, factor)
    return (*derived(plain, inputs, ctx.needs_input_grad[:7], (g,)), None, None, None)


class _Bottleneck(torch.autograd.Function):
    """On y [M, N] and x [M, K], None where x is y."""

    @staticmethod
    def forward(ctx, y, x, down, up, down_bias, up_bias, scaling, keep, activation, compute):
        with autocast_off(y):
            source = (y if x is None else x).to(compute)
            z = _linear(source, down.to(compute), down_bias)
            u = _act(z, activation, keep)
            out = _add_product(y, _with_ones(u, up_bias), _joined(up, up_bias), scaling)
        factor = scaling if isinstance(scaling, Tensor) else None
        kept_x = (y if x is None else x) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept_x, z, down, up, down_bias, up_bias, factor, keep)
        ctx.same, ctx.x_dtype, ctx.scaling = (
            x is None,
            (y if x is None else x).dtype,
            None if factor is not None else scaling,
        )
        ctx.activation, ctx.compute = activation, compute
        return out

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, g):
        with autocast_off(g):
            return _backward(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, z, down, up, down_bias, up_bias, factor, keep = ctx.saved_tensors
    need_y, need_x, need_down, need_up, need_a, need_b, need_s = ctx.needs_input_grad[:7]
    scaling, compute = factor if factor is not None else ctx.scaling, ctx.compute
    gc = g.to(compute)
    d_up = d_up_bias = d_s = None
    if need_up or need_s:
        product = gc.t() @ _act(z, ctx.activation, keep)  # [N, R]
        d_up = _scaled(product, scaling, up.dtype) if need_up else None
    if up_bias is not None and (need_b or need_s):
        sums = g.sum(0, dtype=accumulation(g))
        d_up_bias = _scaled(sums, scaling, up_bias.dtype) if need_b else None
    if need_s:
        rows = (product.to(accumulation(g)) * up).sum(1)
        rows = rows if up_bias is None else rows + sums * up_bias
        d_s = (rows if scaling.numel() == len(rows) else rows.sum(0, keepdim=True)).to(scaling.dtype)
    dz = None
    need_input = need_y if ctx.same else need_x
    if need_down or need_a or need_input:
        du = _scaled_product(gc, up, scaling, compute)
        dz = _act_backward(du if keep is None else du * keep, z, ctx.activation)
    d_down = (dz.t() @ x.to(compute)).to(down.dtype) if need_down else None
    d_a = dz.sum(0, dtype=accumulation(dz)).to(down_bias.dtype) if need_a else None
    d_y, d_x = g if need_y else None, None
    if need_input and ctx.same:
        d_y = _add_product(g, dz, down.to(compute).t(), 1.0)
    elif need_input:
        d_x = (dz @ down.to(compute)).to(ctx.x_dtype)
    return d_y, d_x, d_down, d_up, d_a, d_up_bias, d_s, None, None, None


def _scaled(grad: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """scaling * grad, [N] or [N, R], rounded once to the parameter's dtype."""
    wide = grad.to(torch.promote_types(grad.dtype, dtype))
    factor = (
        scaling.to(wide.dtype).reshape(-1, *(1,) * (grad.dim() - 1))
        if isinstance(scaling, Tensor)
        else scaling
    )
    return (wide * factor).to(dtype)


def _scaled_product(g: Tensor, up: Tensor, scaling: float | Tensor, compute: torch.dtype) -> Tensor:
    """s g B: [M, R]; the scaling goes into the smaller factor, in the parameters' dtype."""
    scaled = up * (scaling[:, None] if isinstance(scaling, Tensor) else scaling)
    return g @ scaled.to(compute)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _with_ones(u: Tensor, bias: Tensor | None) -> Tensor:
    """[M, R], and a column of ones for the bias."""
    return u if bias is None else torch.cat([u, u.new_ones(len(u), 1)], 1)


def _joined(up: Tensor, bias: Tensor | None) -> Tensor:
    """[N, R], and the bias as a further column."""
    return up if bias is None else torch.cat([up, bias[:, None].to(up.dtype)], 1)


def _add_product(y: Tensor, u: Tensor, weight: Tensor, scaling: float | Tensor) -> Tensor:
    """y + scaling * u weight^T, y [M, N], u [M, R], weight [N, R], rounded once where y has the products'
    dtype."""
    if isinstance(scaling, Tensor):  # into the smaller factor, before it is rounded
        weight, scaling = weight * scaling[:, None], 1.0
    weight = weight.to(u.dtype)
    if y.dtype == u.dtype:
        return torch.addmm(y, u, weight.t(), alpha=scaling)
    return y + (u @ weight.t()).to(y.dtype) * scaling


def _act(z: Tensor, activation: str, keep: Tensor | None) -> Tensor:
    u = reference.ACTIVATIONS[activation](z)
    return u if keep is None else u * keep.to(u.dtype)


def _act_backward(du: Tensor, z: Tensor, activation: str) -> Tensor:
    """du * act'(z), by torch's own kernels."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(du, z, 0)
    if activation == "silu":
        return aten.silu_backward(du, z)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(du, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "tanh":
        return aten.tanh_backward(du, torch.tanh(z))
    if activation == "sigmoid":
        return aten.sigmoid_backward(du, torch.sigmoid(z))
    if activation == "leakyrelu":
        return aten.leaky_relu_backward(du, z, _SLOPE, False)
    return du


def _check(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scaling: Any,
    activation: str,
) -> None:
    """Raise ValueError where an argument does not fit the others."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}"
        )
    if y.dim() == 0 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x: got {tuple(x.shape)}, expected {(*y.shape[:-1], 'K')}, with the leading shape of y"
        )
    n, k = y.shape[-1], x.shape[-1]
    r = down.shape[0] if down.dim() == 2 else -1
    expected = {"down": (down, (r, k)), "up": (up, (n, r)), "down_bias": (a, (r,)), "up_bias": (b, (n,))}
    for name, (value, shape) in expected.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            given = f"x {tuple(x.shape)} and y {tuple(y.shape)}"
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {list(shape)} for {given}")
        if value.device != y.device:
            raise ValueError(f"{name}: is on {value.device}, y is on {y.device}; move one of them")
    if isinstance(scaling, Tensor):
        if tuple(scaling.shape) not in ((1,), (n,)):
            raise ValueError(f"scaling: got shape {tuple(scaling.shape)}, expected a number, [1] or [{n}]")
    elif not math.isfinite(scaling):
        raise ValueError(f"scaling: got {scaling}, expected a finite number")
