"""What a call of a patched linear computes, alone or together with its siblings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import group, linear

__all__ = ["DoraPlan", "Plan", "branch_operands", "scaling_of"]


class Plan(NamedTuple):
    """A member of a group, the dtype to compute in, the dtypes the base and the layer return."""

    member: functional.Member
    compute: torch.dtype
    base_result: torch.dtype
    result: torch.dtype

    def cast(self, y: Tensor) -> Tensor:
        return y.to(self.base_result).to(self.result)

    def joins(self, other: Plan | DoraPlan) -> bool:
        """Whether the two can be computed together."""
        return type(other) is Plan and self.compute == other.compute

    def alone(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in."""
        member, adapters = self.member, self.member.adapters
        if not adapters:
            return functional.linear_4bit(x, member.weight, member.bias)
        if len(adapters) > 1 or adapters[0].rows is not None:
            return functional.qlora_group(x, [member])[0]
        (a,) = adapters
        return functional.qlora_linear(
            x, member.weight, member.bias, a.lora_a, a.lora_b, scaling=a.scaling, dropout_p=a.dropout_p
        )

    def prepare(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The plan alone, for calls with tensors of x's dtype, device and last size; None where that has no
        form of its own."""
        member = self.member
        if not self.can_be_held(x):
            return None
        if not member.adapters:
            return linear.prepared(x, member.weight, member.bias)
        if len(member.adapters) > 1:
            together = group.prepared(x, [member])
            return lambda x: together(x)[0]
        (a,) = member.adapters
        options = dict(scaling=a.scaling, dropout_p=a.dropout_p)
        return linear.prepared(x, member.weight, member.bias, a.lora_a, a.lora_b, **options)

    def can_be_held(self, x: Tensor) -> bool:
        """Whether every call is in x's dtype and on all rows; tensors that lead to a graph must not be
        held."""
        return {self.compute, self.base_result, self.result} == {x.dtype} and all(
            a.rows is None and a.lora_a.is_leaf and a.lora_b.is_leaf for a in self.member.adapters
        )

    @staticmethod
    def prepare_together(
        x: Tensor, plans: Sequence[Plan | DoraPlan | None]
    ) -> Callable[[Tensor], Sequence[Tensor]] | None:
        """As `prepare`, of plans that join; None where one does not."""
        if any(type(plan) is not Plan or not plan.can_be_held(x) for plan in plans):
            return None
        return group.prepared(x, [plan.member for plan in plans])

    @staticmethod
    def together(x: Tensor, plans: Sequence[Plan]) -> Sequence[Tensor]:
        """Of plans that join."""
        return functional.qlora_group(x, [plan.member for plan in plans])


class DoraPlan(NamedTuple):
    """A linear with one DoRA adapter; dropout: what acts now, None where nothing does. Its norm is taken anew
    at every call: a frozen weight can be written through `.data`, which nothing counts."""

    plan: Plan
    magnitude: Tensor
    dropout: nn.Module | None

    @property
    def compute(self) -> torch.dtype:
        return self.plan.compute

    def cast(self, y: Tensor) -> Tensor:
        return self.plan.cast(y)

    def joins(self, other: Plan | DoraPlan) -> bool:
        """As Plan's. With dropout each linear's base product has an input of its own."""
        return (
            type(other) is DoraPlan
            and self.compute == other.compute
            and self.dropout is None
            and other.dropout is None
        )

    def alone(self, x: Tensor) -> Tensor:
        dropped = None if self.dropout is None else self.dropout(x)
        return functional.dora_linear(x, self.plan.member, self.magnitude, dropped=dropped)

    @staticmethod
    def together(x: Tensor, plans: Sequence[DoraPlan]) -> Sequence[Tensor]:
        return functional.dora_group(
            x, [item.plan.member for item in plans], [item.magnitude for item in plans]
        )


def scaling_of(layer: nn.Module, name: str) -> float | Tensor:
    """An adapter's scaling as it is now: a number, or a tensor for `branch_operands`.

    PEFT's preparation for hotswapping makes it a tensor, which is written in place. It is read here where
    that waits for no device, breaks no graph and loses no gradient.
    """
    value = layer.scaling[name]
    if not isinstance(value, Tensor):
        return value
    trained = value.requires_grad and torch.is_grad_enabled()
    return value if trained or not value.is_cpu or torch.compiler.is_compiling() else value.item()


def branch_operands(lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> tuple[Tensor, Tensor, float]:
    """A, B and a number to scale with: a tensor's scaling goes into B."""
    return (
        (lora_a, (lora_b * scaling).to(lora_b.dtype), 1.0)
        if isinstance(scaling, Tensor)
        else (lora_a, lora_b, scaling)
    )
