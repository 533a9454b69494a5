"""What describes a group: `Spec`, and how its flat lists of tensors and of wanted gradients are divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Adapters", "Spec", "split", "split_needs"]


class Spec(NamedTuple):
    """What a group is made of, but its trainable tensors; lists as in the schema. rows: begin and end of each
    adapter's rows of x."""

    weights: tuple[Tensor, ...]
    quants: tuple[Tensor | None, ...]
    blocksizes: tuple[int, ...]
    n: tuple[int, ...]
    members: tuple[int, ...]
    rows: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    seeds: tuple[Tensor | None, ...]


class Adapters(NamedTuple):
    """The adapters of a group's backward pass; lists as in the schema, in its order."""

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    members: Sequence[int]
    rows: Sequence[int]
    scalings: Sequence[float]
    dropout_ps: Sequence[float]
    seeds: Sequence[Tensor | None]


def split_needs(
    needs: list[bool], members: int, adapters: int
) -> tuple[bool, list[bool], list[bool], list[bool]]:
    """dx; the biases of members; the A and the B of adapters."""
    a = 1 + members
    return needs[0], list(needs[1:a]), list(needs[a : a + adapters]), list(needs[a + adapters :])


def split(spec: Spec, trainable: tuple[Tensor | None, ...]) -> tuple[tuple, tuple, tuple]:
    """biases, lora_a, lora_b, which autograd sees in this order."""
    count, adapters = len(spec.weights), len(spec.members)
    return trainable[:count], trainable[count : count + adapters], trainable[count + adapters :]
