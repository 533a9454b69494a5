"""What describes a group of DoRA linears: `Spec`, and how the wanted gradients are divided."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Spec", "split_needs"]


class Spec(NamedTuple):
    """What a group is made of, but its trainable tensors; lists as in the schema. squares: ||W||^2 by
    rows."""

    weights: tuple[Tensor, ...]
    quants: tuple[Tensor | None, ...]
    blocksizes: tuple[int, ...]
    scalings: tuple[float, ...]
    squares: tuple[Tensor, ...]


def split_needs(needs: list[bool], count: int) -> tuple[bool, list[bool], list[bool], list[bool], list[bool]]:
    """dx; the biases, the A's, the B's, the magnitudes of members."""
    return needs[0], *(list(needs[1 + i * count : 1 + (i + 1) * count]) for i in range(4))
