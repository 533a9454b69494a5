"""Linears that get the same input, computed together: whichever is called first computes all, the others take their part."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .decode import Ready
from .forwards import _autocast_off, _PlannedForward, find
from .plans import DoraPlan, Plan

__all__ = ["NAMES", "Group", "form_groups"]

_log = logging.getLogger("peftkern")

# Children of one module that its forward calls with one tensor. Where a forward does not (the keys of a cross attention come from an
# encoder), the group notices at the first call and dissolves.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
)


class _Stash:
    """The parts that siblings have not yet fetched. apart: members that could not be computed with them and have not yet been called."""

    __slots__ = ("x", "version", "grad", "parts", "apart")

    def __init__(self, x: Tensor, parts: dict[int, Tensor], apart: set[int]) -> None:
        self.x, self.version, self.grad, self.parts, self.apart = x, _version(x), torch.is_grad_enabled(), parts, apart

    def serves(self, index: int, x: Tensor) -> bool:
        return index in self.parts and self._holds(x)

    def leaves(self, index: int, x: Tensor) -> bool:
        """Whether this is the call of one that runs alone beside the parts."""
        if index not in self.apart or not self._holds(x):
            return False
        self.apart.remove(index)
        return True

    def _holds(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x) and self.grad == torch.is_grad_enabled()


def _version(x: Tensor) -> int:
    """How often x was written to. Inference tensors do not count it, and a traced graph cannot depend on it."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class Group:
    """Patched siblings. `dissolved`: why its members run alone, None while they do not."""

    __slots__ = ("forwards", "dissolved", "unclaimed", "stash", "ready")

    def __init__(self, forwards: list[_PlannedForward]) -> None:
        self.__setstate__((forwards, None))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.forwards, self.dissolved

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.forwards, self.dissolved = state
        self.unclaimed, self.stash, self.ready = 0, None, Ready(self.forwards)

    def fetch(self, forward: _PlannedForward, x: Tensor) -> Tensor | None:
        """The part that a sibling's call with the same x has computed for `forward`; None where there is none."""
        stash = self.stash
        index = self._index(forward)
        if stash is None or not stash.serves(index, x):
            return None
        part = stash.parts.pop(index)
        self.stash = stash if stash.parts else None
        self.unclaimed = 0
        return part

    def run(self, forward: _PlannedForward, x: Tensor, plan: Plan | DoraPlan) -> Tensor:
        """The part of `forward`, computed with its siblings', which are kept for them; alone where the group has dissolved."""
        index = self._index(forward)
        if self.stash is not None and self.stash.leaves(index, x):
            return forward.run(x, plan)
        stash, self.stash = self.stash, None
        if self.dissolved is not None or (stash is not None and self._give_up(index, stash, x)):
            return forward.run(x, plan)
        return self._keep(index, x, self._compute(index, x, plan))

    def few_rows(self, forward: _PlannedForward, x: Tensor) -> Tensor | None:
        """As `run`, with what an earlier call of few rows prepared; None where that does not serve."""
        parts = self.ready(x) if self.stash is None else None
        return None if parts is None else self._keep(self._index(forward), x, dict(enumerate(parts)))

    def _keep(self, index: int, x: Tensor, parts: dict[int, Tensor]) -> Tensor:
        """One's own part; the others are kept for the siblings."""
        if len(parts) > 1:
            apart = set(range(len(self.forwards))) - parts.keys()
            self.stash = _Stash(x, {i: part for i, part in parts.items() if i != index}, apart)
        return parts[index]

    def _index(self, forward: _PlannedForward) -> int:
        return next(i for i, member in enumerate(self.forwards) if member is forward)

    def _give_up(self, index: int, stash: _Stash, x: Tensor) -> bool:
        """Nobody fetched these parts. One sibling with another tensor, or three such calls running, are no accident (an exception
        between two calls, a recomputation that stopped early)."""
        self.unclaimed += 1
        if index in stash.parts and stash.x is not x:
            self.dissolved = "its members were called with different tensors"
        elif self.unclaimed == 3:
            self.dissolved = "its members are not called together"
        if self.dissolved is not None:
            _log.debug("peftkern: a group of %d linears runs as single ones: %s", len(self.forwards), self.dissolved)
        return self.dissolved is not None

    def _compute(self, index: int, x: Tensor, plan: Plan | DoraPlan) -> dict[int, Tensor]:
        plans = {i: plan if i == index else member.work(x) for i, member in enumerate(self.forwards)}
        plans = {i: found for i, found in plans.items() if i == index or (found is not None and plan.joins(found))}
        if len(plans) == 1:
            return {index: self.forwards[index].run(x, plan)}
        with _autocast_off(x):
            outputs = plan.together(x.to(plan.compute), list(plans.values()))
            return {i: found.cast(y) for (i, found), y in zip(plans.items(), outputs, strict=True)}


def form_groups(model: nn.Module) -> dict[str, str]:
    """Group the patched siblings of every module; the name of each grouped module with its members, for the report."""
    formed: dict[str, str] = {}
    for name, parent in model.named_modules():
        for wanted in NAMES:
            held = {child: forward for child in wanted if (forward := _planned(getattr(parent, child, None))) is not None}
            if len(held) < 2 or len({_in_features(forward.module) for forward in held.values()}) > 1:
                continue
            group = Group(list(held.values()))
            for child, forward in held.items():
                forward.group = group
                formed[f"{name}.{child}" if name else child] = ", ".join(held)
    return formed


def _planned(module: object) -> _PlannedForward | None:
    held = find(module) if isinstance(module, nn.Module) else None
    return held[1] if held is not None and isinstance(held[1], _PlannedForward) else None


def _in_features(module: nn.Module) -> int:
    return getattr(module, "base_layer", module).in_features
