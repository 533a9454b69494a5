"""A GPU op's call, recorded once and replayed afterwards: the same launches with other pointers.

A call of a GPU op is Python that looks at shapes and options, allocates, launches Triton kernels and
multiplies with cuBLAS. For equal shapes it does the same again, and up to a few thousand rows this Python
takes longer than the kernels. `replayed` wraps such a function: the second call of a kind is recorded
(`record.py`), later ones run the program that was made of it (`program.py`).

Calls are of one kind where every number, flag and None among their arguments is equal, and of every tensor
its dtype, shape, strides, device, its alignment to 16 bytes, and which of them begin at one address; and
whatever `settings` says. Arguments of other types, and calls that no record can hold, run as they are.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .record import Record, record, recording

__all__ = ["MOST_RECORDS", "Held", "forget", "refusals", "replayed", "switched_on"]

MOST_RECORDS = 1024  # of one function; the oldest go

_SEEN = object()  # in place of a record: the kind has been met once
_tables: list[dict[tuple, Any]] = []
_helds: weakref.WeakSet[Held] = weakref.WeakSet()
_refusals: dict[str, str] = {}
_current_device = getattr(torch._C, "_cuda_getDevice", None)


@functools.cache
def switched_on() -> bool:
    """Whether calls are replayed: unless PEFTKERN_REPLAY is 0, which is read once."""
    return os.environ.get("PEFTKERN_REPLAY", "1").lower() not in ("0", "false", "off", "no")


def forget() -> None:
    """Every record goes: what they depended on has changed."""
    for table in _tables:
        table.clear()
    for held in _helds:
        held.records.clear()


def refusals() -> dict[str, str]:
    """Why calls of a function could not be recorded, by the function's name: the last reason of each."""
    return dict(_refusals)


def replayed(settings: Callable[[], tuple] = tuple) -> Callable[[Callable], Callable]:
    """A decorator for a function of tensors, numbers, None, and lists or tuples of these, which computes by
    launches
    alone, which no gradient is to be recorded of: its Python depends on nothing but the kind of its call and
    on `settings`. Calls on a CUDA device are replayed.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        table: dict[tuple, Any] = {}
        _tables.append(table)
        name = f"{function.__module__}.{function.__qualname__}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return call(*args, **kwargs)
            first = args[0] if args else None
            if kwargs or not _on_gpu(first) or recording() or not switched_on():
                return function(*args, **kwargs)
            tensors: list[Tensor] = []
            key = _key(args, tensors)
            if key is None:
                return function(*args)
            key = (key, settings())
            known = table.get(key)
            if known is None:
                _keep(table, key, _SEEN)
                return function(*args)
            if known is _SEEN:
                return _recorded(function, name, table, key, args, tensors)
            return function(*args) if type(known) is str else known.run(tensors)

        call.records, call.settings = table, settings
        return call

    return wrap


class Held:
    """Calls of a replayed function that have most of their tensors in common: their records are found without
    a look at those, which are held and stay where and what they are.

    function: what `replayed` has made. fixed: the tensors in common, as they stand among a call's arguments,
    where no other stands between two of them. settings: what of the function's settings may change between
    these calls.
    """

    __slots__ = ("_function", "_fixed", "_settings", "records", "__weakref__")

    def __init__(
        self, function: Callable[..., Any], fixed: Sequence[Tensor | None], settings: Callable[[], Any]
    ) -> None:
        self._function, self._settings, self.records = function, settings, {}
        self._fixed = [t for t in fixed if t is not None]
        _helds.add(self)

    def __call__(
        self, before: list[Tensor], after: list[Tensor], rest: tuple, arguments: Callable[[], tuple]
    ) -> Any:
        """The function of `arguments()`, whose tensors are those of `before`, the fixed ones, and those of
        `after`; rest: what else these calls differ in."""
        kind = [rest, self._settings()]
        for t in before + after:
            kind.append((t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() & 15))
        known = self.records.get(tuple(kind))
        if known is None or before[0].get_device() != _current_device():
            return self._computed(tuple(kind), [*before, *self._fixed, *after], arguments())
        return known.run([*before, *self._fixed, *after])

    def _computed(self, kind: tuple, expected: list[Tensor], args: tuple) -> Any:
        """By the function itself. A record of a call whose own tensors lie apart from all others serves every
        call of this kind."""
        found: list[Tensor] = []
        key = _key(args, found)
        if key is not None and len(found) == len(expected) and all(map(_is, found, expected)):
            known = self._function.records.get((key, self._function.settings()))
            own = [t for t in expected if not any(t is fixed for fixed in self._fixed)]
            places = [t.data_ptr() for t in expected]
            if type(known) is Record and all(places.count(t.data_ptr()) == 1 for t in own):
                _keep(self.records, kind, known)
        return self._function(*args)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _on_gpu(first: Any) -> bool:
    """Whether the call's first tensor lies on the current CUDA device, plainly."""
    if type(first) is list or type(first) is tuple:
        first = next((part for part in first if part is not None), None)
    if not isinstance(first, Tensor) or not first.is_cuda:
        return False
    return first.get_device() == torch.cuda.current_device()


def _keep(table: dict[tuple, Any], key: tuple, value: Any) -> None:
    if key not in table and len(table) >= MOST_RECORDS:
        table.pop(next(iter(table)), None)
    table[key] = value


def _recorded(
    function: Callable[..., Any], name: str, table: dict, key: tuple, args: tuple, tensors: list
) -> Any:
    try:
        result, made, reason = record(function, args, tensors)
    except torch.OutOfMemoryError:
        # While it is recorded, a call holds all that it allocates; by itself it may fit.
        _keep(table, key, "out of memory")
        return function(*args)
    if made is None:
        _refusals[name] = reason
    _keep(table, key, reason if made is None else made)
    return result


def _key(args: tuple | list, tensors: list[Tensor]) -> tuple | None:
    """What calls of one kind have in common; None of arguments that have no kind. Their tensors are appended
    to `tensors` in the order in which they stand."""
    addresses: dict[int, int] = {}
    found: list[Any] = []
    return tuple(found) if _describe(args, tensors, addresses, found) else None


def _describe(args: tuple | list, tensors: list[Tensor], addresses: dict[int, int], found: list[Any]) -> bool:
    for value in args:
        if isinstance(value, Tensor):
            at = value.data_ptr()
            same = addresses.setdefault(at, len(tensors))
            tensors.append(value)
            found.append((value.dtype, value.shape, value.stride(), value.get_device(), at & 15, same))
        elif value is None or type(value) in (int, float, bool, str):
            # 1, 1.0 and True are equal, and their code is not.
            found.append(value if value is None else (type(value), value))
        elif isinstance(value, (list, tuple)):
            found.append(len(value))
            if not _describe(value, tensors, addresses, found):
                return False
        else:
            return False
    return True
