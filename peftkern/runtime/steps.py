"""What a record of a GPU op's call consists of: allocations, launches, operators of torch.

The tensors of a call are numbered: its arguments first, then what it allocates. Such a numbered tensor is a
base. Every other tensor is a place within a base. A step reads and writes two lists, `bases` and their
addresses, `pointers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Addressed",
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


class Addressed(NamedTuple):
    """Values among which addresses stand. patches: (position, base, offset) of the addresses; tuples: the
    positions whose value is a tuple with addresses in it."""

    values: list[Any]
    patches: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, Addressed], ...]

    def filled(self, pointers: list[int]) -> list[Any]:
        values = self.values.copy()
        for at, base, offset in self.patches:
            values[at] = pointers[base] + offset
        for at, parts in self.tuples:
            values[at] = tuple(parts.filled(pointers))
        return values

    def used(self) -> Iterator[int]:
        yield from (base for _, base, _ in self.patches)
        for _, parts in self.tuples:
            yield from parts.used()


class Compiled:
    """A compiled Triton kernel, with its arguments in order."""

    __slots__ = ("runner", "arguments")

    def __init__(self, runner: Callable[..., None], arguments: Addressed) -> None:
        self.runner, self.arguments = runner, arguments

    def __call__(self, bases: list[Any], pointers: list[int], stream: int) -> None:
        self.runner(*self.arguments.filled(pointers), stream=stream)

    def used(self) -> Iterator[int]:
        return self.arguments.used()


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
