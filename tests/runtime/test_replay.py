"""Replayed calls give the bits of the calls that were recorded, or there is no record."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.runtime import replay
from peftkern.runtime.record import Record, launched, unrecordable
from peftkern.runtime.replay import replayed


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on the CPU are replayed too."""
    monkeypatch.setattr(replay, "_on_gpu", lambda first: True)
    replay.forget()
    yield
    replay.forget()


def _records(function: Callable) -> list[Any]:
    return list(function.records.values())


def _product(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = a.new_empty((a.shape[0], b.shape[1] + 2))
    torch.mm(a, b, out=out[:, 1:-1])
    out[:, 1:-1].mul_(scale)
    out[:, 0].fill_(1.0)
    out[:, -1].zero_()
    return out, out[:, 1:-1]


def test_the_third_call_is_a_replay_with_the_same_bits() -> None:
    calls = []

    @replayed()
    def product(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return _product(a, b, scale)

    for count in (1, 2, 2, 2):
        a, b = torch.randn(5, 7), torch.randn(7, 3)
        got, expected = product(a, b, 0.5), _product(a, b, 0.5)
        assert len(calls) == count
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(got, expected, strict=True))
        assert got[1].untyped_storage().data_ptr() == got[0].untyped_storage().data_ptr()
    assert [type(r) for r in _records(product)] == [Record]


@pytest.mark.parametrize(
    "other",
    [
        lambda a, b: (a, b, 1),
        lambda a, b: (a, b, 0.25),
        lambda a, b: (a[:3], b, 1.0),
        lambda a, b: (a.t().contiguous().t(), b, 1.0),
        lambda a, b: (a.double(), b.double(), 1.0),
        lambda a, b: (torch.cat([a.flatten(), a.new_zeros(1)])[1:].view(5, 7), b, 1.0),
    ],
    ids=["an integer", "another number", "shape", "strides", "dtype", "alignment"],
)
def test_what_differs_is_another_kind(other: Callable[[Tensor, Tensor], tuple]) -> None:
    product = replayed()(_product)
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    for _ in range(3):
        product(a, b, 1.0)
    args = other(a, b)
    for _ in range(3):
        assert torch.equal(product(*args)[0], _product(*args)[0])
    assert len(_records(product)) == 2


def test_arguments_that_were_one_tensor_may_later_be_two() -> None:
    @replayed()
    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    a, b = torch.randn(4), torch.randn(4)
    for _ in range(3):
        assert torch.equal(join(a, a), torch.cat([a, a]))
    for _ in range(3):
        assert torch.equal(join(a, b), torch.cat([a, b]))


def test_settings_belong_to_the_kind() -> None:
    now = [1.0]
    scaled = replayed(lambda: (now[0],))(lambda x: x * now[0])
    x = torch.ones(3)
    for value in (1.0, 2.0, 3.0):
        now[0] = value
        for _ in range(3):
            assert torch.equal(scaled(x), x * value)


CONSTANT = torch.arange(3.0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * CONSTANT, "neither an argument nor allocated"),
        (lambda x: x * x.sum().item(), "gives Python a value"),
        (lambda x: x.new_empty(3).copy_(x).view(torch.int32) + 1, "a view of"),
        (lambda x: (unrecordable("another launcher"), x + 1)[1], "another launcher"),
    ],
    ids=["constant", "value", "view of another type", "another launcher"],
)
def test_what_no_record_can_hold_runs_as_it_is(function: Callable[[Tensor], Tensor], why: str) -> None:
    wrapped = replayed()(function)
    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(wrapped(x), function(x))
    (reason,) = _records(wrapped)
    assert why in reason
    assert reason in replay.refusals().values()


def test_overlapping_arguments_have_no_record() -> None:
    @replayed()
    def later(a: Tensor, b: Tensor) -> Tensor:
        return a[1:3] + b[0]

    flat = torch.arange(8.0)
    for _ in range(3):
        assert torch.equal(later(flat[:4], flat[1:5]), flat[1:3] + flat[1])
    assert _records(later) == ["arguments that overlap"]


def test_arguments_of_other_types_run_as_they_are() -> None:
    late = SimpleNamespace(before=lambda: torch.ones(2))
    formed = replayed()(lambda x, late: x + late.before())
    for _ in range(3):
        assert torch.equal(formed(torch.ones(2), late), torch.full((2,), 2.0))
    assert not _records(formed)


def test_what_is_written_in_place_is_written_again() -> None:
    @replayed()
    def add(x: Tensor, out: Tensor) -> None:
        torch.mul(x, 2, out=out)

    for _ in range(4):
        x, out = torch.randn(6), torch.empty(6)
        assert add(x, out) is None
        assert torch.equal(out, 2 * x)


def test_memory_goes_when_the_function_would_let_it_go() -> None:
    @replayed()
    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 1
        return x

    x = torch.zeros(1000)
    for _ in range(2):
        chain(x)
    (record,) = _records(chain)
    with _Alive() as alive:
        result = record.run([x])
    assert (alive.now(), alive.most) == (1, 2)
    assert torch.equal(result, x + 4)


class _Alive(TorchDispatchMode):
    """How many results of torch's operators are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(result))
        self.most = max(self.most, self.now())
        return result

    def now(self) -> int:
        return sum(made() is not None for made in self.made)


def test_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_RECORDS", 5)
    double = replayed()(lambda x: x * 2)
    for size in range(1, 20):
        for _ in range(3):
            assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(_records(double)) == 5


def test_out_of_memory_while_recording_falls_back() -> None:
    failing = [False]

    def function(x: Tensor) -> Tensor:
        if failing[0]:
            failing[0] = False
            raise torch.OutOfMemoryError("too much is held")
        return x + 1

    wrapped, x = replayed()(function), torch.ones(2)
    wrapped(x)
    failing[0] = True
    assert torch.equal(wrapped(x), x + 1)
    assert _records(wrapped) == ["out of memory"]


def test_other_errors_are_the_functions_own() -> None:
    @replayed()
    def function(x: Tensor) -> Tensor:
        raise ValueError("x: too small")

    for _ in range(3):
        with pytest.raises(ValueError, match="too small"):
            function(torch.ones(1))


class _Compiled:
    """Stands for Triton's compiled kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *values, stream=None: self.launches.append((grid, *values))


class Operands(NamedTuple):
    x: Tensor | None
    size: int


def test_a_launch_gets_the_addresses_of_this_call() -> None:
    compiled = _Compiled()

    @replayed()
    def launch(x: Tensor, packed: Tensor) -> Tensor:
        scratch = x.new_empty(16)
        members = (packed[8:], 2.5, packed[:0], None), (Operands(x, 4), Operands(None, 5))
        values = [scratch[4:], x, None, 3, *members, x[:0]]
        launched(SimpleNamespace(programs=7), compiled, values)
        return scratch

    for _ in range(2):
        launch(torch.empty(4), torch.empty(16, dtype=torch.uint8))
    assert not compiled.launches  # the function itself launches nothing here
    x, packed = torch.empty(4), torch.empty(16, dtype=torch.uint8)
    scratch = launch(x, packed)
    members = (packed.data_ptr() + 8, 2.5, 0, None), ((x.data_ptr(), 4), (None, 5))
    assert compiled.launches == [((7, 1, 1), scratch.data_ptr() + 16, x.data_ptr(), None, 3, *members, 0)]


def _reachable(root: Any) -> list[Any]:
    """What a record holds, but for modules, classes and what functions see of their own module."""
    found, todo, met = [], [root], set()
    while todo:
        item = todo.pop()
        if id(item) in met or isinstance(item, (type, ModuleType)):
            continue
        met.add(id(item))
        found.append(item)
        code = isinstance(item, FunctionType)
        todo += [*(item.__closure__ or ()), *(item.__defaults__ or ())] if code else gc.get_referents(item)
    return found


def test_a_record_holds_no_tensor() -> None:
    compiled = _Compiled()

    @replayed()
    def launch(x: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        y = x.new_empty(4)
        launched(SimpleNamespace(programs=1), compiled, [x, (y, Operands(low, 1), 1.0)])
        return torch.mm(x[None], low[:, None]), y

    for _ in range(3):
        launch(torch.ones(4), torch.ones(4))
    (record,) = _records(launch)
    assert type(record) is Record
    assert not [item for item in _reachable(record) if isinstance(item, Tensor)]


def test_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_REPLAY", "0")
    replay.switched_on.cache_clear()
    try:
        double = replayed()(lambda x: x * 2)
        for _ in range(3):
            double(torch.ones(2))
        assert not _records(double)
    finally:
        replay.switched_on.cache_clear()
