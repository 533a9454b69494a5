"""Recording a GPU op's call: a complete record of what it launched, or the reason why there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .program import Address, Place, Program
from .specialization import mapped

__all__ = ["Record", "Recorder", "launched", "record", "recording", "unrecordable", "unwatched"]

_aten = torch.ops.aten
_EMPTY = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
_PLAIN = (Tensor, torch.nn.Parameter)


class _OfThread(threading.local):
    recorder: Recorder | None = None


_current = _OfThread()


class Unrecordable(Exception):
    """Why a call cannot be replayed."""


class _Extent(NamedTuple):
    """The bytes from `first` to before `last`."""

    first: int
    last: int


def _extent(t: Tensor) -> _Extent:
    first = t.data_ptr()
    if not t.numel():
        return _Extent(first, first)
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return _Extent(first, first + reach * t.element_size())


class Recorder:
    """Collects the steps of one call. tensors: the call's arguments, which are the first bases."""

    def __init__(self, tensors: list[Tensor]) -> None:
        # What the call allocates is held until its end: no two bases may have had the same memory.
        self.bases, self.extents = list(tensors), [_extent(t) for t in tensors]
        self.program = Program(len(tensors))
        self.failed: str | None = None
        self.paused = False

    def place(self, t: Tensor) -> Address:
        """Where a later call finds this tensor. Raises: Unrecordable."""
        wanted = _extent(t)
        inside = [i for i, e in enumerate(self.extents) if e.first <= wanted.first < wanted.last <= e.last]
        if not inside:
            raise Unrecordable(
                f"a tensor {tuple(t.shape)} that is neither an argument nor allocated by the call"
            )
        if len({self.extents[i].first for i in inside}) > 1:
            raise Unrecordable("arguments that overlap")
        base = inside[0]
        return Address(base, wanted.first - self.extents[base].first)

    def operand(self, t: Tensor) -> Place:
        """As `place`, of a tensor that is made again as a view of its base."""
        base, offset = self.place(t)
        like = self.bases[base]
        alike = t.dtype == like.dtype and t.shape == like.shape and t.stride() == like.stride()
        whole, elements = alike and not offset, offset // t.element_size()
        of_another_kind = t.dtype != like.dtype or offset % t.element_size() or type(like) not in _PLAIN
        if not whole and of_another_kind:
            raise Unrecordable(f"a view of {t.dtype} on a {type(like).__name__} of {like.dtype}")
        return Place(base, elements, tuple(t.shape), t.stride(), whole)

    def template(self, value: Any) -> Any:
        """The value with every tensor's place in the tensor's stead."""
        if isinstance(value, Tensor):
            return self.operand(value)
        if type(value) in (tuple, list):
            return type(value)([self.template(part) for part in value])
        return value

    def operator(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """An operator of torch has run."""
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        if func is _aten.promote_types.default:
            return  # a function of dtypes
        if not all(isinstance(t, Tensor) for t in outputs):
            raise Unrecordable(f"{func}, which gives Python a value")
        if func in _EMPTY:
            self.program.allocate(self._new_base(outputs[0]), outputs[0])
            return
        if not func._schema.is_mutable and all(self._known(t) for t in outputs):
            return  # a view
        templates = self.template(args), {name: self.template(value) for name, value in kwargs.items()}
        made = [None if self._known(t) else self._new_base(t) for t in outputs]
        self.program.operate(func, *templates, made)

    def _new_base(self, t: Tensor) -> int:
        self.bases.append(t)
        self.extents.append(_extent(t))
        return len(self.bases) - 1

    def _known(self, t: Tensor) -> bool:
        """Whether the tensor lies in memory that the record knows."""
        wanted = _extent(t)
        return t.numel() > 0 and any(e.first <= wanted.first and wanted.last <= e.last for e in self.extents)

    def launch(self, call: Any, compiled: Any, values: list[Any] | None) -> None:
        """A Triton kernel has been launched; see `launched`."""
        if compiled is None:
            arguments = {name: mapped(value, self._tensor) for name, value in call.arguments.items()}
            self.program.interpret(call.interpret, arguments)
            return
        values = [mapped(value, self._address) for value in values]
        self.program.launch(compiled[(call.programs, 1, 1)], values)

    def _address(self, value: Any) -> Any:
        """A tensor's address, 0, the null pointer, of one without elements: a record holds no tensor."""
        if not isinstance(value, Tensor):
            return value
        return self.place(value) if value.numel() else 0

    def _tensor(self, value: Any) -> Any:
        return self.operand(value) if isinstance(value, Tensor) and value.numel() else value


class _Watch(TorchDispatchMode):
    """Tells a recorder of every operator of torch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if not self.recorder.paused:
            _attempt(self.recorder, self.recorder.operator, func, args, kwargs or {}, result)
        return result


def _attempt(recorder: Recorder, what: Callable[..., None], *args: Any) -> None:
    if recorder.failed is None:
        try:
            what(*args)
        except Unrecordable as reason:
            recorder.failed = str(reason)


def recording() -> bool:
    """Whether this thread's call is being recorded."""
    return _current.recorder is not None


def launched(call: Any, compiled: Any, values: list[Any] | None) -> None:
    """A Triton kernel has been launched, of which the record of this thread, if there is one, is told.

    compiled: Triton's compiled kernel with `values`, its arguments in order; None where the kernel was
    interpreted.
    """
    recorder = _current.recorder
    if recorder is not None:
        _attempt(recorder, recorder.launch, call, compiled, values)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Operators of torch that run within belong to a launch, which is recorded as such."""
    recorder = _current.recorder
    if recorder is None:
        yield
        return
    recorder.paused = True
    try:
        yield
    finally:
        recorder.paused = False


def unrecordable(what: str) -> None:
    """What has been launched is nothing that a record can hold."""
    if _current.recorder is not None and _current.recorder.failed is None:
        _current.recorder.failed = what


class Record:
    """The program of a call, which is run again for other tensors.

    run: of the tensors that are the call's arguments, its result. source: what that is compiled from; names:
    what it reads.
    """

    __slots__ = ("run", "source", "names")

    def __init__(self, recorder: Recorder, result: Any) -> None:
        device = recorder.bases[0].device
        self.run, self.source = recorder.program.finished(recorder.template(result), device)
        self.names = recorder.program.names


def record(
    function: Callable[..., Any], args: tuple, tensors: list[Tensor]
) -> tuple[Any, Record | None, str]:
    """Runs the call: its result, its record, and why there is none. tensors: those in `args`."""
    recorder = _current.recorder = Recorder(tensors)
    try:
        with _Watch(recorder):
            result = function(*args)
    finally:
        _current.recorder = None
    if recorder.failed is None:
        try:
            return result, Record(recorder, result), ""
        except Unrecordable as reason:
            recorder.failed = str(reason)
    return result, None, recorder.failed
