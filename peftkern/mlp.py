"""A gated MLP of frozen linears with adapters as one function, which keeps neither the activation nor the product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Member, prepare
from .ops import glu as _glu
from .ops import qlora_group as group

__all__ = ["gated_mlp"]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inner, outer, activation, count, x, *trainable):
        first, second = trainable[:count], trainable[count:]
        (gate, up), xa = group.run(inner, x, first)
        h = torch.ops.peftkern.glu_fwd(gate, up, activation)
        (y,), ha = group.run(outer, h, second)
        inner_kept, ctx.inner = group.kept(inner, first, xa)
        outer_kept, ctx.outer = group.kept(outer, second, ha)
        ctx.save_for_backward(x if group.wants_x(inner, first) else None, gate, up, *inner_kept, *outer_kept)
        ctx.wants_h, ctx.sizes = group.wants_x(outer, second), (count, len(inner_kept), tuple(x.shape))
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, *saved = ctx.saved_tensors
        (count, cut, shape), needs = ctx.sizes, list(ctx.needs_input_grad[4:])
        inner_needs, outer_needs = needs[: 1 + count], [any(needs[: 1 + count]), *needs[1 + count :]]
        h = torch.ops.peftkern.glu_fwd(gate, up, ctx.activation) if ctx.wants_h else None
        d_h, *outer = group.gradients(ctx.outer, saved[cut:], [dy], h, tuple(gate.shape), outer_needs)
        inner = [None] * len(inner_needs)
        if d_h is not None:
            d_gate, d_up, _ = torch.ops.peftkern.glu_bwd(d_h, gate, up, ctx.activation, False)
            inner = group.gradients(ctx.inner, saved[:cut], [d_gate, d_up], x, shape, inner_needs)
        return (None, None, None, None, *inner, *outer)


def gated_mlp(x: Tensor, gate: Member, up: Member, down: Member, *, activation: str = "silu") -> Tensor:
    """A decoder layer's gated MLP: y = down(act(gate(x)) * up(x)), each a frozen linear with its adapters.

    gate and up are one group: one read of x, one dx. The product act(gate) * up is computed again in the backward pass, as its gradient
    needs gate and up anyway.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        gate, up: members of shape [I, K]; down: a member of shape [N, I]. See `qlora_group`.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU).
    Returns: [..., N] in x's dtype. Saved for backward: x, gate(x), up(x) [M, I], the packed weights, the adapters and their xa.
    Raises: TypeError, ValueError naming the member, the argument, what was got and what was expected.
    Source: GLU Variants Improve Transformer (Shazeer, 2020), section 2.

    >>> gate, up, down = Member(torch.randn(48, 32)), Member(torch.randn(48, 32)), Member(torch.randn(32, 48))
    >>> gated_mlp(torch.randn(2, 5, 32), gate, up, down).shape
    torch.Size([2, 5, 32])
    """
    if activation not in _glu.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {_glu.ACTIVATIONS}")
    if gate.weight.shape != up.weight.shape:
        raise ValueError(f"up: got a weight {tuple(up.weight.shape)}, gate's is {tuple(gate.weight.shape)}; both must be [I, K]")
    flat, inner, first = prepare(x, (gate, up), ("gate", "up"))
    like_h = flat.new_empty((1, 1)).expand(flat.shape[0], gate.weight.shape[0])  # its shape and dtype, to check `down` against
    _, outer, second = prepare(like_h, (down,), ("down",))
    y = _GatedMLP.apply(inner, outer, activation, len(first), flat.contiguous(), *first, *second)
    return y.reshape(*x.shape[:-1], y.shape[1])
