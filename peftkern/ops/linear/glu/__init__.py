"""The backward pass of a gated MLP's second half, y = linear(act(gate) * up), as one op: a device may choose
when the product, which is not kept, is formed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from ... import LIBRARY, autocast_off, backend, entry, serving
from ..group import ADAPTERS_SCHEMA, WEIGHTS_SCHEMA, arguments, asked, with_adapters

__all__ = ["gradients", "halves"]

# hidden: gate and up [M, I], or one [M, 2 I], whose first half is the gate where gate_first says so; the rest
# as in qlora_group_bwd, of one
# member. dx is always made, being what d_hidden, in hidden's layout, comes from; needs[0] is true.
LIBRARY.define(
    f"qlora_glu_bwd(Tensor dy, Tensor[] hidden, bool gate_first, str activation, {WEIGHTS_SCHEMA}, SymInt m, "
    f"SymInt k, {ADAPTERS_SCHEMA}, "
    "Tensor?[] xa, bool[] needs) -> (Tensor[] d_hidden, Tensor[] d_bias, Tensor[] d_lora_a, Tensor[] "
    "d_lora_b)"
)


def halves(hidden: Sequence[Tensor], gate_first: bool) -> Sequence[Tensor]:
    """gate, up [..., I] of the inner linears' outputs: two, or one [..., 2 I], read in place."""
    if len(hidden) == 2:
        return hidden
    first, second = hidden[0].chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


@library.impl(LIBRARY, "qlora_glu_bwd", "CompositeExplicitAutograd")
def _bwd(dy, hidden, gate_first, activation, weights, *args):
    name, d_hidden = (
        serving(dy, *weights),
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in hidden],
    )
    parts = (*halves(hidden, gate_first), activation, *halves(d_hidden, gate_first))
    with autocast_off(dy):
        if name in ("cuda", "triton"):
            _, *lists = backend("linear.glu", name).backward(dy, *parts, weights, *with_adapters(args))
        else:
            lists = _composed(name, dy, *parts, weights, *with_adapters(args))
    return d_hidden, *([dy.new_empty(0) if g is None else g for g in grads] for grads in lists)


def _composed(
    name: str, dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, *args
) -> list:
    """The product, the linear's gradients, the product's."""
    glu = backend("glu", name)
    dx, *lists = backend("linear.group", name).backward([dy], glu.forward(gate, up, activation), *args)
    glu.backward(dx, gate, up, activation, d_gate, d_up, None)
    return lists


@library.register_fake("peftkern::qlora_glu_bwd", lib=LIBRARY)
def _(dy, hidden, gate_first, activation, *args):
    _, *lists = torch.ops.peftkern.qlora_group_bwd([dy], None, *args)
    return [t.new_empty(t.shape) for t in hidden], *lists


def gradients(
    static: tuple,
    saved: list[Tensor | None],
    dy: Tensor,
    hidden: list[Tensor],
    gate_first: bool,
    activation: str,
    needs: list[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """d_hidden; and as `qlora_group.gradients`, without dx."""
    shape = tuple(halves(hidden, gate_first)[0].shape)
    args = arguments(static, saved, shape, needs)
    d_hidden, *found = entry(dy, _bwd, "qlora_glu_bwd")(
        dy.contiguous(), hidden, gate_first, activation, *args
    )
    return d_hidden, asked(static, [True], needs, dy, *found)[1:]
