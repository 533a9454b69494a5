"""What a compiled kernel is kept under: everything that its machine code depends on, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from peftkern.runtime import launch as triton_launch
from peftkern.runtime.launch import Call


def _parameter(name: str, *, is_constexpr: bool = False, do_not_specialize: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, is_constexpr=is_constexpr, do_not_specialize=do_not_specialize)


class Kernel:
    """Has Triton's parameters; a launch returns what was compiled, which notes its launches."""

    params = (
        _parameter("x"),
        _parameter("n"),
        _parameter("m", do_not_specialize=True),
        _parameter("s"),
        _parameter("R", is_constexpr=True),
    )

    def __init__(self) -> None:
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_run(**arguments):
            self.compiled.append(arguments)
            return self

        return compile_and_run

    run = None


class Compiled(Kernel):
    def __getitem__(self, grid):
        if len(grid) == 3:
            return lambda *values: self.launched.append((grid, values))
        return super().__getitem__(grid)


BASE = {"x": torch.zeros(64), "n": 48, "m": 7, "s": 0.5, "R": 16}
SAME = [{"x": torch.ones(32)}, {"n": 64}, {"m": 1}, {"m": 16}, {"s": 2.5}, {"x": torch.zeros(64)[16:]}]
OTHER = [
    {"x": torch.zeros(64).bfloat16()},
    {"x": torch.zeros(64)[1:]},
    {"x": None},
    {"n": 1},
    {"n": 49},
    {"n": 1 << 40},
    {"m": 1 << 40},
    {"R": 32},
    {"x": (torch.zeros(4), None)},
    {"n": (48, 1)},
    {"n": (48, 48)},
    {"m": (7,)},
]


class Operands(NamedTuple):
    x: torch.Tensor | None
    size: int


NESTED = (Operands(torch.zeros(64), 48), Operands(None, 7))


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})


def _compiled_twice(changes: dict, **options) -> bool:
    kernel = Compiled()
    triton_launch._launch(Call(kernel, 3, dict(BASE), 4, 2), 0)
    second = Call(kernel, 5, BASE | changes, **{"num_warps": 4, "num_stages": 2, **options})
    triton_launch._launch(second, 0)
    if len(kernel.compiled) == 1:
        assert kernel.launched == [((5, 1, 1), tuple(second.arguments.values()))]
    return len(kernel.compiled) == 2


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_the_same_machine_code_is_launched_again(changes: dict) -> None:
    assert not _compiled_twice(changes)


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_other_machine_code_is_compiled(changes: dict) -> None:
    assert _compiled_twice(changes)


@pytest.mark.parametrize(
    ("members", "other"),
    [
        ((Operands(torch.ones(32), 64), Operands(None, 9)), False),
        ((Operands(torch.zeros(64), 48), Operands(torch.zeros(4), 7)), True),
        ((Operands(torch.zeros(64)[1:], 48), Operands(None, 7)), True),
        ((Operands(torch.zeros(64), 49), Operands(None, 7)), True),
        ((Operands(torch.zeros(64), 48), Operands(None, 1)), True),
        (NESTED[:1], True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["n", "m"])
def test_operands_within_tuples(
    monkeypatch: pytest.MonkeyPatch, name: str, members: tuple, other: bool
) -> None:
    """Triton compiles for the integers of a tuple, whatever the kernel says of the argument."""
    monkeypatch.setitem(BASE, name, NESTED)
    assert _compiled_twice({name: members}) == other


@pytest.mark.parametrize("options", [{"num_warps": 8}, {"num_stages": 3}, {"max_registers": 128}], ids=str)
def test_other_options_are_compiled(options: dict) -> None:
    assert _compiled_twice({}, **options)


def test_a_launch_that_returns_nothing_is_not_kept() -> None:
    class Silent(Kernel):
        def __getitem__(self, grid):
            return lambda **arguments: self.compiled.append(arguments)

    kernel = Silent()
    for _ in range(2):
        triton_launch._launch(Call(kernel, 3, dict(BASE), 4, 2), 0)
    assert len(kernel.compiled) == 2
