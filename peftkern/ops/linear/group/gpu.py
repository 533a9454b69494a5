"""A group on a GPU: few launches for all members where `merged.py` serves it; else each member by the single
linear's plan with the adapter that sees all rows, further ones in passes of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ....runtime.replay import replayed
from .. import gpu as single
from .. import low_rank, tuned
from ..low_rank_calls import config_for
from ..problem import Linear, Needs
from . import merged
from .spec import split_needs

__all__ = ["backward", "forward"]


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
