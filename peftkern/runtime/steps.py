"""What a record of a GPU op's call consists of: allocations, launches, operators of torch.

The tensors of a call are numbered: its arguments first, then what it allocates. Such a numbered tensor is a
base. Every other tensor is a place within a base. A step reads and writes two lists, `bases` and their
addresses, `pointers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Address",
    "Allocate",
    "Compiled",
    "Drop",
    "Interpreted",
    "Operate",
    "Place",
    "bases_of",
    "filled",
]


class Place(NamedTuple):
    """A tensor that begins `offset` bytes behind base number `base`; whole: it is the base itself."""

    base: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool


def filled(template: Any, bases: list[Any]) -> Any:
    """The template, in which places stand for tensors, with this call's tensors."""
    kind = type(template)
    if kind is Place:
        base = bases[template.base]
        if template.whole:
            return base
        at = base.storage_offset() + template.offset // base.element_size()
        return base.as_strided(template.size, template.stride, at)
    if kind is tuple or kind is list:
        return kind([filled(part, bases) for part in template])
    if kind is dict:
        return {name: filled(part, bases) for name, part in template.items()}
    if isinstance(template, tuple):
        return kind(*[filled(part, bases) for part in template])
    return template


def bases_of(template: Any) -> Iterator[int]:
    """The numbers of the bases that a template needs."""
    if type(template) is Place:
        yield template.base
    elif isinstance(template, (tuple, list)):
        for part in template:
            yield from bases_of(part)
    elif type(template) is dict:
        yield from bases_of(list(template.values()))


class Allocate:
    """An uninitialized tensor."""

    __slots__ = ("base", "size", "stride", "dtype", "device")

    def __init__(self, base: int, like: Tensor) -> None:
        self.base, self.size, self.stride = base, tuple(like.shape), like.stride()
        self.dtype, self.device = like.dtype, like.device

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        t = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        bases[self.base], pointers[self.base] = t, t.data_ptr()

    def used(self) -> Iterator[int]:
        yield self.base


class Address(NamedTuple):
    """The address `offset` bytes behind that of base number `base`."""

    base: int
    offset: int


def _holds_address(value: Any) -> bool:
    if type(value) is Address:
        return True
    return isinstance(value, tuple) and any(map(_holds_address, value))


def _picker(indices: list[int]) -> Callable[[list[Any]], tuple]:
    """What gives the tuple of a list's members at these indices."""
    if len(indices) == 1:
        (index,) = indices
        return lambda pool: (pool[index],)
    return itemgetter(*indices)


class Compiled:
    """A compiled Triton kernel. values: its arguments in order, `Address`es in them, also within tuples.

    A call's pool has what never changes, the addresses, and the tuples that hold some, innermost first; the
    arguments, like each of those tuples, are picked out of it.
    """

    __slots__ = ("runner", "constants", "addresses", "tuples", "arguments")

    def __init__(self, runner: Callable[..., None], values: Sequence[Any]) -> None:
        pools: tuple[list[Any], ...] = ([], [], [])

        def place(value: Any) -> tuple[int, int]:
            """The pool that has the value, and where."""
            kind = 1 if type(value) is Address else 2 if _holds_address(value) else 0
            pools[kind].append([place(part) for part in value] if kind == 2 else value)
            return kind, len(pools[kind]) - 1

        places = [place(value) for value in values]
        self.runner, (self.constants, self.addresses, tuples) = runner, pools
        starts = 0, len(self.constants), len(self.constants) + len(self.addresses)

        def picker(parts: list[tuple[int, int]]) -> Callable[[list[Any]], tuple]:
            return _picker([starts[kind] + at for kind, at in parts])

        self.tuples, self.arguments = [picker(parts) for parts in tuples], picker(places)

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        pool = self.constants + [pointers[base] + offset for base, offset in self.addresses]
        for pick in self.tuples:
            pool.append(pick(pool))
        self.runner(*self.arguments(pool), stream=stream)

    def used(self) -> Iterator[int]:
        return (address.base for address in self.addresses)


class Interpreted:
    """A kernel that Triton's interpreter runs: with tensors, as it takes no addresses."""

    __slots__ = ("run", "arguments")

    def __init__(self, run: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> None:
        self.run, self.arguments = run, arguments

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        self.run(filled(self.arguments, bases))

    def used(self) -> Iterator[int]:
        return bases_of(self.arguments)


class Operate:
    """An operator of torch. made: the number of each result that is a new base, None of the others."""

    __slots__ = ("operator", "args", "kwargs", "made")

    def __init__(self, operator: Any, args: tuple, kwargs: dict[str, Any], made: list[int | None]) -> None:
        self.operator, self.args, self.kwargs, self.made = operator, args, kwargs, made

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        found = self.operator(*filled(self.args, bases), **filled(self.kwargs, bases))
        results = found if isinstance(found, (tuple, list)) else (found,)
        for base, t in zip(self.made, results, strict=True):
            if base is not None:
                bases[base], pointers[base] = t, t.data_ptr()

    def used(self) -> Iterator[int]:
        yield from bases_of([self.args, self.kwargs])
        yield from (base for base in self.made if base is not None)


class Drop:
    """Lets bases go that no later step needs."""

    __slots__ = ("bases",)

    def __init__(self, bases: tuple[int, ...]) -> None:
        self.bases = bases

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        for base in self.bases:
            bases[base] = None
