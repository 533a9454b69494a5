"""The plan of a group on a GPU: `gpu.py` itself, run on tensors without storage of its members' sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ....runtime.plan import INTERPRETED, Device, Launch, planning
from ..plan import Operands, Shape
from .spec import Adapters

__all__ = [
    "backward_arguments",
    "forward_arguments",
    "group_backward_plan",
    "group_forward_plan",
]


def group_forward_plan(shapes: Sequence[Shape], device: Device = INTERPRETED) -> list[Launch]:
    """The launches of the forward pass of members that share x; r = 0: without an adapter."""
    from . import gpu

    with planning(device) as launches:
        gpu.forward(*forward_arguments(shapes))
    return launches


def group_backward_plan(shapes: Sequence[Shape], device: Device = INTERPRETED) -> list[Launch]:
    """The launches of the backward pass that gives dx and every gradient of adapters and biases."""
    from . import gpu

    with planning(device) as launches:
        gpu.backward(*backward_arguments(shapes))
    return launches


def forward_arguments(shapes: Sequence[Shape], place: str = "meta") -> tuple:
    """What the op's forward pass gets, in uninitialized tensors on `place`."""
    members = [Operands.of(s, place) for s in shapes]
    a, b, *rest = _adapters(shapes, members)
    outputs = [s.n for s in shapes], [o.bias for o in members]
    return members[0].x, *_weights(members), *outputs, a, b, *rest


def backward_arguments(shapes: Sequence[Shape], place: str = "meta") -> tuple:
    """What the op's backward pass gets where every gradient is wanted."""
    members = [Operands.of(s, place) for s in shapes]
    adapters = Adapters(*_adapters(shapes, members))
    inputs = [o.dy for o in members], members[0].x, *_weights(members), shapes[0].m, shapes[0].k
    needs = [True, *(s.bias for s in shapes), *[True] * 2 * len(adapters.lora_a)]
    return *inputs, adapters, [o.xa for o in members if o.xa is not None], needs


def _weights(members: Sequence[Operands]) -> tuple[list, list, list]:
    """The op's weights, quants, blocksizes."""
    quants = [part for o in members for part in o.quant[:6]]
    return [o.weight for o in members], quants, [size for o in members for size in o.quant[6:]]


def _adapters(shapes: Sequence[Shape], members: Sequence[Operands]) -> tuple[list, ...]:
    """The op's lora_a, lora_b, members, rows, scalings, dropout_ps, seeds."""
    low = [i for i, s in enumerate(shapes) if s.r]
    ours = [members[i] for i in low]
    rows = [bound for i in low for bound in (0, shapes[i].m)]
    a, b = [o.lora_a for o in ours], [o.lora_b for o in ours]
    return a, b, low, rows, [1.0] * len(low), [o.dropout_p for o in ours], [o.seed for o in ours]
