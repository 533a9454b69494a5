"""Who multiplies a block of rows by the head's weight on a CPU: the vendor's GEMM, or our engine on slices of
the vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...runtime.native import address, empty, native, reused, weight_view, zeros
from ..linear import cpu_rows

__all__ = ["EngineHead", "Grads", "Head", "VendorHead", "served_by_vendor"]

# Columns of the vocabulary in a product of the engine: the packed gradient of 256 rows of them fits its 5 MB,
# so that the weight is decoded
# once for a block of rows.
_WIDTH = 4096
_Part = slice | Tensor


class Grads(NamedTuple):
    """What is wanted: dx [M, K] in x's dtype, the parameters' in fp32. Rows without a label stay zero;
    d_weight the first block fills."""

    dx: Tensor | None
    d_bias: Tensor | None
    d_lora_a: Tensor | None
    d_lora_b: Tensor | None
    d_weight: Tensor | None

    @classmethod
    def of(cls, x: Tensor, n: int, lora_a: Tensor | None, needs: tuple[bool, ...], filled: bool) -> Grads:
        k, rank = x.shape[1], 0 if lora_a is None else lora_a.shape[0]
        small = (
            zeros(s) if need else None
            for s, need in zip(((n,), (rank, k), (n, rank)), needs[1:4], strict=True)
        )
        d_weight = None if not needs[4] else reused((n, k), "d_weight") if filled else zeros(n, k)
        return cls(torch.zeros_like(x) if needs[0] else None, *small, d_weight)


class Head(Protocol):
    """`dtype` of the logits, which lie in slices of `width` columns, each [rows, width], the last one
    narrower."""

    dtype: torch.dtype
    width: int

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Fills `out` [rows * n] for x [rows, K] of `dtype`; without the bias."""

    def gradients(self, x: Tensor, d_logits: Tensor, part: _Part, grads: Grads, first: bool) -> None:
        """Writes dx[part], adds to the others; `first`: d_weight holds nothing yet."""


def served_by_vendor(x: Tensor, weight: Tensor, quant: tuple, n: int, rows: int, trained: bool) -> bool:
    """A dense weight of x's dtype, where the vendor is fast. The gradient of a trained 16-bit weight is
    summed in fp32: the engine's."""
    if quant[0] is not None or weight.dtype != x.dtype or (trained and x.dtype != torch.float32):
        return False
    found = cpu_rows.choose(dtype=str(x.dtype)[6:], isa=native().isa(), m=rows, n=n, k=x.shape[1], dense=True)
    return found.regime == "vendor"


class VendorHead:
    """A dense weight in x's dtype: torch.mm throughout, one slice."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        quant: tuple,
        n: int,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
    ) -> None:
        self.weight, self.dtype, self.width, self.n = weight, x.dtype, n, n
        self.scaling, self.a, self.b, self.xa = scaling, None, None, None
        if lora_a is not None:
            self.a, self.b = lora_a.to(x.dtype), lora_b.to(x.dtype)

    def logits(self, x: Tensor, out: Tensor) -> None:
        out = out.view(-1, self.n)
        torch.mm(x, self.weight.t(), out=out)
        if self.a is not None:
            self.xa = x @ self.a.t()
            out.addmm_(self.xa, self.b.t(), alpha=self.scaling)

    def gradients(self, x: Tensor, d_logits: Tensor, part: _Part, grads: Grads, first: bool) -> None:
        d_logits = d_logits.view(-1, self.n)
        dyb = (
            d_logits @ self.b
            if self.a is not None and (grads.dx is not None or grads.d_lora_a is not None)
            else None
        )  # unscaled
        if grads.dx is not None:
            dx = d_logits @ self.weight
            grads.dx[part] = dx if dyb is None else dx.addmm_(dyb, self.a, alpha=self.scaling)
        if grads.d_bias is not None:
            grads.d_bias.add_(d_logits.sum(0, dtype=torch.float32))
        if grads.d_lora_a is not None:
            grads.d_lora_a.add_(dyb.t() @ x, alpha=self.scaling)
        if grads.d_lora_b is not None:
            grads.d_lora_b.add_(d_logits.t() @ self.xa, alpha=self.scaling)
        if grads.d_weight is not None:
            grads.d_weight.addmm_(d_logits.t(), x, beta=0 if first else 1)


class EngineHead:
    """A 4-bit weight, or one in another dtype than the products': our engine decodes it; logits and gradients
    are fp32."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        quant: tuple,
        n: int,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
    ) -> None:
        self.n, self.k, self.dtype, self.scaling = n, x.shape[1], torch.float32, scaling
        self.a, self.b = (
            (None, None) if lora_a is None else (lora_a.float().contiguous(), lora_b.float().contiguous())
        )
        self.rank = 0 if lora_a is None else lora_a.shape[0]
        self.width = min(n, _aligned_width(quant, self.k))
        self.slices = [slice(v, min(v + self.width, n)) for v in range(0, n, self.width)]
        self.weights = [_rows(weight, quant, cols, self.k) for cols in self.slices]

    def _call(self, index: int) -> tuple[object, object]:
        """The weight's and the adapter's descriptor for one slice."""
        cols, (weight, quant) = self.slices[index], self.weights[index]
        size = cols.stop - cols.start
        b = None if self.b is None else self.b[cols]
        lora = native().Lora(address(self.a), address(b), self.rank, 0, self.scaling, 0, 0)
        return weight_view(weight, quant, size, self.k), lora

    def logits(self, x: Tensor, out: Tensor) -> None:
        self.xa = empty(len(x), self.rank)
        for index, cols in enumerate(self.slices):
            y = out[len(x) * cols.start : len(x) * cols.stop]
            made = address(y), address(self.xa), False
            native().qlora_linear_fwd(*self._call(index), address(x), 0, len(x), 0, 0, *made)

    def gradients(self, x: Tensor, d_logits: Tensor, part: _Part, grads: Grads, first: bool) -> None:
        dx = None if grads.dx is None else zeros(x.shape)
        for index in range(len(self.slices)):
            self._gradients_of_slice(index, x, d_logits, dx, grads, first)
        if dx is not None:
            grads.dx[part] = dx.to(grads.dx.dtype)

    def _gradients_of_slice(
        self, index: int, x: Tensor, d_logits: Tensor, dx: Tensor | None, grads: Grads, first: bool
    ) -> None:
        cols, rows = self.slices[index], len(x)
        size, dy = cols.stop - cols.start, d_logits[rows * cols.start : rows * cols.stop]
        shapes = ((rows, self.k), (self.rank, self.k), (size, self.rank), (size,))
        targets = (
            dx,
            grads.d_lora_a,
            *(None if g is None else g[cols] for g in (grads.d_lora_b, grads.d_bias)),
        )
        parts = [
            None if target is None else empty(shape) for target, shape in zip(targets, shapes, strict=True)
        ]
        if any(target is not None for target in targets):
            dyb = empty(rows, self.rank)
            outputs = address(self.xa), address(dyb), *map(address, parts)
            native().qlora_linear_bwd(*self._call(index), address(dy), address(x), 0, rows, *outputs)
        for target, value in zip(targets, parts, strict=True):
            if target is not None:
                target.add_(value)
        if grads.d_weight is not None:
            grads.d_weight[cols].addmm_(dy.view(rows, size).t(), x, beta=0 if first else 1)


def _aligned_width(quant: tuple, k: int) -> int:
    """About _WIDTH rows of the weight, such that a slice begins with a block of its absmax, and of the absmax
    of that."""
    code, nested, blocksize, nested_blocksize = quant[0], quant[2] is not None, quant[6], quant[7]
    unit = 1 if code is None else blocksize * (nested_blocksize if nested else 1)
    step = unit // math.gcd(unit, k)
    return max(_WIDTH // step, 1) * step


def _rows(weight: Tensor, quant: tuple, rows: slice, k: int) -> tuple[Tensor, tuple]:
    """Those rows of a dense or 4-bit weight [n, k], no copy; they begin with a block."""
    code, absmax, absmax_8bit, absmax_code, nested_absmax, offset, blocksize, nested_blocksize = quant
    if code is None:
        return weight[rows], quant
    first = rows.start * k // blocksize
    absmax, absmax_8bit = (None if t is None else t.reshape(-1)[first:] for t in (absmax, absmax_8bit))
    nested_absmax = None if nested_absmax is None else nested_absmax.reshape(-1)[first // nested_blocksize :]
    packed = weight.reshape(-1)[rows.start * k // 2 :]
    return packed, (
        code,
        absmax,
        absmax_8bit,
        absmax_code,
        nested_absmax,
        offset,
        blocksize,
        nested_blocksize,
    )
