"""What a recognized forward depends on beside its input: attributes, children and the functions behind them,
as they were when the module was recognized. While they are the same the forward does the same, and its fused
form may run in its place."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .hooks import against, direct
from .watch import Watch
from .wrappers import WrappedForward, innermost

__all__ = ["Reads", "RecognizedForward", "reads"]

_ABSENT = "peftkern: no such attribute"
_VALUES = (type(None), bool, int, float, complex, str, bytes, enum.Enum)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type)


class Reads:
    """The values that a module's forward reads, and its children that are called."""

    __slots__ = ("values", "children", "forwards")

    def __init__(
        self, values: list[tuple[Any, str, Any]], children: list[tuple[nn.Module, str, nn.Module]]
    ) -> None:
        self.__setstate__((values, children))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.values, self.children

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.values, self.children = state
        self.forwards = [
            type(child).forward for _, _, child in self.children
        ]  # of a copy in the making the class is known

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        for owner, name, value in self.values:
            now = owner.__dict__.get(name, _ABSENT)
            if now is not value and not (
                isinstance(value, _VALUES) and type(now) is type(value) and now == value
            ):
                return False
        for (parent, name, child), forward in zip(self.children, self.forwards, strict=True):
            if parent._modules.get(name) is not child or type(child).forward is not forward:
                return False
        return True

    def watched(self) -> bool:
        """Whether a child has to be called as a module: for a hook, or a forward of its own."""
        return any(not direct(child) for _, _, child in self.children)


class RecognizedForward(WrappedForward):
    """A forward whose class's forward was recognized by a probe, and is looked at again when something that
    it reads has changed.

    cache: what the probe found, None where what is there now has no fused form. reads: None before the first
    look.
    """

    __slots__ = ("reads",)

    def __getstate__(self) -> tuple[Any, ...]:
        return *super().__getstate__(), self.reads

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:-1])
        self.reads = state[-1]

    def build(self) -> None:
        self.reads: Reads | str | None = None
        super().build()

    def look(self) -> tuple[Any, Reads | str]:
        """What a probe of the module finds now, and what that depends on."""
        raise NotImplementedError

    def now(self) -> Any:
        """`cache`, for the module as it is at this call; None where the stock forward has to run."""
        seen = self.reads
        if type(seen) is Reads and not seen.values and not seen.children:
            return self.cache  # it reads nothing that could change
        if type(seen) is not Reads or not seen.hold():
            if type(seen) is str or torch.compiler.is_compiling():
                return None
            self.cache, seen = self.look()
            self.reads = seen
        return None if type(seen) is str or seen.watched() else self.cache

    def watch(self, seen: Watch) -> bool:
        """Let all be seen on which `now` depends; whether that can be done."""
        found = self.reads
        if type(found) is not Reads:
            return False
        seen.module(self.module)
        seen.function(type(self.module))
        for owner, name, _ in found.values:
            seen.entry(owner.__dict__, name)
        for parent, name, child in found.children:
            seen.entry(parent._modules, name)
            seen.module(child)
            seen.function(type(child))
        return True


def reads(module: nn.Module, *, skip: frozenset[str] = frozenset()) -> Reads | str:
    """What the class's forward reads of the module, but for the names in `skip`, or why that cannot be
    told."""
    values: list[tuple[Any, str, Any]] = []
    children: list[tuple[nn.Module, str, nn.Module]] = []
    reason = _read(module, skip, values, children)
    return reason or Reads(values, children)


def _read(module: nn.Module, skip: frozenset[str], values: list[Any], children: list[Any]) -> str | None:
    inner = innermost(type(module).forward)
    if inner is None:
        return f"{type(module).__name__}.forward is no plain function"
    names = set(_names(inner, type(module), set())) - skip - {"forward"}
    for name in sorted(names):
        if name in module._modules:
            reason = _child(module, name, values, children)
        elif name in module._parameters or name in module._buffers:
            reason = f"{type(module).__name__} reads a tensor of its own, {name}"
        elif name in module.__dict__ or (hasattr(type(module), name) and not hasattr(nn.Module, name)):
            reason = _value(module, name, names, values)
        else:
            continue
        if reason:
            return reason
    return None


def _child(module: nn.Module, name: str, values: list[Any], children: list[Any]) -> str | None:
    child = module._modules[name]
    if child is None:
        return None
    children.append((module, name, child))
    reason = against(name, child) or _read(child, frozenset(), values, children)
    if reason is None and isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return f"its child {name} is a container"
    return reason


def _value(owner: Any, name: str, names: set[str], values: list[Any]) -> str | None:
    """An attribute, followed into an object such as a configuration by the names that the code has."""
    value = owner.__dict__.get(name, _ABSENT)
    values.append((owner, name, value))
    if value is _ABSENT or isinstance(value, (*_VALUES, *_FUNCTIONS)):
        return None
    if type(value) is tuple and all(isinstance(item, _VALUES) for item in value):
        return None
    if not hasattr(value, "__dict__") or isinstance(value, (dict, list, set)):
        return f"it reads {name}, a {type(value).__name__}, which may change in place"
    if any(owner is value for owner, _, _ in values):
        return None
    return next(
        filter(None, (_value(value, inner, names, values) for inner in sorted(names & vars(value).keys()))),
        None,
    )


def _names(function: types.FunctionType, kind: type, seen: set[types.CodeType]) -> Iterator[str]:
    """Names of attributes that a forward may read: in its code, and in that of the methods and functions of
    its file which it calls."""
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    for name in _code_names(function.__code__):
        yield name
        called = [base.__dict__.get(name) for base in kind.__mro__ if base not in nn.Module.__mro__]
        beside = function.__globals__.get(name)
        if getattr(beside, "__globals__", None) is function.__globals__:
            called.append(beside)
        for inner in called:
            inner = inner.fget if isinstance(inner, property) else innermost(inner)
            if isinstance(inner, types.FunctionType):
                yield from _names(inner, kind, seen)


def _code_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):  # getattr(self, "name", ...)
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _code_names(constant)
