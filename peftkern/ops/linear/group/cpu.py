"""Launchers of the native CPU kernels for a group: one engine call, the GEMV a member, or the vendor's GEMM
and one low-rank pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ....runtime.abi import addresses
from ....runtime.native import DTYPES, address, dtype_of, empty, native, scratch, weight_view
from .. import cpu as single
from .. import cpu_rows
from .spec import Spec, split_needs

__all__ = ["Described", "FewRows", "backward", "contiguous", "few_rows", "forward", "held"]


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


class Described:
    """Linears on one input as the C ABI takes them, for any number of rows; holds every tensor whose address
    it gave away. Lists as in the op's schema. Rows and seeds of the adapters belong to a call."""

    __slots__ = ("at", "biases", "dropout_ps", "k", "kernels", "lora_a", "lora_b", "loras", "members", "n")
    __slots__ += ("quants", "regime", "scalings", "views", "weights")
    forms_x_late = False

    def __init__(
        self, k: int, n, weights, quants, blocksizes, biases, lora_a, lora_b, members, scalings, dropout_ps
    ) -> None:
        self.k, self.n, self.members, self.scalings, self.dropout_ps = k, n, members, scalings, dropout_ps
        self.weights, self.biases, self.lora_a, self.lora_b = map(
            contiguous, (weights, biases, lora_a, lora_b)
        )
        self.quants = [
            (*quants[6 * i : 6 * i + 6], *blocksizes[2 * i : 2 * i + 2]) for i in range(len(weights))
        ]
        self.kernels, described = native(), zip(self.weights, self.quants, n, strict=True)
        self.views = [weight_view(weight, quant, size, k) for weight, quant, size in described]
        low = zip(self.lora_a, self.lora_b, scalings, strict=True)
        self.loras = [single.lora_view(a, b, scaling, 0.0, None) for a, b, scaling in low]
        dense, blocksize = [quant[0] is None for quant in self.quants], min(blocksizes[::2])
        sizes = dict(n=sum(n), k=k, dense=all(dense), blocksize=blocksize, tiles=not any(dense))
        self.regime = functools.partial(cpu_rows.choose, **sizes)

    def choice(self, m: int, dtype: torch.dtype, **options: bool) -> str:
        """The regime of a call on m rows; forward: whether it makes y; tiles: whether bf16 tiles serve the
        call where they serve each of its weights."""
        return self.regime(m=m, dtype=str(dtype)[6:], isa=self.kernels.isa(), **options).regime

    def dropping(self, seeds: Sequence[Tensor | None]) -> list:
        """The descriptors of the adapters in a call with these seeds; none: no dropout."""
        if not seeds or all(seed is None for seed in seeds):
            return self.loras
        low = zip(self.lora_a, self.lora_b, self.scalings, self.dropout_ps, seeds, strict=True)
        return [single.lora_view(*options) for options in low]

    def no_base(self, i: int) -> object:
        """Member i without its product: y and dx are added to."""
        return self.kernels.Weight(*(0,) * 7, self.n[i], self.k, 64, 256, 0)

    def forward(
        self, x: Tensor, lead: Sequence[int], rows: Sequence[int], seeds: Sequence[Tensor | None]
    ) -> tuple[list, list]:
        """x [M, K] -> y [*lead, N_i] of the members, xa of the adapters, as the reference."""
        x, dtype, m = x.contiguous(), x.dtype, x.shape[0]
        rows, loras = list(zip(rows[::2], rows[1::2], strict=True)), self.dropping(seeds)
        y = [torch.empty((*lead, size), dtype=dtype, device="cpu") for size in self.n]
        shapes = ((end - begin, a.shape[0]) for (begin, end), a in zip(rows, self.lora_a, strict=True))
        xa = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]
        low = [
            self.kernels.Adapter(lora, member, begin, end, part.data_ptr(), 0, 0, 0)
            for lora, member, (begin, end), part in zip(loras, self.members, rows, xa, strict=True)
        ]
        regime = self.choice(m, dtype, forward=True)
        if regime == "gemm":
            self._engine(x, m, y, self.views, self.biases, low)
        elif regime == "gemv":
            done = self._few_rows(x, m, y, xa, rows, loras)
            left = [adapter for j, adapter in enumerate(low) if j not in done]
            self._on_top(x, m, y, [None] * len(y), left)
        else:
            parts = zip(self.weights, self.quants, self.views, y, self.biases, strict=True)
            left = [
                single.vendor_forward(x, weight, quant, view, out.view(m, out.shape[-1]), bias)
                for weight, quant, view, out, bias in parts
            ]
            self._on_top(x, m, y, left, low)
        return y, xa

    def _on_top(self, x: Tensor, m: int, y: list[Tensor], biases: list[Tensor | None], low: list) -> None:
        if low or any(bias is not None for bias in biases):
            self._engine(x, m, y, [self.no_base(i) for i in range(len(y))], biases, low)

    def _engine(self, x: Tensor, m: int, y: list[Tensor], views: list, biases: list, low: list) -> None:
        members = [
            self.kernels.Member(view, address(bias), dtype_of(bias), out.data_ptr(), 0, 0)
            for view, bias, out in zip(views, biases, y, strict=True)
        ]
        self.kernels.qlora_group_fwd(members, low, x.data_ptr(), DTYPES[x.dtype], m)

    def _few_rows(
        self, x: Tensor, m: int, y: list[Tensor], xa: list[Tensor], rows: list, loras: list
    ) -> set[int]:
        """Every member with its first adapter on all rows; which adapters that were."""
        done = set()
        for i, (view, bias, out) in enumerate(zip(self.views, self.biases, y, strict=True)):
            whole = (j for j, member in enumerate(self.members) if member == i and rows[j] == (0, m))
            j = next(whole, None)
            lora = single.no_adapter() if j is None else loras[j]
            low = 0 if j is None else xa[j].data_ptr()
            made = address(bias), dtype_of(bias), out.data_ptr(), low, True
            self.kernels.qlora_linear_fwd(view, lora, x.data_ptr(), DTYPES[x.dtype], m, *made)
            done |= set() if j is None else {j}
        return done

    def backward(self, dy, x, xa, needs, rows, seeds) -> tuple[Tensor | None, list, list, list]:
        """dy_i [..., N_i] or None, x [M, K] -> dx [M, K] and the lists of gradients, as the reference."""
        members, kernels = self.members, self.kernels
        dy, x = contiguous(dy), None if x is None else x.contiguous()
        used = [i for i, g in enumerate(dy) if g is not None]
        m, dtype = dy[used[0]].shape[:-1].numel(), dy[used[0]].dtype
        need_x, need_bias, need_a, need_b = split_needs(needs, len(dy), len(members))
        make = torch.empty if m else torch.zeros

        def made(shape: Sequence[int], dtype: torch.dtype, wanted: bool) -> Tensor | None:
            return make(shape, dtype=dtype, device="cpu") if wanted else None

        dx = made((m, self.k), dtype, need_x)
        sums = [need and g is not None for g, need in zip(dy, need_bias, strict=True)]
        d_bias = [made((n,), torch.float32, wanted) for n, wanted in zip(self.n, sums, strict=True)]
        live = [dy[member] is not None for member in members]
        d_a, d_b = (
            [made(t.shape, t.dtype, need and use) for t, need, use in zip(low, wanted, live, strict=True)]
            for low, wanted in ((self.lora_a, need_a), (self.lora_b, need_b))
        )
        if m == 0:
            return dx, d_bias, d_a, d_b
        vendor = self.choice(m, dtype, forward=False) == "vendor"
        if vendor and need_x:
            self._vendor_backward(dy, used, dx)
        if vendor and not any(live) and not any(sums):
            return dx, d_bias, d_a, d_b
        views = {i: self.no_base(i) if vendor else self.views[i] for i in used}
        parts = [kernels.Member(views[i], 0, 0, 0, dy[i].data_ptr(), address(d_bias[i])) for i in used]
        at, loras, low, held = {i: position for position, i in enumerate(used)}, self.dropping(seeds), [], []
        for j, member in enumerate(members):
            if live[j]:
                begin, end = rows[2 * j : 2 * j + 2]
                held.append(empty((end - begin, self.lora_a[j].shape[0])))
                outs = address(xa[j]), held[-1].data_ptr(), address(d_a[j]), address(d_b[j])
                low.append(kernels.Adapter(loras[j], at[member], begin, end, *outs))
        kernels.qlora_group_bwd(parts, low, address(x), DTYPES[dtype], m, address(dx))
        return dx, d_bias, d_a, d_b

    def _vendor_backward(self, dy: list[Tensor | None], used: list[int], dx: Tensor) -> None:
        """dx [M, K] = sum of dy_i W_i by slices of columns, those of all members in one product, so that no
        partial sum is rounded."""
        flat = {i: dy[i].view(len(dx), self.n[i]) for i in used}
        if len(used) == 1:
            (i,) = used
            single.vendor_backward(flat[i], self.weights[i], self.quants[i], self.views[i], dx)
            return
        if dx.dtype == torch.float32 and all(self.quants[i][0] is None for i in used):
            for position, i in enumerate(used):
                dx.addmm_(flat[i], self.weights[i].to(dx.dtype), beta=min(position, 1))
            return
        together, total = torch.cat(list(flat.values()), dim=1), sum(self.n[i] for i in used)
        slices, out = single.slices(self.k, total, dx.dtype)
        for cols in slices:
            width, start = cols.stop - cols.start, 0
            stacked = out[: total * width].view(total, width)
            for i in used:
                part = stacked[start : start + self.n[i]]
                if self.quants[i][0] is None:
                    part.copy_(self.weights[i][:, cols])
                else:
                    whole = slice(0, self.n[i])
                    single.decode_slice(self.quants[i], self.views[i], whole, cols, part.view(-1))
                start += self.n[i]
            dx[:, cols] = together @ stacked


def forward(
    x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds
):
    """As the reference."""
    low = lora_a, lora_b, members, scalings, dropout_ps
    return Described(x.shape[1], n, weights, quants, blocksizes, biases, *low).forward(
        x, x.shape[:1], rows, seeds
    )


def backward(dy, x, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """As the reference."""
    lora_a, lora_b, members, rows, scalings, dropout_ps, seeds = adapters
    n = [0 if g is None else g.shape[1] for g in dy]
    low = [None] * len(n), lora_a, lora_b, members, scalings, dropout_ps
    return Described(k, n, weights, quants, blocksizes, *low).backward(dy, x, xa, needs, rows, seeds)


def held(k: int, spec: Spec, biases, lora_a, lora_b) -> Described | None:
    """A group described for calls to come; None where it would read a copy, which later writes to the
    original do not reach, or where there is nothing to multiply with."""
    if not all(t is None or t.is_contiguous() for t in (*spec.weights, *biases, *lora_a, *lora_b)):
        return None
    if not all(weight.numel() for weight in spec.weights):
        return None
    head = k, spec.n, spec.weights, spec.quants, spec.blocksizes, biases
    found = Described(*head, lora_a, lora_b, spec.members, spec.scalings, spec.dropout_ps)
    kept = (*spec.weights, *spec.quants, *lora_a, *lora_b)
    found.at = addresses(kept)
    return found


def few_rows(x: Tensor, spec: Spec, biases, lora_a, lora_b) -> FewRows | None:
    """The GEMV of every member, for calls to come on x's rows; at most one adapter a member, on all rows.
    None where the GEMV is not the choice, or `held` is None."""
    group = None if None in spec.quants[::6] else held(x.shape[1], spec, biases, lora_a, lora_b)
    if group is None or group.choice(x.shape[0], x.dtype, forward=True) != "gemv":
        return None
    return FewRows(group, x.shape[0], x.dtype)


class FewRows:
    """The GEMV of each member with its adapter, everything but x described beforehand. Threads may share
    it."""

    def __init__(self, group: Described, m: int, dtype: torch.dtype) -> None:
        self.held, self.m, self.parts, rank = group, m, [], 0
        for i, (view, n, bias) in enumerate(zip(group.views, group.n, group.biases, strict=True)):
            j = next((j for j, member in enumerate(group.members) if member == i), None)
            lora = single.no_adapter() if j is None else group.loras[j]
            rank = max(rank, 0 if j is None else group.lora_a[j].shape[0])
            self.parts.append((n, (view, lora), (address(bias), dtype_of(bias))))
        self.dtype, self.xa = DTYPES[dtype], 4 * m * rank
        self.run = group.kernels.qlora_linear_fwd

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., K] of the shape and dtype it was made for -> y_i [..., N_i]."""
        x, lead, results = x.contiguous(), x.shape[:-1], []
        low, at = scratch(self.xa).data_ptr(), x.data_ptr()
        for n, what, bias in self.parts:
            y = x.new_empty((*lead, n))
            self.run(*what, at, self.dtype, self.m, *bias, y.data_ptr(), low, True)
            results.append(y)
        return results
