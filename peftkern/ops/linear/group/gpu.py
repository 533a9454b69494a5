"""A group on a GPU: few launches for all members where `merged.py` serves it; else each member by the single
linear's plan with the adapter that sees all rows, further ones in passes of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....runtime.abi import addresses
from ....runtime.replay import Held, replayed
from ... import autocast_off
from .. import gpu as single
from .. import low_rank, tuned
from ..low_rank_calls import config_for
from ..problem import Linear, Needs
from . import merged
from .spec import Adapters, Spec, split_needs

__all__ = ["Described", "backward", "forward", "held"]

_unsafe_view = torch.ops.aten._unsafe_view.default


def _primaries(count: int, m: int, members: list[int], rows: list[tuple[int, int]]) -> list[int | None]:
    """Of each member the first adapter that sees all rows."""
    whole = [(j, member) for j, member in enumerate(members) if rows[j] == (0, m)]
    return [next((j for j, member in whole if member == i), None) for i in range(count)]


def _spans(rows: list[int]) -> list[tuple[int, int]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _quant(quants: list[Tensor | None], blocksizes: list[int], i: int) -> tuple:
    return (*quants[6 * i : 6 * i + 6], *blocksizes[2 * i : 2 * i + 2])


@replayed(tuned.settings)
def forward(
    x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
):
    """As the reference."""
    x, rows = x.contiguous(), _spans(rows)
    lora_a, lora_b = [t.contiguous() for t in lora_a], [t.contiguous() for t in lora_b]
    each = [_quant(quants, blocksizes, i) for i in range(len(weights))]
    options = scalings, dropout_ps, seeds
    group = merged.group_of(
        x, x.shape[1], weights, each, n, lora_a, lora_b, members, rows, *options, forward=True
    )
    if group is not None:
        return merged.forward(group, x, [None if bias is None else bias.contiguous() for bias in biases])
    y, xa = (
        [],
        [
            x.new_empty((end - begin, a.shape[0]), dtype=torch.float32)
            for (begin, end), a in zip(rows, lora_a, strict=True)
        ],
    )
    primaries = _primaries(len(weights), x.shape[0], members, rows)
    for i, j in enumerate(primaries):
        adapter = () if j is None else (lora_a[j], lora_b[j], scalings[j], dropout_ps[j], seeds[j])
        one = Linear(weights[i], each[i], n[i], x.shape[1], biases[i], *adapter)
        out, low = single.forward(x, one)
        y.append(out)
        if j is not None:
            xa[j] = low
    for j, member in enumerate(members):
        begin, end = rows[j]
        if j != primaries[member] and begin < end and n[member]:
            xa[j] = low_rank.xa_forward(x[begin:end], lora_a[j], dropout_ps[j], seeds[j])
            low_rank.y_epilogue(y[member][begin:end], xa[j], lora_b[j], scalings[j], None, accumulate=True)
    return y, xa


@replayed(tuned.settings)
def backward(dy, x, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """As the reference; dx is rounded at most once a member and once for the adapters, as autograd's own sum
    over them is."""
    lora_a, lora_b, members, rows, scalings, dropout_ps, seeds = adapters
    rows = _spans(rows)
    need_x, need_bias, need_a, need_b = split_needs(needs, len(weights), len(members))
    lora_a, lora_b = [t.contiguous() for t in lora_a], [t.contiguous() for t in lora_b]
    dy, x = [None if g is None else g.contiguous() for g in dy], None if x is None else x.contiguous()
    each, widths = (
        [_quant(quants, blocksizes, i) for i in range(len(weights))],
        [0 if g is None else g.shape[1] for g in dy],
    )
    first, options = next(g for g in dy if g is not None), (scalings, dropout_ps, seeds)
    group = merged.group_of(
        first, k, weights, each, widths, lora_a, lora_b, members, rows, *options, forward=False
    )
    if group is not None:
        return merged.backward(group, dy, x, xa, (need_x, need_bias, need_a, need_b))
    dx, d_bias, d_a, d_b = None, [None] * len(weights), [None] * len(members), [None] * len(members)
    primaries = _primaries(len(weights), m, members, rows)
    for i, j in enumerate(primaries):
        if dy[i] is None:
            continue
        adapter = () if j is None else (lora_a[j], lora_b[j], scalings[j], dropout_ps[j], seeds[j])
        wanted = Needs(need_x, need_bias[i], j is not None and need_a[j], j is not None and need_b[j])
        if any(wanted):
            one = Linear(weights[i], each[i], dy[i].shape[1], k, None, *adapter)
            part, d_bias[i], a, b = single.backward(dy[i], x, one, None if j is None else xa[j], wanted)
            dx = part if dx is None else dx.add_(part)
            if j is not None:
                d_a[j], d_b[j] = a, b
    for j, member in enumerate(members):
        if dy[member] is None or j == primaries[member] or not (need_x or need_a[j] or need_b[j]):
            continue
        begin, end = rows[j]
        if begin == end or not dy[member].shape[1]:
            d_a[j], d_b[j] = torch.zeros_like(lora_a[j]), torch.zeros_like(lora_b[j])
            continue
        x_rows, dx_rows = None if x is None else x[begin:end], dx[begin:end] if need_x else None
        parts = dy[member][begin:end], x_rows, dx_rows, lora_a[j], lora_b[j], xa[j]
        d_a[j], d_b[j] = _further(*parts, scalings[j], dropout_ps[j], seeds[j], need_a[j], need_b[j])
    return dx, d_bias, d_a, d_b


def _further(
    dy, x, dx, lora_a, lora_b, xa, scaling, dropout_p, seed, need_a, need_b
) -> tuple[Tensor | None, Tensor | None]:
    """One more adapter on some rows: dx += drop(dyb A), its gradients."""
    passes = config_for(dy, lora_b, *dy.shape, lora_a.shape[1], lora_a.shape[0])
    partials = low_rank.dy_pass(
        dy, xa, lora_b, scaling, (dx is not None, False, need_a, need_b), config=passes
    )
    d_a = None
    if dx is not None or need_a:
        dyb = low_rank.summed(partials.dyb, passes)
        d_a = low_rank.x_pass(x, dyb, lora_a, dropout_p, seed, dx=dx, need_a=need_a, config=passes)
    d_a, d_b, _ = low_rank.reduce_partials(d_a, partials.d_lora_b, None, lora_b.dtype)
    return d_a, d_b


class Described:
    """A group for calls to come, which are replayed without a look at its own tensors; it holds them. Rows
    and seeds of the adapters belong to a call."""

    __slots__ = ("_backward", "_forward", "_k", "_low", "_spec", "at")
    forms_x_late = True  # an MLP's backward pass is one op here, `ops/linear/glu`

    def __init__(self, k: int, spec: Spec, biases, lora_a, lora_b) -> None:
        self._k, self._spec, self._low = k, spec, (biases, lora_a, lora_b)
        low, base = (*lora_a, *lora_b), (*spec.weights, *spec.quants)
        self.at = addresses((*base, *low))
        self._forward = Held(forward, (*base, *biases, *low), tuned.forced)
        self._backward = Held(backward, (*base, *low), tuned.forced)

    def forward(
        self, x: Tensor, lead: Sequence[int], rows: Sequence[int], seeds: Sequence[Tensor | None]
    ) -> tuple[list, list]:
        """x [M, K] -> y [*lead, N_i] of the members, xa of the adapters, as the reference."""
        given = [seed for seed in seeds if seed is not None]
        rest = tuple(rows), tuple([seed is None for seed in seeds])
        y, xa = self._forward([x], given, rest, lambda: self._arguments(x, rows, seeds))
        return [_unsafe_view(out, (*lead, out.shape[1])) for out in y], xa

    def _arguments(self, x: Tensor, rows: Sequence[int], seeds: Sequence[Tensor | None]) -> tuple:
        spec = self._spec
        adapters = spec.members, rows, spec.scalings, spec.dropout_ps, seeds
        return x, spec.weights, spec.quants, spec.blocksizes, spec.n, *self._low, *adapters

    def backward(self, dy, x, xa, needs, rows, seeds) -> tuple[Tensor | None, list, list, list]:
        """dy_i [..., N_i] or None, x [M, K] -> dx [M, K] and the lists of gradients, as the reference."""
        dy = [None if g is None else g.reshape(-1, g.shape[-1]) for g in dy]
        before, after = [g for g in (*dy, x) if g is not None], [t for t in (*seeds, *xa) if t is not None]
        rest = tuple(rows), tuple(needs), tuple([t is None for t in (*dy, x, *seeds, *xa)])
        spec, (_, *low) = self._spec, self._low

        def arguments() -> tuple:
            adapters = Adapters(*low, spec.members, rows, spec.scalings, spec.dropout_ps, seeds)
            sizes = spec.blocksizes, before[0].shape[0], self._k
            return dy, x, spec.weights, spec.quants, *sizes, adapters, xa, needs

        with autocast_off(before[0]):
            return self._backward(before, after, rest, arguments)


def held(k: int, spec: Spec, biases, lora_a, lora_b) -> Described | None:
    """As the CPU's."""
    if not all(t is None or t.is_contiguous() for t in (*spec.weights, *biases, *lora_a, *lora_b)):
        return None
    if not all(weight.numel() for weight in spec.weights):
        return None
    return Described(k, spec, biases, lora_a, lora_b)
