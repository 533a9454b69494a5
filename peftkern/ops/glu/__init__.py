"""Gated linear units: h = act(gate) * up, one op per direction."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...runtime.backends import select
from .. import LIBRARY, backend, entry, transformed
from ..derivatives import derived, twice_differentiable
from . import reference

__all__ = ["ACTIVATIONS", "glu", "gradients"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order of the C ABI's pk_activation

LIBRARY.define("glu_fwd(Tensor gate, Tensor up, str activation) -> Tensor")
LIBRARY.define(
    "glu_bwd(Tensor dy, Tensor gate, Tensor up, str activation, bool with_h) -> (Tensor d_gate, Tensor "
    "d_up, Tensor h)"
)
LIBRARY.define(
    "glu_bwd_out(Tensor dy, Tensor gate, Tensor up, str activation, Tensor(a!) d_gate, Tensor(b!) "
    "d_up, Tensor(c!)? h) -> ()"
)


@library.impl(LIBRARY, "glu_fwd", "CompositeExplicitAutograd")
def _fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return backend("glu", select(gate)).forward(gate, up, activation)


@library.impl(LIBRARY, "glu_bwd", "CompositeExplicitAutograd")
def _bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `glu_bwd_out` into new contiguous tensors; h is empty where it is not wanted."""
    d_gate, d_up, h = _outputs(gate, with_h)
    _bwd_out(dy, gate, up, activation, d_gate, d_up, h if with_h else None)
    return d_gate, d_up, h


@library.impl(LIBRARY, "glu_bwd_out", "CompositeExplicitAutograd")
def _bwd_out(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, h: Tensor | None
) -> None:
    backend("glu", select(dy)).backward(dy, gate, up, activation, d_gate, d_up, h)


def _outputs(gate: Tensor, with_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape if with_h else (0,)),
    )


@library.register_fake("peftkern::glu_fwd", lib=LIBRARY)
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@library.register_fake("peftkern::glu_bwd", lib=LIBRARY)
def _(dy, gate, up, activation, with_h):
    return _outputs(gate, with_h)


@library.register_fake("peftkern::glu_bwd_out", lib=LIBRARY)
def _(dy, gate, up, activation, d_gate, d_up, h):
    return None


def _again(ctx, dy):
    def plain(gate: Tensor, up: Tensor) -> list[Tensor]:
        return [reference.forward(gate, up, ctx.activation)]

    return (*derived(plain, ctx.saved_tensors, ctx.needs_input_grad[:2], (dy,)), None)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return entry(gate, _fwd, "glu_fwd")(gate, up, activation)

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        d_gate, d_up, _ = entry(dy, _bwd, "glu_bwd")(dy, *ctx.saved_tensors, ctx.activation, False)
        return d_gate if ctx.needs_input_grad[0] else None, d_up if ctx.needs_input_grad[1] else None, None


def gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """d_gate, d_up of contiguous tensors' own, for a backward pass."""
    return entry(dy, _bwd, "glu_bwd")(dy, gate, up, activation, False)[:2]


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [..., I] -> [..., I]; `functional.glu` has checked the arguments."""
    if transformed():
        return reference.forward(gate, up, activation)
    if not torch.is_grad_enabled():  # autograd's bookkeeping costs more than one row's arithmetic
        return entry(gate, _fwd, "glu_fwd")(gate, up, activation)
    return _GLU.apply(gate, up, activation)
