"""A gated MLP of frozen linears with adapters as one function, which keeps neither the activation nor the
product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import glu as _glu
from ..ops import transformed, undispatched
from ..ops.derivatives import derived, known_input, twice_differentiable
from ..ops.flops import observe
from ..ops.glu import reference as _glu_reference
from ..ops.linear import glu as qlora_glu
from ..ops.linear import group as group
from ..ops.linear.glu import halves
from ..runtime.backends import select
from . import checks
from .group import Member, at_rows, described, prepare

__all__ = ["gated_mlp", "gated_mlp_packed", "prepared"]


def _plain(
    inner, outer, activation: str, gate_first: bool, x: Tensor, *trainable: Tensor | None
) -> list[Tensor]:
    """[y] by the definitions."""
    count = len(inner.weights) + 2 * len(inner.members)
    hidden = group.plain(inner, x, trainable[:count])
    return group.plain(
        outer, _glu_reference.forward(*halves(hidden, gate_first), activation), trainable[count:]
    )


def _again(ctx, dy):
    (count, outputs, cut, shape), needs = ctx.sizes, list(ctx.needs_input_grad[6:])
    x, *saved = ctx.saved_tensors
    n = [h.shape[1] for h in saved[:outputs]]
    x = known_input("gated_mlp", x, dy, shape, any(needs))
    inner, first = group.trainable_again(
        ctx.inner, saved[outputs : outputs + cut], needs[1 : 1 + count], n, dy
    )
    outer, second = group.trainable_again(
        ctx.outer, saved[outputs + cut :], needs[1 + count :], [dy.shape[-1]], dy
    )

    def plain(x: Tensor, *trainable: Tensor | None) -> list[Tensor]:
        (y,) = _plain(inner, outer, ctx.activation, ctx.gate_first, x, *trainable)
        return [y.view(dy.shape)]

    return *(None,) * 6, *derived(plain, (x, *first, *second), needs, (dy,))


class _GatedMLP(torch.autograd.Function):
    """inner: two members, gate and up, or one whose output's halves they are; gate_first: which half is the
    gate. known, lead: of an MLP both of whose groups a backend has described before, and the leading sizes of
    y, which is [M, N] without."""

    @staticmethod
    def forward(ctx, inner, outer, activation, gate_first, known, lead, x, *trainable):
        count = len(inner.weights) + 2 * len(inner.members)
        first, second = trainable[:count], trainable[count:]
        if known is None:
            hidden, xa = group.run(inner, x, first)
            h = _glu.glu(*halves(hidden, gate_first), activation)
            (y,), ha = group.run(outer, h, second)
        else:
            hidden, xa = known[0].forward(x, x.shape[:1], inner.rows, inner.seeds)
            h = _glu.glu(*halves(hidden, gate_first), activation)
            (y,), ha = known[1].forward(h, lead, outer.rows, outer.seeds)
        inner_kept, ctx.inner = group.kept(inner, first, xa)
        outer_kept, ctx.outer = group.kept(outer, second, ha)
        ctx.save_for_backward(x if group.wants_x(inner, first) else None, *hidden, *inner_kept, *outer_kept)
        ctx.wants_h, ctx.sizes = (
            group.wants_x(outer, second),
            (count, len(hidden), len(inner_kept), tuple(x.shape)),
        )
        ctx.activation, ctx.gate_first, ctx.known = activation, gate_first, known
        return y

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy):
        (count, outputs, cut, shape), needs = ctx.sizes, list(ctx.needs_input_grad[6:])
        x, *saved = ctx.saved_tensors
        hidden, saved = saved[:outputs], saved[outputs:]
        gate, up = halves(hidden, ctx.gate_first)
        first, second = ctx.known or (None, None)
        inner_needs, outer_needs = needs[: 1 + count], [any(needs[: 1 + count]), *needs[1 + count :]]
        inner, d_hidden = [None] * len(inner_needs), None
        if ctx.wants_h and outer_needs[0] and (second is None or second.forms_x_late):
            options = hidden, ctx.gate_first, ctx.activation
            flat = dy.reshape(-1, dy.shape[-1])
            d_hidden, outer = qlora_glu.gradients(ctx.outer, saved[cut:], flat, *options, outer_needs)
        else:
            h = _glu.glu(gate, up, ctx.activation) if ctx.wants_h else None
            d_h, *outer = group.gradients(
                ctx.outer, saved[cut:], [dy], h, tuple(gate.shape), outer_needs, second
            )
            if d_h is not None:
                d_hidden = _hidden_gradients(d_h, hidden, ctx.activation, ctx.gate_first)
            del h, d_h  # before dx is made
        if d_hidden is not None:
            inner = group.gradients(ctx.inner, saved[:cut], d_hidden, x, shape, inner_needs, first)
        return *(None,) * 6, *inner, *outer


def _hidden_gradients(
    d_h: Tensor, hidden: Sequence[Tensor], activation: str, gate_first: bool
) -> list[Tensor]:
    """The gradients of the inner linears' outputs; of one output in one tensor, whose halves are written in
    place."""
    gate, up = halves(hidden, gate_first)
    if len(hidden) == 2:
        return list(_glu.gradients(d_h, gate, up, activation))
    packed = torch.empty_like(hidden[0])
    torch.ops.peftkern.glu_bwd_out(d_h, gate, up, activation, *halves([packed], gate_first), None)
    return [packed]


def gated_mlp(x: Tensor, gate: Member, up: Member, down: Member, *, activation: str = "silu") -> Tensor:
    """A decoder layer's gated MLP: y = down(act(gate(x)) * up(x)), each a frozen linear with its adapters.

    gate and up are one group: one read of x, one dx. The product act(gate) * up is computed again in the
    backward pass, as its gradient needs gate and up anyway.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        gate, up: members of shape [I, K]; down: a member of shape [N, I]. See `qlora_group`.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU).
    Returns: [..., N] in x's dtype. Saved for backward: x, gate(x), up(x) [M, I], the packed weights, the
    adapters and their xa.
    Raises: TypeError, ValueError naming the member, the argument, what was got and what was expected.
    Source: GLU Variants Improve Transformer (Shazeer, 2020), section 2.

    >>> gate, up, down = Member(torch.randn(48, 32)), Member(torch.randn(48, 32)), Member(torch.randn(32, 48))
    >>> gated_mlp(torch.randn(2, 5, 32), gate, up, down).shape
    torch.Size([2, 5, 32])
    """
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"up: got a weight {tuple(up.weight.shape)}, gate's is {tuple(gate.weight.shape)}; both "
            "must be [I, K]"
        )
    return _run(x, {"gate": gate, "up": up}, down, gate.weight.shape[0], activation, True)


def gated_mlp_packed(
    x: Tensor, gate_up: Member, down: Member, *, activation: str = "silu", gate_first: bool = True
) -> Tensor:
    """A gated MLP whose gate and up are the halves of one linear: y = down(act(gate) * up), (gate, up) =
    chunk(gate_up(x), 2).

    As `gated_mlp`; the halves are read, and their gradients written, in place.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        gate_up: a member of shape [2I, K]; its adapters span both halves. down: a member of shape [N, I]. See
            `qlora_group`.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU).
        gate_first: whether the first I outputs are the gate (Phi-3), or the last.
    Returns: [..., N] in x's dtype. Saved for backward: x, gate_up(x) [M, 2I], the packed weights, the
    adapters and their xa.
    Raises: TypeError, ValueError naming the member, the argument, what was got and what was expected.
    Source: GLU Variants Improve Transformer (Shazeer, 2020), section 2; one projection for both, Phi-3
    Technical Report (2024).

    >>> gate_up, down = Member(torch.randn(96, 32)), Member(torch.randn(32, 48))
    >>> gated_mlp_packed(torch.randn(2, 5, 32), gate_up, down).shape
    torch.Size([2, 5, 32])
    """
    rows = gate_up.weight.shape[0]
    if rows % 2:
        raise ValueError(
            f"gate_up: got a weight {tuple(gate_up.weight.shape)}, expected [2I, K], an even number of rows"
        )
    return _run(x, {"gate_up": gate_up}, down, rows // 2, activation, gate_first)


def _run(
    x: Tensor, inner: dict[str, Member], down: Member, width: int, activation: str, gate_first: bool
) -> Tensor:
    if activation not in _glu.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {_glu.ACTIVATIONS}")
    flat, spec, first = prepare(x, tuple(inner.values()), tuple(inner))
    _, outer, second = prepare(_like_h(flat, width), (down,), ("down",))
    y = _computed(flat.contiguous(), spec, outer, (*first, *second), activation, gate_first)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _like_h(x: Tensor, width: int) -> Tensor:
    """Of the shape and dtype of h, to check `down` against."""
    return x.new_empty((1, 1)).expand(x.shape[0], width)


def _computed(
    x: Tensor, inner, outer, trainable: tuple[Tensor | None, ...], activation: str, gate_first: bool
) -> Tensor:
    """x [M, K] -> y [M, N]."""
    observe()
    if transformed():
        return _plain(inner, outer, activation, gate_first, x, *trainable)[0]
    if torch.is_grad_enabled():
        return _GatedMLP.apply(inner, outer, activation, gate_first, None, None, x, *trainable)
    count = len(inner.weights) + 2 * len(inner.members)
    hidden, _ = group.run(inner, x, trainable[:count])
    (y,), _ = group.run(outer, _glu.glu(*halves(hidden, gate_first), activation), trainable[count:])
    return y


def prepared(
    x: Tensor, inner: dict[str, Member], down: Member, *, activation: str, gate_first: bool = True
) -> Callable[[Tensor], Tensor]:
    """`gated_mlp` (inner: gate and up) or `gated_mlp_packed` (gate_up) for repeated calls with tensors of x's
    dtype, device and last size: all else is checked and described now. The members' tensors are held; their
    shapes, dtypes and devices must stay. No adapter may name rows or a seed: both belong to one call."""
    members = tuple(inner.values())
    width = members[0].weight.shape[0] // (1 if len(members) == 2 else 2)
    flat = checks.flat(x)
    first_spec, first = described(flat, members, tuple(inner))
    second_spec, second = described(_like_h(flat, width), (down,), ("down",))
    trainable, k = (*first, *second), x.shape[-1]
    by_backend: dict[str, Any] = {}
    of_inner, of_outer = ([a for member in part for a in member.adapters] for part in (members, (down,)))

    def call(x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        m = lead.numel()
        flat = (x if len(lead) == 1 else x.reshape(m, k)).contiguous()
        one = at_rows(first_spec, m, of_inner, x.device)
        two = at_rows(second_spec, m, of_outer, x.device)
        name = select(x) if undispatched(x) else "reference"
        if name not in by_backend:
            held = group.hold(name, first_spec, k, first), group.hold(name, second_spec, width, second)
            by_backend[name] = None if None in held else held
        known = by_backend[name]
        if known is None:
            y = _computed(flat, one, two, trainable, activation, gate_first)
            return y.reshape(*lead, y.shape[1])
        if torch.is_grad_enabled():
            return _GatedMLP.apply(one, two, activation, gate_first, known, lead, flat, *trainable)
        hidden, _ = known[0].forward(flat, flat.shape[:1], one.rows, one.seeds)
        h = _glu.glu(*halves(hidden, gate_first), activation)
        return known[1].forward(h, lead, two.rows, two.seeds)[0][0]

    return call
