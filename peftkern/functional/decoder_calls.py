"""A decoder layer's kernels as two lists of native calls, one a direction: described once for a shape, so
that Python is entered once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.glu import ACTIVATIONS
from ..ops.rms_norm import CASTS, result_dtype
from ..runtime.abi import addresses
from ..runtime.native import DTYPES, address, dtype_of, empty, native, pooled, scratch

__all__ = ["LayerCalls", "layer_calls"]

_LATER, _SLOT = 1 << 62, 48  # csrc/bindings_calls.h
_MOST_ROOM = 64 << 20  # of what a pass needs for itself: a larger layer is not bound by Python
_BF16 = torch.bfloat16


class _Base(IntEnum):
    """What a run is given the addresses of, in this order; then each part's gradients: its A's, its B's."""

    KEPT, ROOM, X, COS, SIN, MASK, K, V, OUT, ATTENTION, NORM, DY, DX, GRADS = range(14)


def _at(base: int, offset: int = 0) -> int:
    return _LATER | base << _SLOT | offset


class _Place(NamedTuple):
    """A tensor's place behind a base."""

    at: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, held: Tensor) -> Tensor:
        """The tensor in the bytes that the base was."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return held[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _Room:
    """Tensors one behind the other, each at a cache line."""

    def __init__(self, base: int) -> None:
        self.base, self.size = base, 0

    def take(self, *shape: int, dtype: torch.dtype = _BF16) -> _Place:
        place = _Place(_at(self.base, self.size), self.size, shape, dtype)
        self.size += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        return place


class LayerCalls:
    """Of a layer on [b, s] tokens: `forward`, `backward`, and what the first keeps for the second. Heads are
    [B, S, H, D] in memory. Adapters have no dropout, and all of them are trained."""

    def __init__(self, layer: Any, shape: torch.Size, cos: Tensor, mask: Tensor | None, causal: bool) -> None:
        self.layer, self.native = layer, native()
        (self.b, self.s, self.width), self.m = shape, shape[0] * shape[1]
        b, s, m, d = self.b, self.s, self.m, layer.width
        self.counts = [n // d for n in layer.parts[0].spec.n]
        h, inner = self.counts[0], layer.parts[2].spec.n[0]
        kept, room = _Room(_Base.KEPT), _Room(_Base.ROOM)
        self.kept = kept
        f32 = torch.float32
        self.y, self.z, self.stream = (kept.take(m, self.width) for _ in range(3))
        self.rstd, self.rstd_2 = kept.take(m, dtype=f32), kept.take(m, dtype=f32)
        self.q, self.attended = kept.take(b, s, h, d), kept.take(b, s, h, d)
        self.lse = kept.take(b, h, s, dtype=f32)
        self.gate, self.up = kept.take(m, inner), kept.take(m, inner)
        self.xa = [[kept.take(m, a.shape[0], dtype=f32) for a in part.known.lora_a] for part in layer.parts]
        self.low = [
            (tuple(t.shape), t.dtype)
            for part in layer.parts
            for t in (*part.known.lora_a, *part.known.lora_b)
        ]
        self.mask = None if mask is None else mask.stride()
        self.attends = self._attention(cos, mask, causal)
        self.norms_at = addresses(norm.weight for norm in layer.norms)
        self.norm_room = self.native.rms_norm_scratch_bytes(m, self.width, False)
        self.attention_room = max(self.native.attention_scratch_bytes(self.attends, back) for back in (0, 1))
        self.angles = dtype_of(cos), cos.stride(0) if cos.shape[0] > 1 else 0, cos.shape[2]
        self.forward_calls, self.backward_calls = self.native.Calls(), {}
        self._describe_forward(room)
        for need_x in (True, False):
            back = _Room(_Base.ROOM)
            self.backward_calls[need_x] = self._describe_backward(back, need_x)
        self.room = max(room.size, back.size)

    # ---- descriptors

    def _strides(self, heads: int) -> tuple[int, int, int]:
        """Of a batch, a head and a token of heads in memory [B, S, H, D]."""
        d = self.layer.width
        return self.s * heads * d, d, heads * d

    def _heads(self, at: int, heads: int) -> object:
        return self.native.Heads(at, *self._strides(heads))

    def _attention(self, cos: Tensor, mask: Tensor | None, causal: bool) -> object:
        h, hk, _ = self.counts
        by_batch = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
        by_row = 0 if mask is None else mask.stride(2)
        heads = self._heads(self.q.at, h), self._heads(_at(_Base.K), hk), self._heads(_at(_Base.V), hk)
        sizes = self.b, h, hk, self.s, self.s, self.layer.width, self.layer.scale
        at = 0 if mask is None else _at(_Base.MASK)
        return self.native.Attention(*heads, *sizes, causal, at, by_batch, by_row)

    def _norm(self, index: int, x: int, *, backward: bool = False) -> object:
        weight, eps, offset, cast = self.layer.norms[index]
        dtypes = DTYPES[_BF16], dtype_of(weight), DTYPES[_BF16]
        shape = self.m, self.width, self.width
        eps = 0.0 if backward else eps
        return self.native.RmsNorm(x, address(weight), *shape, *dtypes, CASTS.index(cast), eps, offset)

    def _room_of(self, base: int, size: int) -> tuple[int, int]:
        return _at(base), size

    def _forward_group(self, calls: Any, index: int, x: int, outs: Sequence[int]) -> None:
        known, make = self.layer.parts[index].known, self.native
        members = [
            make.Member(view, address(bias), dtype_of(bias), out, 0, 0)
            for view, bias, out in zip(known.views, known.biases, outs, strict=True)
        ]
        low = zip(known.loras, known.members, self.xa[index], strict=True)
        adapters = [make.Adapter(lora, member, 0, self.m, xa.at, 0, 0, 0) for lora, member, xa in low]
        calls.qlora_group_fwd(members, adapters, x, DTYPES[_BF16], self.m)

    def _backward_group(
        self, calls: Any, index: int, x: int, grads: Sequence[int], dx: int, room: _Room, first: int
    ) -> None:
        """first: the number of the part's first gradient."""
        known, make = self.layer.parts[index].known, self.native
        members = [make.Member(view, 0, 0, 0, dy, 0) for view, dy in zip(known.views, grads, strict=True)]
        adapters, of_a = [], _Base.GRADS + first
        for lora, member, xa, a in zip(known.loras, known.members, self.xa[index], known.lora_a, strict=True):
            dyb = room.take(self.m, a.shape[0], dtype=torch.float32)
            outs = xa.at, dyb.at, _at(of_a), _at(of_a + len(known.members))
            adapters.append(make.Adapter(lora, member, 0, self.m, *outs))
            of_a += 1
        calls.qlora_group_bwd(members, adapters, x, DTYPES[_BF16], self.m, dx)

    def _rope(self, calls: Any, ins: Sequence[int], outs: Sequence[int], inverse: bool) -> None:
        made = [
            self.native.RopeHeads(x, y, heads, *self._strides(heads), *self._strides(heads))
            for x, y, heads in zip(ins, outs, self.counts, strict=False)
        ]
        (dtype, by_batch, rotary), d = self.angles, self.layer.width
        sizes = DTYPES[_BF16], self.b, self.s, d, _at(_Base.COS), _at(_Base.SIN)
        calls.rope(*made, *sizes, dtype, by_batch, rotary, int(inverse))

    def _describe_forward(self, room: _Room) -> None:
        calls, (m, width), dtype = self.forward_calls, (self.m, self.width), DTYPES[_BF16]
        q, k = (room.take(m, n) for n in self.layer.parts[0].spec.n[:2])
        out, h = room.take(m, width), room.take(*self.gate.shape)
        norm_room = self._room_of(_Base.NORM, self.norm_room)
        calls.rms_norm_fwd(self._norm(0, _at(_Base.X)), self.y.at, self.rstd.at, *norm_room)
        self._forward_group(calls, 0, self.y.at, (q.at, k.at, _at(_Base.V)))
        self._rope(calls, (q.at, k.at), (self.q.at, _at(_Base.K)), False)
        y, attention = (
            self._heads(self.attended.at, self.counts[0]),
            self._room_of(_Base.ATTENTION, self.attention_room),
        )
        calls.attention_fwd(self.attends, y, self.lse.at, *attention)
        self._forward_group(calls, 1, self.attended.at, (out.at,))
        made = self.stream.at, self.z.at, self.rstd_2.at
        calls.add_rms_norm_fwd(self._norm(1, out.at), _at(_Base.X), *made, *norm_room)
        self._forward_group(calls, 2, self.z.at, (self.gate.at, self.up.at))
        activation = ACTIVATIONS.index(self.layer.activation)
        calls.glu_fwd(self.gate.at, self.up.at, dtype, *self.gate.shape, activation, h.at)
        self._forward_group(calls, 3, h.at, (_at(_Base.OUT),))
        calls.add(self.stream.at, _at(_Base.OUT), dtype, m * width, _at(_Base.OUT))

    def _describe_backward(self, room: _Room, need_x: bool) -> Any:
        """The parts from the last to the first; gradients are numbered from the first."""
        calls, (m, width), dtype = self.native.Calls(), (self.m, self.width), DTYPES[_BF16]
        starts = [0]
        for part in self.layer.parts:
            starts.append(starts[-1] + 2 * len(part.known.members))
        h, dh, d_up = (room.take(*self.gate.shape) for _ in range(3))
        dz, d_stream, d_attended = room.take(m, width), room.take(m, width), room.take(*self.q.shape)
        sizes = self.layer.parts[0].spec.n
        dq, dk, dv, tq, tk = (room.take(m, n) for n in (*sizes, *sizes[:2]))
        activation = ACTIVATIONS.index(self.layer.activation)
        gated = self.gate.at, self.up.at, dtype, *self.gate.shape, activation
        calls.glu_fwd(*gated, h.at)
        self._backward_group(calls, 3, h.at, (_at(_Base.DY),), dh.at, room, starts[3])
        calls.glu_bwd(*gated, dh.at, h.at, d_up.at)
        self._backward_group(calls, 2, self.z.at, (h.at, d_up.at), dz.at, room, starts[2])
        norm_room = self._room_of(_Base.NORM, self.norm_room)
        norm = self._norm(1, self.stream.at, backward=True)
        calls.add_rms_norm_bwd(norm, dz.at, _at(_Base.DY), self.rstd_2.at, d_stream.at, 0, *norm_room)
        self._backward_group(calls, 1, self.attended.at, (d_stream.at,), d_attended.at, room, starts[1])
        counts = (*self.counts[:1] * 3, *self.counts[1:])
        places = self.attended.at, d_attended.at, dq.at, dk.at, dv.at
        heads = [self._heads(at, count) for at, count in zip(places, counts, strict=True)]
        attention = self._room_of(_Base.ATTENTION, self.attention_room)
        calls.attention_bwd(self.attends, self.native.AttentionGrad(*heads), self.lse.at, *attention)
        self._rope(calls, (dq.at, dk.at), (tq.at, tk.at), True)
        dx = dz.at if need_x else 0
        self._backward_group(calls, 0, self.y.at, (tq.at, tk.at, dv.at), dx, room, starts[0])
        if need_x:
            norm = self._norm(0, _at(_Base.X), backward=True)
            calls.add_rms_norm_bwd(norm, dz.at, d_stream.at, self.rstd.at, _at(_Base.DX), 0, *norm_room)
        return calls

    # ---- running

    def _bases(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Behind KEPT; the rooms are this thread's."""
        rooms = scratch(self.attention_room, "attention"), scratch(self.norm_room)
        return addresses((*tensors, *rooms))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is kept, the rotated keys and the values [B, S, Hkv, D], y."""
        heads = self.b, self.s, self.counts[1], self.layer.width
        kept, room = pooled(self.kept.size), scratch(self.room, "layer")
        k, v = empty(heads, dtype=_BF16), empty(heads, dtype=_BF16)
        out = empty(x.shape, dtype=_BF16)
        self.forward_calls.run(self._bases((kept, room, x, cos, sin, mask, k, v, out)))
        return kept, k, v, out

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor | None], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]] | None:
        """saved: x, cos, sin, mask, and what `forward` gave but y -> dx, and the gradients of each part's A's
        and B's. None where what was saved lies otherwise now, or a norm's weight elsewhere."""
        strides = None if saved[3] is None else saved[3].stride()
        if addresses(norm.weight for norm in self.layer.norms) != self.norms_at:
            return None
        if strides != self.mask or not all(t.is_contiguous() for t in (*saved[:3], *saved[4:])):
            return None
        x, cos, sin, mask, kept, k, v = saved
        room, dy = scratch(self.room, "layer"), dy.contiguous()
        dx = empty(x.shape, dtype=_BF16) if need_x else None
        low = [empty(shape, dtype=dtype) for shape, dtype in self.low]
        bases = self._bases((kept, room, x, cos, sin, mask, k, v, None))
        self.backward_calls[need_x].run([*bases, *addresses((dy, dx, *low))])
        return dx, low

    def states(self, kept: Tensor) -> tuple[tuple[Tensor, ...], list[list[Tensor]]]:
        """rstd, y, q, attended, lse, stream, rstd_2, z, gate, up; and each part's xa."""
        q, attended = (place.of(kept).transpose(1, 2) for place in (self.q, self.attended))
        places = self.rstd, self.y, self.lse, self.stream, self.rstd_2, self.z, self.gate, self.up
        rstd, y, lse, stream, rstd_2, z, gate, up = (place.of(kept) for place in places)
        shape = self.b, self.s, self.width
        y, stream, z = (t.view(shape) for t in (y, stream, z))
        states = rstd, y, q, attended, lse, stream, rstd_2, z, gate, up
        return states, [[place.of(kept) for place in part] for part in self.xa]


def layer_calls(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Any) -> LayerCalls | None:
    """Of the layer for calls like this one; None where adapters drop, a part takes no kernel of ours, or the
    layer is so large that Python does not matter."""
    mask = seen.mask
    of_mask = None if mask is None else (mask.shape, mask.stride())
    how = native().isa(), torch.get_num_threads()
    key = (x.shape, cos.shape, cos.stride(), of_mask, seen.causal, *how)
    if key not in layer.calls:
        while len(layer.calls) >= 4:
            layer.calls.pop(next(iter(layer.calls)))
        layer.calls[key] = _made(layer, x, cos, sin, seen)
    return layer.calls[key]


def _made(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Any) -> LayerCalls | None:
    m = x.shape[0] * x.shape[1]
    for part in layer.parts:
        known = part.known
        ways = (known.choice(m, x.dtype, forward=forward) for forward in (True, False))
        if any(part.spec.dropout_ps) or any(way != "gemm" for way in ways):
            return None
        if any(bias is not None and bias.requires_grad for bias in known.biases):
            return None
    if any(result_dtype(x, norm.weight, norm.cast) != _BF16 for norm in layer.norms):
        return None
    if not (cos.is_contiguous() and sin.is_contiguous() and sin.dtype == cos.dtype):
        return None
    if seen.mask is not None and seen.mask.stride(-1) != 1:
        return None
    if sum(2 * len(part.known.members) for part in layer.parts) + _Base.GRADS > 255:
        return None
    made = LayerCalls(layer, x.shape, cos, seen.mask, seen.causal)
    return made if made.room <= _MOST_ROOM and made.attention_room <= _MOST_ROOM else None
