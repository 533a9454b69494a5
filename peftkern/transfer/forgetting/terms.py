"""Where a forecast is lost: the terms of the source loss's expansion along an adapter's dW, each less exact
than the one before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .gradients import source_gradients
from .layers import Factors, lora_factors
from .predictions import EMPIRICAL, TRUE, Predictions, causal_lm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ExpansionTerms", "expansion_terms"]

_SLAB_BYTES = 2 << 20


@dataclass(frozen=True)
class ExpansionTerms:
    """Nats per prediction, of the loss L(W + dW) - L(W) on a source text.

    linear: <E g, dW> with the data's labels (0 at a minimum of the source loss, of either sign elsewhere).
        fisher: 1/2 dW^T F dW with the whole Fisher, all layers together. blocks: the same without products of
        two layers. diagonal: without products of two weights.
    """

    linear: float
    fisher: float
    blocks: float
    diagonal: float

    def verdict(self) -> str:
        """What is lost where, in words."""
        if self.diagonal <= 0:
            return "The adapter does not move the model on this text."
        return (
            f"First order {self.linear:+.4f} nats, second order {self.fisher:+.4f}; without products of two"
            f" layers {self.blocks:.4f}, and of the diagonal alone {self.diagonal:.4f},"
            f" {self.diagonal / self.fisher:.1%} of the second order."
        )

    def draw(self, axes: Axes) -> None:
        """One bar a term."""
        names = ("first order", "second order", "layer by layer", "diagonal")
        axes.bar(names, [self.linear, self.fisher, self.blocks, self.diagonal], color="tab:gray")
        share = self.diagonal / self.fisher if self.fisher else 0.0
        axes.set(ylabel="nats per prediction", title=f"The diagonal shows {share:.1%} of the second order")


def expansion_terms(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    predictions: Predictions = causal_lm,
    adapter: str | None = None,
    seed: int = 0,
) -> ExpansionTerms:
    """Measure the terms along the adapter's dW by two passes over `batches` (see `collect_fisher`), without
    any N x K matrix but slabs.

    The gradient of example e has the product <G_e, dW> = sum_t delta_et^T dW x_et with dW, of which the whole
    Fisher needs the square.
    """
    factors, batches = lora_factors(model, adapter=adapter), list(batches)
    sums = _Sums(factors)
    for label in (TRUE, EMPIRICAL):
        counted = 0
        for seen in source_gradients(
            model,
            batches,
            factors,
            sums.second if label == TRUE else sums.first,
            labels=label,
            predictions=predictions,
            seed=seed,
        ):
            counted += seen.predictions
            sums.end_of_batch()
    return ExpansionTerms(
        *(
            value / counted
            for value in (sums.linear, 0.5 * sums.fisher, 0.5 * sums.blocks, 0.5 * sums.diagonal)
        )
    )


class _Sums:
    """Adds up the terms' sums over examples."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = factors
        self.linear = self.fisher = self.blocks = self.diagonal = 0.0
        self._along: dict[str, Tensor] = {}

    def first(self, name: str, x: Tensor, delta: Tensor) -> None:
        self.linear += self._product(name, x, delta).sum().item()

    def second(self, name: str, x: Tensor, delta: Tensor) -> None:
        along = self._product(name, x, delta)
        self._along[name] = along
        self.blocks += along.square().sum().item()
        self.diagonal += _diagonal(self.factors[name], x, delta)

    def end_of_batch(self) -> None:
        """Square what all layers give together, for each example."""
        if self._along:
            self.fisher += (
                torch.stack([along.cpu() for along in self._along.values()]).sum(0).square().sum().item()
            )
        self._along = {}

    def _product(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """<G_e, dW>, fp64 [E]."""
        layer = self.factors[name]
        a, b = layer.a.detach(), layer.b.detach()
        moved = (x.to(a.dtype) @ a.T) @ b.T
        return layer.scaling * (moved.double() * delta.double()).sum((1, 2))


def _diagonal(layer: Factors, x: Tensor, delta: Tensor) -> float:
    """sum_e sum_ij G_e,ij^2 dW_ij^2, in slabs of rows."""
    total, width = 0.0, max(1, _SLAB_BYTES // (4 * x.shape[-1]))
    wide = torch.promote_types(x.dtype, torch.float32)
    for one_x, one_delta in zip(x.to(wide), delta, strict=True):
        for start in range(0, delta.shape[-1], width):
            gradient = one_delta[:, start : start + width].to(wide).T @ one_x
            moved = layer.scaling * (layer.b.detach()[start : start + width] @ layer.a.detach()).to(wide)
            total += (gradient * moved).double().square().sum().item()
    return total
