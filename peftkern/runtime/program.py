"""A GPU op's call as a straight-line function of Python: allocations, launches, operators of torch.

The tensors of a call are numbered: its arguments first, then what it allocates. Such a numbered tensor is a
base, b0, b1, ... in the function, and p0, p1, ... its address; every other tensor is a place within a base.
The function is text that Python compiles once: a call then costs what its statements cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Address", "Place", "Program"]


class Place(NamedTuple):
    """A tensor that begins `elements` of its dtype behind base number `base`; whole: it is the base
    itself."""

    base: int
    elements: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool


class Address(NamedTuple):
    """The address `offset` bytes behind that of base number `base`."""

    base: int
    offset: int


class _Statement(NamedTuple):
    """A line; the bases that it makes, those that it uses, and those of which it uses the address."""

    text: str
    made: tuple[int, ...]
    used: frozenset[int]
    addressed: frozenset[int]


class Program:
    """The function in the making. inputs: how many bases are arguments."""

    def __init__(self, inputs: int) -> None:
        self.inputs, self.statements = inputs, []
        self.names: dict[str, Any] = {"empty": torch.empty_strided}

    def allocate(self, base: int, like: Tensor) -> None:
        """An uninitialized tensor."""
        kind = f"dtype={self._name(like.dtype)}, device={self._name(like.device)}"
        self._add(f"b{base} = empty({tuple(like.shape)}, {like.stride()}, {kind})", (base,))

    def launch(self, runner: Callable[..., None], values: Sequence[Any]) -> None:
        """A compiled Triton kernel. values: its arguments in order, `Address`es in them, also within
        tuples."""
        arguments = "".join(f"{self._written(_plain(value))}, " for value in values)
        self._add(f"{self._name(runner)}({arguments}stream=stream)", (), values)

    def interpret(self, run: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> None:
        """A kernel that Triton's interpreter runs: with tensors, as it takes no addresses."""
        self._add(f"{self._name(run)}({self._written(arguments)})", (), arguments)

    def operate(self, operator: Any, args: tuple, kwargs: dict, results: Sequence[int | None]) -> None:
        """An operator of torch. results: the number of each result that is a new base, None of the others."""
        made = tuple(base for base in results if base is not None)
        targets = ", ".join("_" if base is None else f"b{base}" for base in results)
        written = [self._written(value) for value in args]
        written += [f"{name}={self._written(value)}" for name, value in kwargs.items()]
        call = f"{self._name(operator)}({', '.join(written)})"
        self._add(f"{targets} = {call}" if made else call, made, (args, kwargs))

    def finished(self, result: Any, device: torch.device) -> tuple[Callable[[list[Tensor]], Any], str]:
        """The function of the tensors that are the call's arguments, and its source: it runs on the current
        stream of their device, and returns `result`."""
        self.names["current_stream"] = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        source = self._source(result, f"current_stream({device.index})" if device.type == "cuda" else "0")
        exec(compile(source, "<a recorded call>", "exec"), self.names)
        return self.names.pop("replay"), source

    def _source(self, result: Any, stream: str) -> str:
        """Each tensor of the call's own is let go after the last statement that uses it, as in the function
        that was recorded."""
        kept = {part.base for part in _parts(result) if type(part) is Place}
        addressed = frozenset().union(*(each.addressed for each in self.statements))
        last = {base: i for i, each in enumerate(self.statements) for base in (*each.made, *each.used)}
        lines = [f"stream = {stream}", f"{''.join(f'b{i}, ' for i in range(self.inputs))}= tensors"]
        lines += [f"p{base} = b{base}.data_ptr()" for base in sorted(addressed) if base < self.inputs]
        for i, each in enumerate(self.statements):
            lines.append(each.text)
            lines += [f"p{base} = b{base}.data_ptr()" for base in each.made if base in addressed]
            done = sorted(base for base, at in last.items() if at == i and base >= self.inputs)
            lines += [f"del b{base}" for base in done if base not in kept]
        lines.append(f"return {self._written(result)}")
        return "".join(("def replay(tensors):\n", *(f"    {line}\n" for line in lines)))

    def _add(self, text: str, made: tuple[int, ...], operands: Any = ()) -> None:
        parts = _parts(operands)
        used = frozenset(part.base for part in parts)
        addressed = frozenset(part.base for part in parts if type(part) is Address)
        self.statements.append(_Statement(text, made, used, addressed))

    def _name(self, value: Any) -> str:
        """What the function finds the value under."""
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def _written(self, value: Any) -> str:
        """An expression of the value, in which this call's tensors stand for places and addresses."""
        kind = type(value)
        if kind is Address:
            return f"p{value.base} + {value.offset}" if value.offset else f"p{value.base}"
        if kind is Place:
            name = f"b{value.base}"
            at = f"{name}.storage_offset() + {value.elements}"
            return name if value.whole else f"{name}.as_strided({value.size}, {value.stride}, {at})"
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return repr(value)
        if kind is dict:
            return "{" + "".join(f"{name!r}: {self._written(part)}, " for name, part in value.items()) + "}"
        if not isinstance(value, (tuple, list)) or not _parts(value):
            return self._name(value)
        parts = "".join(f"{self._written(part)}, " for part in value)
        if kind is list:
            return f"[{parts}]"
        return f"({parts})" if kind is tuple else f"{self._name(kind)}({parts})"


def _parts(value: Any) -> list[Place | Address]:
    """The places and addresses in a value."""
    if type(value) in (Place, Address):
        return [value]
    inner = value.values() if type(value) is dict else value if isinstance(value, (tuple, list)) else ()
    return [found for part in inner for found in _parts(part)]


def _plain(value: Any) -> Any:
    """Tuples with addresses in them without names, which take longer to make."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) and type(value) is not Address else value
