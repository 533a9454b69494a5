"""Launchers of the native CPU kernels for a group: one engine call, the GEMV a member, or the vendor's GEMM
and one low-rank pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....runtime.native import DTYPES, address, dtype_of, empty, native, scratch, weight_view
from .. import config, cpu_rows
from .. import cpu as single
from .spec import Spec, split_needs

__all__ = ["FewRows", "backward", "few_rows", "forward"]


def contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


class NativeGroup:
    """The checked arguments as the C ABI takes them; holds every tensor whose address it gave away."""

    def __init__(
        self,
        m: int,
        k: int,
        n: list[int],
        weights,
        quants,
        blocksizes,
        lora_a,
        lora_b,
        members,
        rows,
        scalings,
        dropout_ps,
        seeds,
    ):
        self.m, self.k, self.n = m, k, n
        self.weights, self.lora_a, self.lora_b = (
            contiguous(weights),
            contiguous(lora_a),
            contiguous(lora_b),
        )
        self.quants = [
            (*quants[6 * i : 6 * i + 6], *blocksizes[2 * i : 2 * i + 2]) for i in range(len(weights))
        ]
        self.views = [
            weight_view(w, q, size, k) for w, q, size in zip(self.weights, self.quants, n, strict=True)
        ]
        self.members, self.rows = members, list(zip(rows[::2], rows[1::2], strict=True))
        self.seeds = seeds
        options = zip(self.lora_a, self.lora_b, scalings, dropout_ps, seeds, strict=True)
        self.loras = [single.lora_view(a, b, scaling, p, seed) for a, b, scaling, p, seed in options]

    def choice(self, x: Tensor, *, forward: bool, tiles: bool = True) -> config.Choice:
        """forward: whether y is made; tiles: whether bf16 tiles serve the call where they serve each of its
        weights."""
        dense = [quant[0] is None for quant in self.quants]
        sizes = dict(
            m=self.m,
            n=sum(self.n),
            k=self.k,
            dense=all(dense),
            blocksize=min(quant[6] for quant in self.quants),
            forward=forward,
        )
        return cpu_rows.choose(
            dtype=str(x.dtype)[6:], isa=native().isa(), tiles=tiles and not any(dense), **sizes
        )

    def no_base(self, i: int) -> object:
        """Member i without its product: y and dx are added to."""
        return native().Weight(*(0,) * 7, self.n[i], self.k, 64, 256, 0)


def forward(
    x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
):
    """As the reference."""
    x, biases = x.contiguous(), contiguous(biases)
    group = NativeGroup(
        *x.shape, n, weights, quants, blocksizes, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
    )
    y = [x.new_empty((group.m, size)) for size in n]
    xa = [empty((end - begin, a.shape[0])) for (begin, end), a in zip(group.rows, lora_a, strict=True)]
    regime = group.choice(x, forward=True).regime
    if regime == "gemm":
        _low_level_forward(group, x, y, xa, biases, range(len(members)), group.views)
        return y, xa
    if regime == "gemv":
        done = _gemv_forward(group, x, y, xa, biases)
        biases = [None] * len(y)
    else:
        done = set()
        for i, weight in enumerate(group.weights):
            biases[i] = single.vendor_forward(x, weight, group.quants[i], group.views[i], y[i], biases[i])
    left = [j for j in range(len(members)) if j not in done]
    if left or any(bias is not None for bias in biases):
        _low_level_forward(group, x, y, xa, biases, left, [group.no_base(i) for i in range(len(y))])
    return y, xa


def _low_level_forward(group: NativeGroup, x: Tensor, y, xa, biases, adapters, views) -> None:
    parts = zip(views, biases, y, strict=True)
    members = [
        native().Member(view, address(bias), dtype_of(bias), address(out), 0, 0) for view, bias, out in parts
    ]
    low = [
        native().Adapter(group.loras[j], group.members[j], *group.rows[j], address(xa[j]), 0, 0, 0)
        for j in adapters
    ]
    buffer = scratch(native().group_scratch_bytes(members, low, group.m))
    native().qlora_group_fwd(members, low, address(x), dtype_of(x), group.m, address(buffer), buffer.numel())


def _gemv_forward(group: NativeGroup, x: Tensor, y, xa, biases) -> set[int]:
    """Every member with its first adapter on all rows; which adapters that were."""
    done = set()
    for i, view in enumerate(group.views):
        whole = (j for j, member in enumerate(group.members) if member == i and group.rows[j] == (0, group.m))
        j = next(whole, None)
        lora = single.lora_view(None, None, 1.0, 0.0, None) if j is None else group.loras[j]
        size = native().scratch_bytes(group.m, group.n[i], group.k, 0 if j is None else xa[j].shape[1])
        low = 0 if j is None else address(xa[j])
        head = (
            view,
            lora,
            address(x),
            dtype_of(x),
            group.m,
            address(biases[i]),
            dtype_of(biases[i]),
            address(y[i]),
            low,
            True,
        )
        native().qlora_linear_fwd(*head, address(buffer := scratch(size)), buffer.numel())
        done |= set() if j is None else {j}
    return done


def few_rows(x: Tensor, spec: Spec, biases, lora_a, lora_b) -> FewRows | None:
    """As `_gemv_forward`, for calls to come; at most one adapter a member, on all rows. None where the GEMV
    is not the choice, or would read a copy, which later writes to the original do not reach."""
    tensors = (*spec.weights, *biases, *lora_a, *lora_b)
    if None in spec.quants[::6] or any(t is not None and not t.is_contiguous() for t in tensors):
        return None
    group = NativeGroup(
        *x.shape, spec.n, spec.weights, spec.quants, spec.blocksizes, lora_a, lora_b, *spec[4:]
    )
    return FewRows(group, x.dtype, biases) if group.choice(x, forward=True).regime == "gemv" else None


class FewRows:
    """The GEMV of each member with its adapter, everything but x described beforehand. Threads may share
    it."""

    def __init__(self, group: NativeGroup, dtype: torch.dtype, biases: Sequence[Tensor | None]) -> None:
        self.held = group, biases
        self.m, self.parts, self.size, rank = group.m, [], 0, 0
        for i, (view, n, bias) in enumerate(zip(group.views, group.n, biases, strict=True)):
            j = next((j for j, member in enumerate(group.members) if member == i), None)
            lora = single.lora_view(None, None, 1.0, 0.0, None) if j is None else group.loras[j]
            rank = max(rank, 0 if j is None else group.lora_a[j].shape[0])
            self.size = max(self.size, native().scratch_bytes(group.m, n, group.k, rank))
            self.parts.append((n, (view, lora), (address(bias), dtype_of(bias))))
        self.dtype, self.xa = DTYPES[dtype], -(-4 * group.m * rank // 64) * 64  # what follows stays aligned
        self.run = native().qlora_linear_fwd

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., K] of the shape and dtype it was made for -> y_i [..., N_i]."""
        x, buffer, lead, results = x.contiguous(), scratch(self.xa + self.size), x.shape[:-1], []
        low, at = buffer.data_ptr(), x.data_ptr()
        for n, what, bias in self.parts:
            y = x.new_empty((*lead, n))
            self.run(*what, at, self.dtype, self.m, *bias, y.data_ptr(), low, True, low + self.xa, self.size)
            results.append(y)
        return results


def backward(dy, x, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """As the reference."""
    lora_a, lora_b, members = adapters[:3]
    used = [i for i, g in enumerate(dy) if g is not None]
    first = dy[used[0]]
    need_x, need_bias, need_a, need_b = split_needs(needs, len(weights), len(members))
    make = torch.empty if m else torch.zeros
    live = [j for j, member in enumerate(members) if member in used]
    dx = make((m, k), dtype=first.dtype) if need_x else None
    d_bias = [
        make(dy[i].shape[1], dtype=torch.float32) if i in used and need_bias[i] else None
        for i in range(len(dy))
    ]
    d_a = [make(a.shape, dtype=a.dtype) if j in live and need_a[j] else None for j, a in enumerate(lora_a)]
    d_b = [make(b.shape, dtype=b.dtype) if j in live and need_b[j] else None for j, b in enumerate(lora_b)]
    if m == 0:
        return dx, d_bias, d_a, d_b
    n = [0 if g is None else g.shape[1] for g in dy]
    group = NativeGroup(m, k, n, weights, quants, blocksizes, *adapters)
    x, dy = None if x is None else x.contiguous(), contiguous(dy)
    vendor = group.choice(first, forward=False).regime == "vendor"
    if vendor and need_x:
        _vendor_backward(group, dy, used, dx)
    if vendor and not live and not any(need_bias):
        return dx, d_bias, d_a, d_b
    at = {i: position for position, i in enumerate(used)}
    parts = [
        native().Member(
            group.no_base(i) if vendor else group.views[i], 0, 0, 0, address(dy[i]), address(d_bias[i])
        )
        for i in used
    ]
    dyb = {j: empty((group.rows[j][1] - group.rows[j][0], lora_a[j].shape[0])) for j in live}
    tails = {j: (address(xa[j]), address(dyb[j]), address(d_a[j]), address(d_b[j])) for j in live}
    low = [native().Adapter(group.loras[j], at[members[j]], *group.rows[j], *tails[j]) for j in live]
    buffer = scratch(native().group_scratch_bytes(parts, low, m))
    native().qlora_group_bwd(
        parts, low, address(x), dtype_of(first), m, address(dx), address(buffer), buffer.numel()
    )
    return dx, d_bias, d_a, d_b


def _vendor_backward(group: NativeGroup, dy: list[Tensor | None], used: list[int], dx: Tensor) -> None:
    """dx = sum of dy_i W_i by slices of columns, those of all members in one product, so that no partial sum
    is rounded."""
    if len(used) == 1:
        i = used[0]
        single.vendor_backward(dy[i], group.weights[i], group.quants[i], group.views[i], dx)
        return
    if dx.dtype == torch.float32 and all(group.quants[i][0] is None for i in used):
        for position, i in enumerate(used):
            dx.addmm_(dy[i], group.weights[i].to(dx.dtype), beta=min(position, 1))
        return
    together, total = torch.cat([dy[i] for i in used], dim=1), sum(group.n[i] for i in used)
    slices, out = single.slices(group.k, total, dx.dtype)
    for cols in slices:
        width, start = cols.stop - cols.start, 0
        stacked = out[: total * width].view(total, width)
        for i in used:
            part = stacked[start : start + group.n[i]]
            if group.quants[i][0] is None:
                part.copy_(group.weights[i][:, cols])
            else:
                single.decode_slice(
                    group.quants[i], group.views[i], slice(0, group.n[i]), cols, part.view(-1)
                )
            start += group.n[i]
        dx[:, cols] = together @ stacked
