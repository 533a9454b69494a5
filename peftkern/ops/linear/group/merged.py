"""A group on a GPU in few launches: large M, every member with at most one adapter, on all rows. `gpu.py`
composes all other groups.

cuBLAS. Forward: slabs || xa of all adapters, y = s xa B^T + bias of all members, a GEMM a member onto it.
Backward: slabs || dyb, dB and dbias of all members, dx = the sum of drop(dyb A) with every dA, a GEMM a
member onto dx, all partial sums. Our own GEMM: one launch for every y with all of it, one for the products of
dx over all members. Members whose slabs do not fit the buffer together follow in further batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....runtime.launch import run
from ....runtime.plan import device_of
from ...dequantize.triton import Format, Rectangle, decode_call, rectangle
from ...triton_nf4 import group_words
from .. import gpu as single
from .. import low_rank_calls as passes
from ..config import Choice, batches
from ..kernels.triton_low_rank import YOperands
from ..low_rank_calls import DyMember, Low
from ..low_rank_config import LowRankConfig
from ..matmul_calls import DENSE, Product, dx_sum_call, group_call

__all__ = ["Group", "backward", "forward", "group_of"]


@dataclass(frozen=True)
class Group:
    """Members that one plan serves. lows: each one's adapter; adapters: its index among the op's."""

    weights: list[Tensor]
    quants: list[tuple]
    n: list[int]
    k: int
    lows: list[Low | None]
    adapters: list[int | None]
    choice: Choice

    def passes(self, x: Tensor, used: Sequence[int]) -> LowRankConfig:
        """The tiles of the widest adapter, chunks of all members' columns; dyb by programs of its own."""
        lows = [self.lows[i] for i in used if self.lows[i] is not None]
        total, rank = sum(self.n[i] for i in used), max((low.rank for low in lows), default=0)
        found = single.low_rank_config_of(x, lows[0].b if lows else None, total, self.k, rank, slab=True)
        return replace(found, fused=False)

    def batches(self, used: Sequence[int], itemsize: int) -> list[list[int]]:
        """Members whose slabs share the buffer at a time."""
        sizes = [0 if self.quants[i][0] is None else self.n[i] * self.k * itemsize for i in used]
        return [[used[at] for at in batch] for batch in batches(sizes, self.choice.slab_bytes)]


def group_of(
    x: Tensor,
    k: int,
    weights,
    quants,
    n: list[int],
    lora_a,
    lora_b,
    members,
    spans,
    scalings,
    dropout_ps,
    seeds,
    *,
    forward: bool,
) -> Group | None:
    """The group of x (or a dy) [M, ...] where the merged launches serve it. n is 0 of a member without dy."""
    m, live = x.shape[0], [i for i, size in enumerate(n) if size]
    adapters: list[int | None] = [None] * len(weights)
    for j, member in enumerate(members):
        if adapters[member] is not None or spans[j] != (0, m):
            return None
        adapters[member] = j
    if not m or len(live) < 2 or len({t.dtype for t in (*lora_a, *lora_b)}) > 1:
        return None
    choices = [single.choose(x, quants[i], n[i], k, forward=forward) for i in live]
    packed = [i for i in live if quants[i][0] is not None]
    kinds = {(*quants[i][6:], group_words(weights[i], 0, n[i] * k)) for i in packed}
    fits = all(n[i] * k * x.element_size() <= choices[0].slab_bytes for i in packed)
    if any(choice.regime != "slab" for choice in choices) or len(kinds) > 1 or not fits:
        return None
    lows = [
        None if j is None else Low(lora_a[j], lora_b[j], scalings[j], dropout_ps[j], seeds[j])
        for j in adapters
    ]
    return Group([w.contiguous() for w in weights], quants, n, k, lows, adapters, choices[0])


class _Slabs:
    """Dense weights [N, K] of a batch, decoded into one buffer that the next batch takes over."""

    def __init__(self, group: Group, x: Tensor, parts: list[list[int]]) -> None:
        self.group, self.dtype = group, x.dtype
        most = max((sum(self._size(i) for i in batch) for batch in parts), default=0)
        self.buffer = x.new_empty(most)

    def _size(self, i: int) -> int:
        """Elements to decode, up to a multiple of 128: every slab begins on a border of 256 bytes or more."""
        return 0 if self.group.quants[i][0] is None else -(-self.group.n[i] * self.group.k // 128) * 128

    def of(self, batch: list[int]) -> tuple[dict[int, Tensor], list[tuple[Rectangle, Format]]]:
        """Every member's dense weight, and what has to be decoded for it."""
        group, found, todo, at = self.group, {}, [], 0
        for i in batch:
            if group.quants[i][0] is None:
                found[i] = group.weights[i].to(self.dtype)
                continue
            found[i] = self.buffer[at : at + group.n[i] * group.k].view(group.n[i], group.k)
            whole = slice(0, group.n[i]), slice(0, group.k)
            todo.append(rectangle(group.weights[i], group.quants[i], group.k, *whole, found[i]))
            at += self._size(i)
        return found, todo


def forward(group: Group, x: Tensor, biases: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """[y], [xa] in the order of the op's adapters; x and biases contiguous."""
    arch, used = device_of(x).arch, range(len(group.n))
    config, parts = group.passes(x, used), group.batches(used, x.element_size())
    y, slabs = [x.new_empty((x.shape[0], size)) for size in group.n], _Slabs(group, x, parts)
    low = [i for i in used if group.lows[i] is not None]
    xa: dict[int, Tensor] = {}
    for index, batch in enumerate(parts):
        dense, todo = slabs.of(batch)
        beside = low if index == 0 else []
        if beside:
            call, found = passes.xa_call(x, [group.lows[i] for i in beside], config, arch=arch)
            run(passes.beside_decoding(call, todo))
            xa |= {i: parts[0] for i, parts in zip(beside, found, strict=True)}
        elif todo:
            run(decode_call(todo))
        if group.choice.gemm == "triton":
            products = [_product_of(dense[i], y[i], xa.get(i), group.lows[i], biases[i]) for i in batch]
            run(group_call(x, products, arch=arch))
            continue
        if beside:
            members = [_y_operands(y[i], xa[i], group.lows[i], biases[i]) for i in low]
            run(passes.y_call(members, config, arch=arch))
        for i in batch:
            _product(x, dense[i], biases[i], y[i], accumulate=i in xa)
    return y, [xa[i] for i in sorted(low, key=lambda i: group.adapters[i])]


def _y_operands(y: Tensor, xa: Tensor, low: Low, bias: Tensor | None) -> YOperands:
    return passes.y_operands(y, xa, low.b, low.scaling, bias)


def _product_of(dense: Tensor, y: Tensor, xa: Tensor | None, low: Low | None, bias: Tensor | None) -> Product:
    if low is None:
        return Product(dense, DENSE, y, bias)
    return Product(dense, DENSE, y, bias, xa, low.b, low.scaling)


def _product(x: Tensor, dense: Tensor, bias: Tensor | None, y: Tensor, *, accumulate: bool) -> None:
    if bias is not None and not accumulate:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=y)
    else:
        single.multiply(x, dense.t(), y, accumulate)


def backward(
    group: Group,
    dy: list[Tensor | None],
    x: Tensor | None,
    xa: list[Tensor | None],
    needs: tuple[bool, list[bool], list[bool], list[bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """As the op's, `needs` as `split_needs` gives them; dy and x contiguous."""
    need_x, need_bias, need_a, need_b = needs
    used = [i for i, g in enumerate(dy) if g is not None]
    wide, low = dy[used[0]], {i: group.adapters[i] for i in used if group.adapters[i] is not None}
    config, arch = group.passes(wide, used), device_of(wide).arch
    wanted = [
        DyMember(
            dy[i],
            group.lows[i],
            None if j is None else xa[j],
            j is not None and (need_x or need_a[j]),
            j is not None and need_b[j],
            bias,
        )
        for i, j, bias in ((i, low.get(i), need_bias[i]) for i in used)
    ]
    asked = [
        i
        for i, member in zip(used, wanted, strict=True)
        if member.need_dyb or member.need_b or member.need_bias
    ]
    of = dict(zip(used, wanted, strict=True))
    first = _First(config, [of[i] for i in asked], arch)
    dx = wide.new_empty((wide.shape[0], group.k)) if need_x else None
    with_dyb = [i for i in asked if of[i].need_dyb]
    d_a = _dx(group, dy, x, dx, used, with_dyb, [need_a[low[i]] for i in with_dyb], first, asked)
    dtype = next((t.b.dtype for t in group.lows if t is not None), torch.float32)
    sums = (
        [(part, dtype) for part in d_a]
        + [(p.d_lora_b, dtype) for p in first.parts]
        + [(p.d_bias, torch.float32) for p in first.parts]
    )
    calls, found = passes.reduce_calls(sums)
    for call in calls:
        run(call)
    grads_a, grads_b, grads_bias = [None] * len(xa), [None] * len(xa), [None] * len(dy)
    for at, i in enumerate(with_dyb):
        grads_a[low[i]] = found[at]
    for at, i in enumerate(asked):
        grads_bias[i] = found[len(with_dyb) + len(asked) + at]
        if i in low:
            grads_b[low[i]] = found[len(with_dyb) + at]
    return dx, grads_bias, grads_a, grads_b


class _First:
    """The launch over every dy, beside the first batch's decoding; `parts` is what it left."""

    def __init__(self, config: LowRankConfig, members: list[DyMember], arch: int) -> None:
        self.config, self.members, self.arch, self.parts = config, members, arch, []

    def launch(self, todo: list[tuple[Rectangle, Format]]) -> None:
        if self.members:
            call, self.parts = passes.dy_call(self.members, self.config, arch=self.arch)
            run(passes.beside_decoding(call, todo))
        elif todo:
            run(decode_call(todo))


def _dx(group, dy, x, dx, used, low, need_a, first, asked) -> list[Tensor | None]:
    """Fills dx; partial sums of dA, None where not wanted."""
    lows, arch, d_a = [group.lows[i] for i in low], first.arch, [None] * len(low)
    parts = group.batches(used, dy[used[0]].element_size()) if dx is not None else []
    if dx is None:
        first.launch([])
    slabs, started = _Slabs(group, dy[used[0]], parts), False
    for index, batch in enumerate(parts):
        dense, todo = slabs.of(batch)
        if index == 0:
            first.launch(todo)
        elif todo:
            run(decode_call(todo))
        if index == 0 and low:
            dybs = [first.parts[asked.index(i)].dyb for i in low]
            call, d_a = passes.x_call(x, dx, lows, dybs, need_a, first.config, arch=arch)
            run(call)
            started = True
        if group.choice.gemm == "triton":
            operands = [dy[i] for i in batch], [dense[i] for i in batch], dx
            run(dx_sum_call(*operands, accumulate=started, arch=arch))
            started = True
            continue
        for i in batch:
            single.multiply(dy[i], dense[i], dx, accumulate=started)
            started = True
    if dx is None and any(need_a):
        dybs = [first.parts[asked.index(i)].dyb for i in low]
        call, d_a = passes.x_call(x, None, lows, dybs, need_a, first.config, arch=arch)
        run(call)
    return d_a
