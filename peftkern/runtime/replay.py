"""A GPU op's call, recorded once and replayed afterwards: the same launches with other pointers.

A call of a GPU op is Python that looks at shapes and options, allocates, launches Triton kernels and
multiplies with cuBLAS. For equal shapes it does the same again, and up to a few thousand rows this Python
takes longer than the kernels. `replayed` wraps such a function: the second call of a kind is recorded
(`record.py`), later ones go through the record's steps (`steps.py`).

Calls are of one kind where every number, flag and None among their arguments is equal, and of every tensor
its dtype, shape, strides, device, its alignment to 16 bytes, and which of them begin at one address; and
whatever `settings` says. Arguments of other types, and calls that no record can hold, run as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .record import record, recording

__all__ = ["MOST_RECORDS", "forget", "refusals", "replayed", "switched_on"]

MOST_RECORDS = 1024  # of one function; the oldest go

_SEEN = object()  # in place of a record: the kind has been met once
_tables: list[dict[tuple, Any]] = []
_refusals: dict[str, str] = {}


@functools.cache
def switched_on() -> bool:
    """Whether calls are replayed: unless PEFTKERN_REPLAY is 0, which is read once."""
    return os.environ.get("PEFTKERN_REPLAY", "1").lower() not in ("0", "false", "off", "no")


def forget() -> None:
    """Every record goes: what they depended on has changed."""
    for table in _tables:
        table.clear()


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

        call.records = table
        return call

    return wrap


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
