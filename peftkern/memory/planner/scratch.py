"""What peftkern's operators allocate and free inside themselves, by device: no count from outside sees it.

The same choosers that the launchers ask (`ops/linear/config.py`, `low_rank_config.py`) are asked here, so
that a change of a limit changes the plan too. Every function returns bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...ops.linear import config
from ...ops.linear.low_rank_config import LowRankConfig, beside_a_slab, choose_low_rank, dot_mode
from .cards import Card

__all__ = ["Member", "Operators"]

_LOGITS = 128 << 20  # linear_cross_entropy/triton.py
_CPU_LOGITS, _CPU_MOST, _CPU_LEAST = 48 << 20, 512, 16  # linear_cross_entropy/cpu.py
_CPU_SLICE = 5 << 20  # ops/linear/cpu.py


@dataclass(frozen=True)
class Member:
    """A linear [n, k] of a group; r: its adapter's rank, 0 for none; dense: its weight is not packed."""

    n: int
    k: int
    r: int
    dense: bool = False


@dataclass(frozen=True)
class Operators:
    """The operators on one device for one kind of run.

    itemsize: bytes of an activation. adapter_bytes: of an element of the adapters. isa: of the CPU, as
    `peftkern env` says; None on a GPU.
    """

    card: Card
    itemsize: int = 2
    adapter_bytes: int = 4
    isa: str | None = None

    def forward(self, members: Sequence[Member], m: int) -> int:
        """Of y_i = x W_i^T + ... for m rows of x."""
        if not self.card.is_gpu:
            return self._cpu_slices(members, m, forward=True)
        choice = self._choice(members[0], m, forward=True)
        if choice.regime != "slab":
            return 0
        # Composed of single linears each xa has a tensor that its linear's own replaces.
        replaced = 0 if self._merged(members, choice) else 4 * m * max(one.r for one in members)
        return self._slab(members, choice, by_rows=True) + replaced

    def backward(self, members: Sequence[Member], m: int) -> int:
        """Of dx = sum dy_i W_i and every adapter's gradients."""
        if not self.card.is_gpu:
            return self._cpu_slices(members, m, forward=False) + sum(4 * m * one.r for one in members)
        choice = self._choice(members[0], m, forward=False)
        merged = self._merged(members, choice)
        slab = self._slab(members, choice, by_rows=False) if choice.regime == "slab" else 0
        low = [member for member in members if member.r]
        if merged and low:
            passes = self._passes(sum(one.n for one in members), low[0].k, max(one.r for one in low), m, True)
            sums = sum(self._partials(one, m, passes, fused=False) for one in low)
            return self._at_once(slab, sums, low)
        each = [self._partials(one, m, self._single(one, m, choice)) if one.r else 0 for one in members]
        # Member by member, each further dx in a tensor of its own until it is added.
        apart = self._wide(m, members[0].k) if len(members) > 1 else 0
        return self._at_once(slab, max(each, default=0), low[-1:]) + apart

    def _at_once(self, slab: int, sums: int, low: Sequence[Member]) -> int:
        """The slab is gone when the partial sums are added up into the results, which a count has as well."""
        results = sum(one.r * (one.n + one.k) for one in low) * self.adapter_bytes
        return max(slab + sums - results, sums)

    def glu_backward(self, down: Member, m: int) -> int:
        """Of a gated MLP's second half: the product and its gradient, and the down projection's own."""
        wide = self._wide(m, down.k)
        if not self.card.is_gpu:
            return 2 * wide + self.backward([down], m)
        choice = self._choice(down, m, forward=False)
        at_once = 2 if choice.gemm == "cublas" and choice.regime == "slab" and down.r else 1
        return at_once * wide + self.backward([down], m)

    def prefix_forward(self, rows: int, heads: int, width: int, prefix: int, mask: int) -> int:
        """Of attention with a prefix beside its result and its row sums (prefix_attention/__init__.py): the
        prefix's weights, and in fp32 its product, the output and both joined; or, before these, a mask of so
        many elements in the activations' dtype, and its negation before there is a result."""
        wide, weights, sums = (4 * rows * heads * n for n in (width, prefix, 1))
        made = self.itemsize * mask
        turned = made + mask - self._wide(rows, heads * width) - sums
        return max(3 * wide + weights + 2 * sums, made, turned)

    def prefix_backward(self, rows: int, heads: int, width: int, prefix: int, mask: int, kernel: int) -> int:
        """The same of its backward, beside dq, dk and dv: queries and dy in fp32, the weights and their
        gradients, the mask; then the kernel's own bytes, or dy times y. dy of fp32 is there as it is."""
        wide, weights, sums = (4 * rows * heads * n for n in (width, prefix, 1))
        copied = 2 if self.itemsize < 4 else 1
        held = copied * wide + 2 * weights + 3 * sums + self.itemsize * mask
        return held + max(copied * wide, kernel)

    def loss(self, rows: int, vocab: int, tile: int | None = None) -> int:
        """Of linear + cross-entropy on a dense head: the logits of as many rows as are there at a time."""
        return min(rows, tile or self.loss_rows(vocab)) * vocab * self.logit_bytes

    def loss_rows(self, vocab: int) -> int:
        """Rows of logits that the loss holds at a time, of itself."""
        if not self.card.is_gpu:
            return min(max(_CPU_LOGITS // (vocab * 4) // 16 * 16, _CPU_LEAST), _CPU_MOST)
        rows = _LOGITS // (vocab * self.itemsize)
        return max(rows // 128 * 128 if rows >= 128 else rows, 16)

    @property
    def logit_bytes(self) -> int:
        return self.itemsize

    def _wide(self, m: int, k: int) -> int:
        return m * k * self.itemsize

    def _choice(self, member: Member, m: int, *, forward: bool) -> config.Choice:
        dtype = "float32" if self.itemsize == 4 else "bfloat16"
        return config.choose_gpu(
            arch=self.card.arch, dtype=dtype, m=m, forward=forward, cuda=False, dense=member.dense
        )

    def _merged(self, members: Sequence[Member], choice: config.Choice) -> bool:
        sizes = [0 if one.dense else one.n * one.k * self.itemsize for one in members]
        return choice.regime == "slab" and len(members) > 1 and max(sizes) <= choice.slab_bytes

    def _slab(self, members: Sequence[Member], choice: config.Choice, *, by_rows: bool) -> int:
        """The buffer that weights are decoded into."""
        sizes = [0 if one.dense else one.n * one.k * self.itemsize for one in members]
        if self._merged(members, choice):
            return max(sum(sizes[i] for i in batch) for batch in config.batches(sizes, choice.slab_bytes))
        largest = 0
        for one in members:
            if one.dense:
                continue
            total, width = (one.n, one.k) if by_rows else (one.k, one.n)
            parts = config.slices(total, width, self.itemsize, choice.slab_bytes)
            rows = max(part.stop - part.start for part in parts)
            largest = max(largest, rows * width * self.itemsize)
        return largest

    def _single(self, one: Member, m: int, choice: config.Choice) -> LowRankConfig:
        return self._passes(one.n, one.k, one.r, m, choice.regime == "slab")

    def _passes(self, n: int, k: int, r: int, m: int, slab: bool) -> LowRankConfig:
        x = "float32" if self.itemsize == 4 else "bfloat16"
        adapter = "float32" if self.adapter_bytes == 4 else "bfloat16"
        mode = dot_mode(x, adapter, self.card.arch)
        found = choose_low_rank(m, n, k, r, mode=mode, sms=self.card.sms or 128, arch=self.card.arch)
        if not slab:
            return found
        return beside_a_slab(found, n, self.itemsize, self.card.l2)

    def _partials(self, one: Member, m: int, passes: LowRankConfig, fused: bool | None = None) -> int:
        """dyb and the partial sums of dA and dB; one chunk of these is the result itself."""
        fused = passes.fused if fused is None else fused
        columns = math.ceil(one.n / passes.dy.cols) if fused else 1
        dyb = 4 * m * one.r * (columns + (1 if fused and passes.sum_dyb and columns > 1 else 0))
        dy_chunks, x_chunks = math.ceil(m / passes.dy_rows), math.ceil(m / passes.x_rows)
        sums = (
            4
            * one.r
            * ((one.n * dy_chunks if dy_chunks > 1 else 0) + (one.k * x_chunks if x_chunks > 1 else 0))
        )
        return dyb + sums

    def _cpu_slices(self, members: Sequence[Member], m: int, *, forward: bool) -> int:
        """torch's product with a decoded slice is a tensor of its own; members' gradients are put
        together."""
        isa = self.isa or "avx512"
        dtype = "float32" if self.itemsize == 4 else "bfloat16"
        total = sum(one.n for one in members)
        dense = all(one.dense for one in members)
        row = config.TABLE.get(isa, config.TABLE["baseline"])
        choice = config.choose(dtype=dtype, isa=isa, m=m, n=total, k=members[0].k, dense=dense)
        if choice.regime != "vendor" or dense:
            return 0
        width = max(one.k for one in members) if forward else total
        step = min(row.slice_rows, _CPU_SLICE // (width * self.itemsize) // 32 * 32)
        limit = max(one.n for one in members) if forward else members[0].k
        together = self._wide(m, total) if len(members) > 1 and not forward else 0
        return together + self._wide(m, min(limit, max(step, 32)))
