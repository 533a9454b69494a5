"""What the quick suite keeps of tests over several parameters."""

import itertools

import pytest

from .cases import each_choice, each_pair, nightly

A, B, C = ["a", "b", "c", "d"], [1, 2, 3], [True, False]


def quick(cases: list) -> set:
    return {case.values for case in cases if not case.marks}


def test_every_value_is_quick_and_every_combination_is_there() -> None:
    cases = each_choice(A, B, C)
    assert [case.values for case in cases] == list(itertools.product(A, B, C))
    assert len(quick(cases)) == 4 and all(
        {case[i] for case in quick(cases)} == set((A, B, C)[i]) for i in range(3)
    )
    assert [case.id for case in cases][:2] == ["a-1-True", "a-1-False"]


def test_the_given_combinations_are_the_quick_ones() -> None:
    chosen = {("a", 1), ("b", 2), ("c", 3), ("d", 3)}
    assert quick(each_choice(A, B, quick=chosen)) == chosen
    with pytest.raises(AssertionError, match=r"no quick case takes \['d'\]"):
        each_choice(A, B, quick=[("a", 1), ("b", 2), ("c", 3)])
    assert len(quick(each_choice(A, B, quick=[("a", 1), ("b", 2), ("c", 3)], nightly=["d"]))) == 3
    with pytest.raises(AssertionError, match="expected combinations of"):
        each_choice(C, C, quick=[(True, False), (False, True), (True, 7)])


def test_every_pair_of_two_parameters_is_quick() -> None:
    found = quick(each_pair(A, B, [7, 8, 9]))
    for i, j in itertools.combinations(range(3), 2):
        assert len({(case[i], case[j]) for case in found}) == len((A, B, B)[i]) * len((A, B, B)[j])


def test_what_is_not_quick_is_nightly() -> None:
    first, *others = nightly(B, quick=[1])
    assert first == 1 and all([mark.name for mark in case.marks] == ["slow"] for case in others)
    assert [case.values for case in others] == [(2,), (3,)]
    with pytest.raises(AssertionError, match=r"got \[4\], expected some of"):
        nightly(B, quick=[4])
