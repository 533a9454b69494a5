"""Forwards behind decorators. A decorator's behaviour is established where it is a plain function that holds
the function it wraps in a
cell: its own code then runs around ours as it ran around the stock forward, whatever it does (renaming a
deprecated argument with a warning, checkpointing, casting, counting)."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops import transformed
from .forwards import Forward

__all__ = ["UNKNOWN", "WrappedForward", "innermost", "rewrapped"]

UNKNOWN = "is wrapped by a decorator that cannot be looked into"


def innermost(function: Any) -> types.FunctionType | None:
    """The function inside all wrappers; None where a wrapper does not hold what it wraps in a cell."""
    while isinstance(function, types.FunctionType):
        wrapped = _wrapped(function)
        if wrapped is None:
            return function
        if not any(_content(cell) is wrapped for cell in function.__closure__ or ()):
            return None
        function = wrapped
    return None


def rewrapped(function: types.FunctionType, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` in the wrappers that `function` has: their own code, with another function in the cell that
    holds the wrapped one."""
    wrapped = _wrapped(function)
    if wrapped is None:
        return inner
    ours = rewrapped(wrapped, inner)
    cells = tuple(
        types.CellType(ours) if _content(cell) is wrapped else cell for cell in function.__closure__ or ()
    )
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(
        {name: ours if name == "__wrapped__" else value for name, value in function.__dict__.items()}
    )
    return new


def _wrapped(function: types.FunctionType) -> Any:
    """What a function wraps: as it says, or, where it says nothing, the one function named `forward` in its
    cells."""
    if "__wrapped__" in function.__dict__:
        return function.__dict__["__wrapped__"]
    held = [_content(cell) for cell in function.__closure__ or ()]
    forwards = [
        value for value in held if isinstance(value, types.FunctionType) and value.__name__ == "forward"
    ]
    return forwards[0] if len(forwards) == 1 and forwards[0] is not function else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


class WrappedForward(Forward):
    """A forward that runs inside what its class's forward is wrapped in.

    Made again by copying and unpickling, and when the class has another forward than the one it was made of;
    stock where that is another function inside, or wrapped by a decorator that cannot be looked into.
    """

    __slots__ = ("_function", "_ours", "_seen")

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None, cache: Any) -> None:
        super().__init__(module, previous, cache)
        self.build()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state)
        self.build()  # of the module, which is being copied or loaded itself, the class alone is needed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if type(self.module).forward is not self._seen and not torch.compiler.is_compiling():
            self.build()
        if self._function is None or transformed():
            return self.stock(*args, **kwargs)
        return self._function(self.module, *args, **kwargs)

    def renew(self) -> None:
        self.build()

    def build(self) -> None:
        """The function for the class's forward of now and what `cache` says."""
        self._seen = type(self.module).forward
        inner = innermost(self._seen)
        self._ours = None if inner is None else self.inside(inner)
        self._function = None if self._ours is None else rewrapped(self._seen, self._ours)

    def bare(self) -> bool:
        """Whether the class's forward has no wrappers, so that ours may run without them."""
        return self._function is self._ours and type(self.module).forward is self._seen

    def inside(self, stock: types.FunctionType) -> Callable[..., Any] | None:
        """What runs in place of `stock`, the innermost function; None where it has to be `stock`."""
        raise NotImplementedError
