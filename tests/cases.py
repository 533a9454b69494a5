"""Which combinations of several parameters the quick suite takes: every value of each, in as few cases as
that needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["each_choice", "each_pair", "nightly"]


def nightly(values: Iterable[Any], *, quick: Iterable[Any]) -> list:
    """All values; those not in `quick` are marked slow: they walk the code that the quick ones walk."""
    values, quick = list(values), list(quick)
    assert all(value in values for value in quick), f"quick: got {quick}, expected some of {values}"
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def each_choice(
    *axes: Iterable[Any],
    quick: Iterable[tuple] = (),
    nightly: Iterable[Any] = (),
    name: Callable[[Any], str] = str,
) -> list:
    """Every combination of the axes' values, for pytest.mark.parametrize; all but a few of them are marked
    slow.

    The quick suite takes every value of every parameter at least once ("each choice" coverage), the nightly
    one every combination. Quick are the given combinations or, without any, the diagonal: the i-th takes the
    i-th value of the longest axis and, of each other axis, the value i modulo its length. The values in
    `nightly` need no quick case.
    """
    lists = [list(axis) for axis in axes]
    chosen = list(quick) or [
        tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))
    ]
    for place, axis in enumerate(lists):
        missing = [value for value in axis if value not in (*(case[place] for case in chosen), *nightly)]
        assert not missing, f"no quick case takes {missing}"
    every = list(itertools.product(*lists))
    assert all(case in every for case in chosen), f"quick: got {chosen}, expected combinations of {lists}"
    return [
        pytest.param(*case, marks=() if case in chosen else pytest.mark.slow, id="-".join(map(name, case)))
        for case in every
    ]


def each_pair(rows: Iterable[Any], columns: Iterable[Any], third: Iterable[Any], **options: Any) -> list:
    """As `each_choice` of three axes, the quick cases a Latin square: every row with every column, the third
    in turn.

    Where no axis is shorter than the third, all pairs of values of any two parameters are among them.
    """
    lists = [list(axis) for axis in (rows, columns, third)]
    square = [
        (row, column, lists[2][(i + j) % len(lists[2])])
        for i, row in enumerate(lists[0])
        for j, column in enumerate(lists[1])
    ]
    return each_choice(*lists, quick=square, **options)
