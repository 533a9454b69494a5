"""Linears that get the same input, computed together: whichever is called first computes all, the others take
their part.

Which linears are siblings is known before any call and stays so. What a call does depends on its own thread's
calls alone and on nothing that a recomputation in the backward pass would find changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import autocast_off
from .decode import Ready, signed
from .dora import drops
from .forwards import find
from .linears import PlannedForward
from .plans import DoraPlan, Plan
from .report import Row
from .rewrite import Context, Finding, Rewrite
from .sharing import called_together

__all__ = ["Group", "Siblings", "with_siblings"]

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Stash:
    """The parts that siblings have not yet fetched. apart: members that could not be computed with them and
    have not yet been called."""

    __slots__ = ("x", "version", "mode", "parts", "apart")

    def __init__(self, x: Tensor, parts: dict[int, Tensor], apart: set[int]) -> None:
        self.x, self.version, self.mode, self.parts, self.apart = x, _version(x), _mode(), parts, apart

    def serves(self, index: int, x: Tensor) -> bool:
        return index in self.parts and self._holds(x)

    def leaves(self, index: int, x: Tensor) -> bool:
        """Whether this is the call of one that runs alone beside the parts."""
        if index not in self.apart or not self._holds(x):
            return False
        self.apart.remove(index)
        return True

    def _holds(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x) and self.mode == _mode()


def _version(x: Tensor) -> int:
    """How often x was written to. Inference tensors do not count it."""
    return 0 if x.is_inference() else x._version


def _mode() -> Any:
    """Without gradients None, else what saves tensors for backward: each region that is checkpointed has its
    own, and is computed again without the regions around it."""
    return (_saving_hooks(False),) if torch.is_grad_enabled() else None


class _OfThread(threading.local):
    stash: _Stash | None = None


class Group:
    """Patched siblings. `dissolved`: why its members run alone, None while they do not."""

    __slots__ = ("forwards", "dissolved", "places", "calling", "ready", "prepared")

    def __init__(self, forwards: list[PlannedForward]) -> None:
        self.__setstate__((forwards, None))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.forwards, self.dissolved

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.forwards, self.dissolved = state
        self.places = {id(forward): index for index, forward in enumerate(self.forwards)}
        self.calling, self.ready = _OfThread(), Ready(self.forwards)
        # For which signature, and the call: replaced together, as threads share them.
        self.prepared: tuple[Any, Callable[[Tensor], Sequence[Tensor]] | None] = None, None

    def dissolve(self, why: str) -> None:
        """From now on members run alone, each with what it has prepared for itself."""
        self.dissolved = why
        self.let_go()

    def let_go(self) -> None:
        """Of what calls have prepared."""
        self.prepared, self.ready = (None, None), Ready(self.forwards)

    @property
    def stash(self) -> _Stash | None:
        """What this thread's calls have left for siblings."""
        return self.calling.stash

    def fetch(self, forward: PlannedForward, x: Tensor) -> Tensor | None:
        """The part that a sibling's call with the same x has computed for `forward`; None where there is
        none."""
        stash = self.calling.stash
        if stash is None:
            return None
        index = self.places[id(forward)]
        if not stash.serves(index, x):
            return None
        part = stash.parts.pop(index)
        if not stash.parts:
            self.calling.stash = None
        return part

    def run(self, forward: PlannedForward, x: Tensor, plan: Plan | DoraPlan) -> Tensor:
        """The part of `forward`, computed with its siblings', which are kept for them; alone where the group
        has dissolved."""
        index, stash = self.places[id(forward)], self.calling.stash
        if stash is not None and stash.leaves(index, x):
            return forward.run(x, plan)
        self.calling.stash = None
        if self.dissolved is not None:
            return forward.run(x, plan)
        return self._keep(index, x, self._compute(index, x, plan))

    def few_rows(self, forward: PlannedForward, x: Tensor) -> Tensor | None:
        """As `run`, with what an earlier call of few rows prepared; None where that does not serve."""
        parts = self.ready(x) if self.calling.stash is None else None
        return None if parts is None else self._keep(self.places[id(forward)], x, dict(enumerate(parts)))

    def prepared_part(self, forward: PlannedForward, x: Tensor) -> Tensor | None:
        """As `run`, checked and described for as long as nothing that the members are made of has changed;
        None where that cannot be told cheaply, or where not all members are computed together."""
        autocast = torch.is_autocast_enabled(x.device.type) or torch.is_autocast_enabled()
        if autocast or self.calling.stash is not None:
            return None
        signature = signed(self.forwards, x.dtype, x.shape[-1:], x.device)
        if signature is None:
            return None
        known, call = self.prepared
        if signature != known:
            call = Plan.prepare_together(x, [member.work(x) for member in self.forwards])
            self.prepared = signature, call
        if call is None:
            return None
        return self._keep(self.places[id(forward)], x, dict(enumerate(call(x))))

    def _keep(self, index: int, x: Tensor, parts: dict[int, Tensor]) -> Tensor:
        """One's own part; the others are kept for the siblings."""
        part = parts.pop(index)
        if parts:
            self.calling.stash = _Stash(
                x, parts, {i for i in range(len(self.forwards)) if i != index and i not in parts}
            )
        return part

    def _compute(self, index: int, x: Tensor, plan: Plan | DoraPlan) -> dict[int, Tensor]:
        plans = {i: plan if i == index else member.work(x) for i, member in enumerate(self.forwards)}
        plans = {
            i: found for i, found in plans.items() if i == index or (found is not None and plan.joins(found))
        }
        if len(plans) == 1:
            return {index: self.forwards[index].run(x, plan)}
        with autocast_off(x):
            outputs = plan.together(x.to(plan.compute), list(plans.values()))
            return {i: found.cast(y) for (i, found), y in zip(plans.items(), outputs, strict=True)}


class Siblings(Rewrite):
    """Linears that a module's code calls with one and the same variable."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's: the module's groups, each its members by their names. The members' own rows tell of
        it (`with_siblings`)."""
        held = {
            child: linear
            for child, linear in module.named_children()
            if context.forward_of(linear, PlannedForward) is not None
        }
        together = called_together(module, held) if len(held) > 1 else []
        groups = [{child: held[child] for child in members} for members in together]
        groups = [group for group in groups if len(set(map(_in_features, group.values()))) == 1]
        return Finding(module, None, made_of=groups) if groups else None

    def install(self, finding: Finding) -> None:
        """Each member's forward knows its group; taking one of them off dissolves it."""
        for group in finding.made_of:
            forwards = [find(linear)[1] for linear in group.values()]
            together = Group(forwards)
            for forward in forwards:
                forward.group = together


def with_siblings(findings: Sequence[tuple[Rewrite, Finding]]) -> list[Row]:
    """The rows of all findings, in their order; a linear's has a note of those it is computed with."""
    together = {
        id(linear): ", ".join(group)
        for rewrite, finding in findings
        if isinstance(rewrite, Siblings)
        for group in finding.made_of
        for linear in group.values()
    }
    return [_noted(finding, together) for _, finding in findings if finding.row is not None]


def _noted(finding: Finding, together: dict[int, str]) -> Row:
    row, module = finding.row, finding.module
    alone = row.reason is not None or (row.got == "dora_linear" and drops(module))
    if alone or row.kind not in ("lora", "linear") or id(module) not in together:
        return row
    note = f"one call for {together[id(module)]}"
    return replace(row, note=f"{row.note}; {note}" if row.note else note)


def _in_features(module: nn.Module) -> int:
    return getattr(module, "base_layer", module).in_features
