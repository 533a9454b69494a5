"""Generation: linears on a few rows without gradients, where reading a model's attributes and checking
arguments costs more than the arithmetic. What a call needs is prepared once and used again as long as nothing
that it was made of has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..functional import group
from ..ops import undispatched
from ..runtime import backends

__all__ = ["Ready", "signed"]

_MOST_ROWS = (
    64  # the kernel for few rows takes no more; the table of ops/linear/config.py says where it is used
)


class _Linear(Protocol):
    """A patched linear: `signature` is the same as long as `plan` gives the same, None where that cannot be
    told cheaply."""

    def plan(self, x: Tensor) -> Any: ...

    def signature(self) -> tuple | None: ...


def signed(linears: Sequence[_Linear], *call: Any) -> list[Any] | None:
    """What a call of these linears depends on: `call`, and each one's signature; None where one has none."""
    signature = list(call)
    for linear in linears:
        part = linear.signature()
        if part is None:
            return None
        signature.append(part)
    return signature


class Ready:
    """Linears on one input, ready for another call of few rows on the CPU."""

    __slots__ = ("linears", "prepared")

    def __init__(self, linears: Sequence[_Linear]) -> None:
        self.linears = linears
        self.prepared: tuple[Any, Any] = (
            None,
            None,
        )  # for which signature, and the call: replaced together, as threads share them

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """Each linear's result; None where the call has to be computed as any other."""
        if not _serves(x):
            return None
        signature = signed(self.linears, x.dtype, x.numel(), x.shape[-1])
        if signature is None:
            return None
        known, call = self.prepared
        if signature != known:
            call = self._prepare(x)
            self.prepared = signature, call
        return None if call is None else call(x)

    def _prepare(self, x: Tensor) -> Any:
        plans = [linear.plan(x) for linear in self.linears]
        if any(
            plan is None or not plan.compute == plan.base_result == plan.result == x.dtype for plan in plans
        ):
            return None
        return group.few_rows(x, [plan.member for plan in plans])


def _serves(x: Tensor) -> bool:
    shape = x.shape
    if not shape or shape.numel() > _MOST_ROWS * shape[-1] or not x.is_cpu or torch.is_grad_enabled():
        return False
    return undispatched(x) and not torch.is_autocast_enabled("cpu") and backends.select(x) == "cpu"
