"""Quadratic penalties on dW = s B A around the pretrained weights, in O((N + K) r) and without any N x K
matrix.

With the Fisher's row sums r, column sums c and total S, F_ij ~ r_i c_j / S has the same sums as F, and

    1/2 sum_ij F_ij (s B A)_ij^2 = s^2 / (2 S) <B^T diag(r) B, A diag(c) A^T>,

of which the gradients are s^2/S diag(r) B (A diag(c) A^T) and s^2/S (B^T diag(r) B) A diag(c). With r = c = 1
and S = 1 it is L2-SP, 1/2 |s B A|^2. Penalties on A and B themselves are no substitute: at B = 0 the loss's
gradient of A, and with it A's Fisher, is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .fisher import FisherFactors
from .layers import Factors, lora_factors, trained_elsewhere

__all__ = ["DeltaPenalty"]

# Bytes of factors that are stacked at a time: some three times as much is scratch.
_CHUNK_BYTES = 2 << 20


@dataclass
class _Chunk:
    """Layers of one shape. rows [L, N] (with s^2 / S in them) and columns [L, K], None for all ones; scale
    [L, 1, 1] is s^2 where None."""

    names: list[str]
    a: list[Tensor]
    b: list[Tensor]
    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor

    def products(
        self, a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Values [L]; M = B^T diag(r) B and C = A diag(c) A^T [L, r, r]; diag(r) B and A diag(c), the scale
        within the rows."""
        wide = torch.promote_types(a[0].dtype, torch.float32)
        stacked_a, stacked_b = torch.stack(list(a)).to(wide), torch.stack(list(b)).to(wide)
        rb = stacked_b * (self.scale if self.rows is None else self.rows[:, :, None])
        ac = stacked_a if self.columns is None else stacked_a * self.columns[:, None, :]
        m, c = stacked_b.transpose(1, 2).bmm(rb), ac.bmm(stacked_a.transpose(1, 2))
        return 0.5 * (m * c).sum((1, 2)), m, c, rb, ac

    def gradients(
        self, a: Sequence[Tensor], b: Sequence[Tensor], weight: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values [L], and weight times their gradients with respect to a [L, r, K] and b [L, N, r]."""
        values, m, c, rb, ac = self.products(a, b)
        return values, (m * weight).bmm(ac), rb.bmm(c * weight)


class DeltaPenalty:
    """1/2 sum F dW^2 of an adapter in nats per prediction (EWC), or 1/2 |dW|^2 (L2-SP) without a Fisher;
    `weight` is the caller's.

    Example:
        penalty = DeltaPenalty(model, collect_fisher(model, source_batches))
        loss = model(**batch).loss + 3.0 * penalty.value()   # then backward, clip, step
        print(penalty.by_layer())                            # nats
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherFactors | None = None,
        *,
        adapter: str | None = None,
        allow_others: bool = False,
    ) -> None:
        """Hold the factors of `model`'s layers, and copies of the sums on their devices.

        allow_others: accept trainable parameters outside the factors, which the penalty does not see.
        Raises: ValueError for those, for layers that are not s B A, and for a Fisher of another base.
        """
        factors = lora_factors(model, adapter=adapter)
        others = [] if allow_others else trained_elsewhere(model, factors)
        if others:
            raise ValueError(
                f"model: {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''} is trained"
                " and no factor of a LoRA update, so that the penalty would not hold it: freeze it, or pass"
                " allow_others=True if you know that"
            )
        if fisher is not None:
            fisher.require_base(factors)
        self._order = list(factors)
        self._chunks = [_chunk(group, fisher) for group in _groups(factors)]

    @property
    def bytes(self) -> int:
        """Memory that the sums take."""
        held = (
            tensor
            for chunk in self._chunks
            for tensor in (chunk.rows, chunk.columns, chunk.scale)
            if tensor is not None
        )
        return sum(tensor.nbytes for tensor in held)

    def value(self) -> Tensor:
        """The penalty, a scalar to differentiate."""
        parts = [_ChunkPenalty.apply(chunk, *chunk.a, *chunk.b).sum() for chunk in self._chunks]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    @torch.no_grad()
    def by_layer(self) -> dict[str, float]:
        """The penalty of each layer."""
        values = {
            name: value
            for chunk in self._chunks
            for name, value in zip(chunk.names, chunk.products(chunk.a, chunk.b)[0].tolist(), strict=True)
        }
        return {name: values[name] for name in self._order}

    @torch.no_grad()
    def add_gradients(self, weight: float) -> Tensor:
        """Add weight times the gradient to every factor's .grad, after backward and before clipping; returns
        the penalty.

        It is what `(weight * value()).backward()` does, without autograd and with some 6 MB of scratch at any
        size of model.
        """
        values = []
        for chunk in self._chunks:
            if not weight:
                values.append(chunk.products(chunk.a, chunk.b)[0].sum())
                continue
            of_layers, grad_a, grad_b = chunk.gradients(chunk.a, chunk.b, weight)
            values.append(of_layers.sum())
            _accumulate([*chunk.a, *chunk.b], [*grad_a.unbind(), *grad_b.unbind()])
        return torch.stack([value.to(values[0].device) for value in values]).sum()


class _ChunkPenalty(torch.autograd.Function):
    """The values [L] of a chunk; nothing but the factors themselves is saved."""

    @staticmethod
    def forward(ctx: Any, chunk: _Chunk, *factors: Tensor) -> Tensor:
        ctx.chunk = chunk
        ctx.save_for_backward(*factors)
        return chunk.products(chunk.a, chunk.b)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        factors, layers = ctx.saved_tensors, len(ctx.chunk.names)
        _, grad_a, grad_b = ctx.chunk.gradients(factors[:layers], factors[layers:], grad[:, None, None])
        gradients = (*grad_a.unbind(), *grad_b.unbind())
        return None, *(gradient.to(factor.dtype) for gradient, factor in zip(gradients, factors, strict=True))


def _accumulate(factors: list[Tensor], gradients: list[Tensor]) -> None:
    pairs = [
        (factor, gradient)
        for factor, gradient in zip(factors, gradients, strict=True)
        if factor.requires_grad
    ]
    for factor, _ in pairs:
        if factor.grad is None:
            factor.grad = torch.zeros_like(factor)
    if pairs:
        torch._foreach_add_(
            [factor.grad for factor, _ in pairs], [gradient.to(factor.dtype) for factor, gradient in pairs]
        )


def _groups(factors: Mapping[str, Factors]) -> Iterator[list[tuple[str, Factors]]]:
    """Layers of one shape, dtype and device, as many as make a chunk."""

    def key(item: tuple[str, Factors]) -> tuple[Any, ...]:
        layer = item[1]
        return tuple(layer.b.shape), tuple(layer.a.shape), str(layer.a.dtype), str(layer.a.device)

    for _, group in groupby(sorted(factors.items(), key=key), key=key):
        layers = list(group)
        bytes_each = 4 * (layers[0][1].a.numel() + layers[0][1].b.numel())
        size = max(1, _CHUNK_BYTES // bytes_each)
        yield from (layers[start : start + size] for start in range(0, len(layers), size))


def _chunk(layers: list[tuple[str, Factors]], fisher: FisherFactors | None) -> _Chunk:
    names, held = [name for name, _ in layers], [layer for _, layer in layers]
    like = held[0].a
    dtype = torch.promote_types(like.dtype, torch.float32)
    squares = torch.tensor([layer.scaling**2 for layer in held], dtype=torch.float64)
    rows = columns = None
    if fisher is not None:
        totals = torch.stack([fisher.rows[name].double().sum() for name in names])
        weights = torch.where(
            totals > 0, squares / totals, 0.0
        )  # a layer that no source text reaches is free
        rows = (torch.stack([fisher.rows[name].double() for name in names]) * weights[:, None]).to(
            like.device, dtype
        )
        columns = torch.stack([fisher.columns[name] for name in names]).to(like.device, dtype)
    scale = squares[:, None, None].to(like.device, dtype)
    return _Chunk(names, [layer.a for layer in held], [layer.b for layer in held], rows, columns, scale)
