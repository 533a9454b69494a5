"""A pre-norm decoder layer of frozen linears with adapters as one function in training on a CPU, where
between kernels of a small layer Python and autograd take a tenth of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from ..ops import backend, unobserved
from ..ops import glu as _glu
from ..ops.attention import reference as _attention_reference
from ..ops.derivatives import derived, twice_differentiable
from ..ops.glu import reference as _glu_reference
from ..ops.linear import group
from ..ops.rms_norm import reference as _norm_reference
from ..ops.rope import empty_heads
from ..ops.rope import reference as _rope_reference
from ..runtime.abi import addresses
from .decoder_calls import LayerCalls, layer_calls
from .group import Adapter, Member, at_rows, described

__all__ = ["DecoderLayer", "Norm", "Seen"]


class Norm(NamedTuple):
    """Of an RMSNorm: `rms_norm`'s arguments. The weight is frozen."""

    weight: Tensor
    eps: float
    offset: float
    cast: str


class Seen(NamedTuple):
    """What a call's queries see: a bool mask [1 or B, 1, S, S], or none; whether keys behind them are
    hidden."""

    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class _Part:
    """Linears on one input, described for calls to come: `prepared`'s parts of a group."""

    spec: group.Spec
    trainable: tuple[Tensor | None, ...]
    adapters: tuple[Adapter, ...]
    known: Any
    k: int

    def now(self, m: int, like: Tensor) -> group.Spec:
        return at_rows(self.spec, m, self.adapters, like.device)


def _part(like: Tensor, members: Sequence[Member], names: Sequence[str]) -> _Part | None:
    """None where the CPU has no descriptors of them."""
    k = like.shape[-1]
    spec, trainable = described(like, members, names)
    known = group.hold("cpu", spec, k, trainable)
    adapters = tuple(adapter for member in members for adapter in member.adapters)
    return None if known is None else _Part(spec, trainable, adapters, known, k)


class DecoderLayer:
    """s = x + o(attention(rope(q, k), v)), of norm(x), and y = s + down(act(gate) * up), of norm(s), for
    calls with tensors of x's dtype and last size on the CPU: all else is checked and described here. The
    members' tensors are held; their shapes, dtypes and devices must stay; adapters name neither rows nor a
    seed.

    x: [..., N], bf16. norms: of both halves. attention: q, k, v and o; mlp: gate, up and down; width: of a
    head; scale: of the scores. Each is as in `qlora_group`, `gated_mlp`, `rms_norm`, `rope` and
    `scaled_dot_product_attention`, whose results it gives.
    """

    def __init__(
        self,
        x: Tensor,
        norms: tuple[Norm, Norm],
        attention: Sequence[Member],
        mlp: Sequence[Member],
        *,
        width: int,
        scale: float,
        activation: str,
    ) -> None:
        def like(member: Member) -> Tensor:
            """What a linear on this one's output gets."""
            return x.new_empty((1, 1)).expand(1, _rows(member))

        (q, k, v, o), (gate, up, down) = attention, mlp
        self.norms, self.width, self.scale, self.activation = norms, width, scale, activation
        row = x.new_empty((1, 1)).expand(1, x.shape[-1])
        parts = (
            _part(row, (q, k, v), ("q", "k", "v")),
            _part(like(q), (o,), ("o",)),
            _part(row, (gate, up), ("gate", "up")),
            _part(like(gate), (down,), ("down",)),
        )
        self.served = None not in parts
        self.calls: dict[Any, LayerCalls | None] = {}
        self.parts = parts
        self.trainable = tuple(t for part in parts if part is not None for t in part.trainable)
        if self.served:
            self._note_places()

    def _note_places(self) -> None:
        """low: which of the trainable tensors are adapters' factors; fixed: what the descriptors read
        besides; at: where the latter lie, then the former."""
        fixed, at_fixed, at_low, low, before = [], [], [], [], 0
        for part in self.parts:
            held, count = (*part.spec.weights, *part.spec.quants), len(part.spec.n)
            fixed.extend(held)
            at_fixed.extend(part.known.at[: len(held)])
            at_low.extend(part.known.at[len(held) :])
            low.extend(range(before + count, before + len(part.trainable)))
            before += len(part.trainable)
        self.fixed, self.low, self.at = tuple(fixed), tuple(low), at_fixed + at_low

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, S, N] -> y; with `keep` also the rotated keys and the values [B, Hkv, S, D], for a cache."""
        found = _DecoderLayer.apply(self, seen, keep, x.contiguous(), cos, sin, *self.trainable)
        return found if keep else (found, None, None)

    def specs(self, x: Tensor) -> list[group.Spec]:
        """Of the parts, with the rows of a call on x, and with seeds where an adapter drops: drawn here."""
        m = x.shape[0] * x.shape[1]
        return [part.now(m, x) for part in self.parts]

    def split(self, trainable: Sequence[Any]) -> list[Sequence[Any]]:
        """What belongs to each part."""
        found, at = [], 0
        for part in self.parts:
            found.append(trainable[at : at + len(part.trainable)])
            at += len(part.trainable)
        return found

    def heads(self, y: Tensor) -> Tensor:
        """[B, S, H * D] -> [B, H, S, D], no copy."""
        b, s, n = y.shape
        return y.view(b, s, n // self.width, self.width).transpose(1, 2)


def _rows(member: Member) -> int:
    weight: NF4Weight | Tensor = member.weight
    return weight.shape[0]


def _flat(heads: Tensor) -> Tensor:
    """[B, H, S, D], which lies by rows of tokens, -> [B, S, H * D]."""
    b, h, s, d = heads.shape
    return heads.transpose(1, 2).reshape(b, s, h * d)


def _plain(
    layer: DecoderLayer,
    specs: list[group.Spec],
    seen: Seen,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    trainable: Sequence[Tensor | None],
) -> list[Tensor]:
    """y, the rotated keys and the values by the definitions."""
    (b, s, _), own = x.shape, layer.split(trainable)

    def linears(index: int, rows: Tensor) -> list[Tensor]:
        found = group.plain(specs[index], rows.reshape(b * s, -1), tuple(own[index]))
        return [y.view(b, s, y.shape[1]) for y in found]

    def norm(index: int, rows: Tensor) -> Tensor:
        weight, *options = layer.norms[index]
        return _norm_reference.forward(rows, weight, *options)[0]

    q, k, v = map(layer.heads, linears(0, norm(0, x)))
    q, k = (_rope_reference.rotated(t, cos, sin, False) for t in (q, k))
    attended = _attention_reference.forward(q, k, v, seen.mask, seen.causal, layer.scale)[0]
    (out,) = linears(1, _flat(attended))
    stream = x + out
    hidden = linears(2, norm(1, stream))
    (out,) = linears(3, _glu_reference.forward(*hidden, layer.activation))
    return [stream + out, k, v]


def _again(ctx, *grads):
    x, cos, sin, mask = ctx.saved_tensors[:4]
    needs, specs = [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]], _specs(ctx, x)

    def plain(x: Tensor, *trainable: Tensor | None) -> list[Tensor]:
        seen = Seen(mask, ctx.causal)
        found = _plain(ctx.layer, specs, seen, x, cos, sin, trainable)
        return found if len(grads) == 3 else found[:1]

    dx, *others = derived(plain, (x, *ctx.layer.trainable), needs, grads)
    return None, None, None, dx, None, None, *others


def _specs(ctx: Any, x: Tensor) -> list[group.Spec]:
    """Of the call: without dropout as good as any."""
    return ctx.layer.specs(x) if ctx.specs is None else ctx.specs


class _DecoderLayer(torch.autograd.Function):
    """What DecoderLayer's call is given, and the layer's trainable tensors."""

    @staticmethod
    def forward(ctx, layer, seen, keep, x, cos, sin, *trainable):
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.specs, ctx.causal = layer, None, seen.causal
        ctx.outputs = 3 if keep else 1
        (b, s, width), (first, second), own = x.shape, layer.norms, layer.split(trainable)
        ctx.calls = layer_calls(layer, x, cos, sin, seen)
        if ctx.calls is not None:
            kept, k, v, y = ctx.calls.forward(x, cos, sin, seen.mask)
            ctx.save_for_backward(x, cos, sin, seen.mask, kept, k, v, *trainable)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if keep and not any(ctx.needs_input_grad[3 : 6 + len(own[0])]):
                ctx.mark_non_differentiable(k, v)
            return (y, k, v) if keep else y
        ctx.specs = specs = layer.specs(x)
        norms, lead = backend("rms_norm", "cpu"), (b, s)
        kept, statics = [], []

        def linears(index: int, rows: Tensor, sizes: tuple[int, ...] = (b * s,)) -> list[Tensor]:
            spec = specs[index]
            y, xa = layer.parts[index].known.forward(rows, sizes, spec.rows, spec.seeds)
            tensors, static = group.kept(spec, tuple(own[index]), xa)
            kept.append(tensors)
            statics.append(static)
            return y

        y, rstd = norms.forward(x, *first)
        q, k, v = map(layer.heads, linears(0, y.view(b * s, width), lead))
        turned = empty_heads(q, True), empty_heads(k, True)
        backend("rope", "cpu").rope(q, k, cos, sin, False, *turned)
        (q, k), attention = turned, backend("attention", "cpu")
        attended, lse = attention.forward(q, k, v, seen.mask, seen.causal, layer.scale)
        (out,) = linears(1, attended.transpose(1, 2).reshape(b * s, -1), lead)
        z, stream, rstd_2 = norms.add_forward(out, x, *second)
        gate, up = linears(2, z.view(b * s, width))
        (out,) = linears(3, backend("glu", "cpu").forward(gate, up, layer.activation), lead)
        if keep and not any(ctx.needs_input_grad[3 : 6 + len(own[0])]):
            ctx.mark_non_differentiable(k, v)
        y, z = (t if group.wants_x(specs[i], tuple(own[i])) else None for t, i in ((y, 0), (z, 2)))
        of_heads = q, k, v, attended, lse
        states = x, cos, sin, seen.mask, rstd, y, *of_heads, stream, rstd_2, z, gate, up
        ctx.save_for_backward(*states, first.weight, second.weight, *(t for part in kept for t in part))
        ctx.statics, ctx.sizes = statics, [len(part) for part in kept]
        result = torch.add(stream, out, out=out)
        return (result, k, v) if keep else result

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, dy, dk_out=None, dv_out=None):
        given = dy if dy is not None else dk_out if dk_out is not None else dv_out
        if given is None or not unobserved(given):  # somebody counts what is computed
            with torch.enable_grad():
                found = _again(ctx, *(dy, dk_out, dv_out)[: ctx.outputs])
            return tuple(None if g is None else g.detach() for g in found)
        if ctx.calls is None:
            states, saved, statics = _states(ctx)
        else:
            if dk_out is None and dv_out is None and (found := _all_at_once(ctx, dy)) is not None:
                return found
            states, saved, statics = _states_of_calls(ctx)
        layer, norms = ctx.layer, backend("rms_norm", "cpu")
        (x, cos, sin, mask, rstd, y), of_heads, rest = _cut(states, 6, 5)
        stream, rstd_2, z, gate, up, weight, weight_2 = rest
        (b, s, width), needs = x.shape, [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]]
        wanted = [list(part) for part in layer.split(needs[1:])]
        reach = [needs[0]]  # whether a gradient goes on to the part's input
        for part in wanted:
            reach.append(reach[-1] or any(part))
        found: list[list[Tensor | None]] = [[None] * len(part) for part in wanted]

        def linears(index: int, grads: list[Tensor | None], rows: Tensor | None) -> Tensor | None:
            part = layer.parts[index]
            asked = [reach[index], *wanted[index]]
            dx, *found[index] = group.gradients(
                statics[index], list(saved[index]), grads, rows, (b * s, part.k), asked, part.known
            )
            return dx

        d_stream = dy
        if dy is not None and reach[4]:
            h = _glu.glu(gate, up, layer.activation) if any(wanted[3]) else None
            dh = linears(3, [dy], h)
            del h
            if dh is not None:
                d_hidden = list(_glu.gradients(dh, gate, up, layer.activation))
                dz = linears(2, d_hidden, None if z is None else z.view(b * s, width))
                del dh, d_hidden
                if dz is not None:
                    dz = dz.view(b, s, width)
                    options = layer.norms[1][2:]
                    d_stream, _ = norms.add_backward(dz, dy, stream, weight_2, rstd_2, *options, False)
        dq = dk = dv = None
        q, k, v, attended, lse = of_heads
        if d_stream is not None and reach[2]:
            attended_rows = attended.transpose(1, 2).reshape(b * s, -1)
            d_attended = linears(1, [d_stream], attended_rows)
            if d_attended is not None:
                d_heads = layer.heads(d_attended.view(b, s, -1))
                inputs = q, k, v, attended, lse, mask, ctx.causal, layer.scale
                dq, dk, dv = backend("attention", "cpu").backward(d_heads, *inputs)
        if reach[1]:
            dk, dv = _sum(dk, dk_out), _sum(dv, dv_out)
        dx = d_stream if needs[0] else None
        if reach[1] and not (dq is dk is dv is None):
            dq, dk, dv = (torch.zeros_like(t) if g is None else g for t, g in ((q, dq), (k, dk), (v, dv)))
            turned = empty_heads(q, True), empty_heads(k, True)
            backend("rope", "cpu").rope(dq, dk, cos, sin, True, *turned)
            dz = linears(0, [*map(_flat, turned), _flat(dv)], None if y is None else y.view(b * s, width))
            if dz is not None:
                dz, options = dz.view(b, s, width), layer.norms[0][2:]
                if d_stream is None:
                    dx, _ = norms.backward(dz, x, weight, rstd, *options, (True, False))
                else:
                    dx, _ = norms.add_backward(dz, d_stream, x, weight, rstd, *options, False)
        return None, None, None, dx, None, None, *(g for part in found for g in part)


def _states(ctx: Any) -> tuple[Sequence[Any], list[Sequence[Any]], list[tuple]]:
    """What forward has kept: states, what each part's gradients need, and the rest of that."""
    states, *saved = _cut(ctx.saved_tensors, 18, *ctx.sizes)
    return states, saved, ctx.statics


def _states_of_calls(ctx: Any) -> tuple[Sequence[Any], list[Sequence[Any]], list[tuple]]:
    """The same of a layer whose kernels ran as one list."""
    (x, cos, sin, mask, kept, k, v), trainable = _cut(ctx.saved_tensors, 7)
    (rstd, y, q, attended, lse, *more), xa = ctx.calls.states(kept)
    parts = zip(_specs(ctx, x), ctx.layer.split(trainable), xa, strict=True)
    pairs = [group.kept(spec, tuple(own), low) for spec, own, low in parts]
    weights = (norm.weight for norm in ctx.layer.norms)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    states = (x, cos, sin, mask, rstd, y, q, k, v, attended, lse, *more, *weights)
    return states, [tensors for tensors, _ in pairs], [static for _, static in pairs]


def _all_at_once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...] | None:
    """Every gradient by one list of calls; None where some are not wanted, or a weight has been moved."""
    layer, saved, needs = ctx.layer, ctx.saved_tensors, ctx.needs_input_grad
    if dy is None or not all(needs[6 + i] for i in layer.low):
        return None
    if addresses((*layer.fixed, *(saved[7 + i] for i in layer.low))) != layer.at:
        return None
    made = ctx.calls.backward(dy, saved[:7], needs[3])
    if made is None:
        return None
    dx, low = made
    found: list[Tensor | None] = [None] * len(layer.trainable)
    for i, gradient in zip(layer.low, low, strict=True):
        found[i] = gradient
    return None, None, None, dx, None, None, *found


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _cut(values: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Pieces of these sizes, and the rest, if there is one."""
    found, at = [], 0
    for size in sizes:
        found.append(values[at : at + size])
        at += size
    return [*found, values[at:]] if at < len(values) else found
