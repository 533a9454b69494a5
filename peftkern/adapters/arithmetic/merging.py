"""TIES and DARE on adapters, in the space of the modules' cores or in that of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BaseWeights
from .lora import LoraModule
from .low_rank import Core, Recompressed, compress_dense, core_space, recompress
from .rules import Method, Piece, Rule, prepare_rule
from .terms import Term, update_of

__all__ = ["merge_modules"]


def merge_modules(
    names: Sequence[str],
    live: Sequence[Term],
    method: Method,
    space: str,
    rank: int | None,
    max_error: float | None,
    base: BaseWeights | None,
) -> dict[str, tuple[LoraModule, float]]:
    """Every module merged, and the relative error of what was cut from it."""
    if space == "core":
        dora = [term.name for term in live if term.adapter.is_dora]
        if dora:
            raise ValueError(
                f"adapter {dora[0]}: DoRA's change of the base has no core; give space weights (--space"
                " weights)"
            )
        merger: _Merger = _InCore(live)
    else:
        merger = _InWeights(live, base)
    rule = prepare_rule(method, [term.name for term in live], lambda purpose: _pieces(names, merger))
    return {name: merger.merged(name, rule, rank, max_error) for name in names}


class _Merger:
    """How a module's updates become vectors, and the merged vector a module."""

    def __init__(self, live: Sequence[Term]) -> None:
        self.live = live

    def vectors(self, name: str) -> list[Tensor]:
        """Each term's weighted update as an fp32 matrix; zeros where it has none."""
        raise NotImplementedError

    def factors(self, name: str, merged: Tensor, rank: int | None, max_error: float | None) -> Recompressed:
        """The merged matrix as b and a."""
        raise NotImplementedError

    def like(self, name: str) -> LoraModule:
        return next(term.adapter.modules[name] for term in self.live if name in term.adapter.modules)

    def biases(self, name: str) -> list[Tensor] | None:
        """Each term's weighted bias, fp32; None where none has one."""
        parts = [term.bias(name) for term in self.live]
        there = next((part for part in parts if part is not None), None)
        if there is None:
            return None
        return [
            torch.zeros_like(there, dtype=torch.float32) if part is None else part.float() for part in parts
        ]

    def merged(
        self,
        name: str,
        rule: Rule,
        rank: int | None,
        max_error: float | None,
    ) -> tuple[LoraModule, float]:
        """The module of the merged update, and its error."""
        result = self.factors(name, rule.merge(Piece(name, 0, self.vectors(name))), rank, max_error)
        biases = self.biases(name)
        bias = None if biases is None else rule.merge(Piece(_bias_name(name), 0, biases))
        return self.like(name).with_factors(result.b, result.a, bias), result.error


class _InCore(_Merger):
    """The R x R cores; each module's basis is made once."""

    def __init__(self, live: Sequence[Term]) -> None:
        super().__init__(live)
        self.spaces: dict[str, Core] = {}

    def space(self, name: str) -> Core:
        if name not in self.spaces:
            self.spaces[name] = core_space(
                [term.adapter.modules[name].factors() for term in self.live if name in term.adapter.modules],
            )
        return self.spaces[name]

    def vectors(self, name: str) -> list[Tensor]:
        cores = iter(self.space(name).cores)
        found = [next(cores) * term.weight if name in term.adapter.modules else None for term in self.live]
        zero = torch.zeros_like(self.space(name).cores[0])
        return [(zero if core is None else core).float() for core in found]

    def factors(self, name: str, merged: Tensor, rank: int | None, max_error: float | None) -> Recompressed:
        b, a = self.space(name).expand(merged)
        return recompress(b, a, rank=rank, max_error=max_error or 0.0)


class _InWeights(_Merger):
    """The N x K updates, one module's at a time."""

    def __init__(self, live: Sequence[Term], base: BaseWeights | None) -> None:
        super().__init__(live)
        self.base = base

    def vectors(self, name: str) -> list[Tensor]:
        found = [
            update_of(term, name, self.base) if name in term.adapter.modules else None for term in self.live
        ]
        there: Any = next(update for update in found if update is not None)
        return [torch.zeros_like(there) if update is None else update for update in found]

    def factors(self, name: str, merged: Tensor, rank: int | None, max_error: float | None) -> Recompressed:
        there = [term.adapter.modules[name].rank for term in self.live if name in term.adapter.modules]
        found = compress_dense(merged, min(rank or sum(there), *merged.shape))
        if max_error is None:
            return found
        return recompress(found.b, found.a, rank=rank, max_error=max_error)


def _bias_name(module: str) -> str:
    return f"{module}.bias"


def _pieces(names: Sequence[str], merger: _Merger) -> Iterator[Piece]:
    for name in names:
        yield Piece(name, 0, merger.vectors(name))
        biases = merger.biases(name)
        if biases is not None:
            yield Piece(_bias_name(name), 0, biases)
