"""A term of a combination: an adapter and its coefficient, and what it adds to one module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .base import BaseWeights, dora_update
from .lora import LoraWeights

__all__ = ["Term", "update_of"]


class Term(NamedTuple):
    """weight * adapter."""

    name: str
    weight: float
    adapter: LoraWeights

    def bias(self, module: str) -> Tensor | None:
        """What it adds to the module's output in any case, [N] in fp64; None for nothing."""
        part = self.adapter.modules.get(module)
        if part is None or part.bias is None:
            return None
        return part.bias.double() * (part.scaling * self.weight)


def update_of(term: Term, name: str, base: BaseWeights | None) -> Tensor:
    """weight * D [N, K] of a module, fp32 and dense; DoRA's is taken on the base's weight."""
    module = term.adapter.modules[name]
    if module.magnitude is None or base is None:
        b, a = module.factors()
        return ((b * term.weight) @ a).float()
    transposed = bool(term.adapter.config.get("fan_in_fan_out"))
    try:
        return dora_update(base.tensor(f"{name}.weight"), module, transposed=transposed) * term.weight
    except ValueError as error:
        raise ValueError(f"adapter {term.name}, {name}: {error}") from None
