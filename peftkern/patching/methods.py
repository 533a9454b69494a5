"""A callable on a module's instance that answers whoever asks as the bound method in whose place it
stands."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .hooks import Ours

__all__ = ["Method", "of_module"]

# What a bound method passes on to its function. `__func__`, the function, has no `__wrapped__`: who unwraps a
# wrapper of it ends at ours.
_OF_STOCK = ("__annotations__", "__closure__", "__code__", "__defaults__", "__globals__", "__kwdefaults__")
_OF_STOCK += ("__name__", "__qualname__", "__wrapped__")
_SLOT = "_peftkern_forward"  # of the module, which holds on to ours where a wrapper takes its place
_REPLICATE = (
    "_replicate_for_data_parallel"  # torch's, called on each module by nn.DataParallel at each of its calls
)


class Method(Ours):
    """Bound to its module by a plain attribute: deepcopy and pickle of the module carry it along, rebound, as
    they do no bound method.

    previous: the callable the instance had before, None where it had the class's. `inspect.signature`,
    `__self__`, `__func__` and what else is read off a method are the stock forward's.
    """

    __slots__ = ("module", "previous", "_unbound")

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None) -> None:
        self.module, self.previous, self._unbound = module, previous, None

    def hold(self, slot: str) -> None:
        """Take this place on the module."""
        self.module.__dict__[_SLOT] = self
        self.module.__dict__[_REPLICATE] = _Replicate(self, slot)
        setattr(self.module, slot, self)

    def bound(self) -> Callable[..., Any]:
        """The forward the module had before."""
        return (
            types.MethodType(type(self.module).forward, self.module)
            if self.previous is None
            else self.previous
        )

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward that the module had before gives."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def retire(self) -> None:
        """Whoever still holds this callable (a wrapper put around it) gets the stock forward by it from now
        on."""
        self.module.__dict__.pop(_SLOT, None)
        self.module.__dict__.pop(_REPLICATE, None)
        again = {"__call__": Method.stock, "__reduce__": lambda self: (getattr, (self.module, "forward"))}
        self.__class__ = type(type(self).__name__, (type(self),), {"__slots__": (), **again})

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable[..., Any]:
        """A function of the module and its arguments, for those who bind it anew."""
        if self._unbound is None:
            self._unbound = _function(self)
        return self._unbound

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return inspect.signature(self.bound())
        if name not in _OF_STOCK:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.bound(), name)


class _Replicate:
    """Gives nn.DataParallel a replica of the module with the forward that the module had before ours.

    A replica is a copy of the module's attributes with parameters of another device. Ours among them would
    run on the original's.
    """

    __slots__ = ("method", "slot")

    def __init__(self, method: Method, slot: str) -> None:
        self.method, self.slot = method, slot

    def __call__(self) -> nn.Module:
        method = self.method
        replica = type(method.module)._replicate_for_data_parallel(method.module)
        held = replica.__dict__
        del held[_SLOT], held[_REPLICATE]
        if held.get(self.slot) is method:
            del held[self.slot]
            if method.previous is not None:
                held[self.slot] = method.previous
        return replica


def _function(own: Method) -> Callable[..., Any]:
    """`own` for its module; for another one, a copy of it whose forward was wrapped, that copy's own."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        method = own if module is own.module else of_module(module)
        return type(module).forward(module, *args, **kwargs) if method is None else method(*args, **kwargs)

    stock = type(own.module).forward
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        setattr(forward, name, getattr(stock, name, getattr(forward, name)))
    forward.__signature__ = inspect.signature(stock)
    return forward


def of_module(module: nn.Module) -> Method | None:
    """Ours, wherever it is held: on the instance, or inside a wrapper that took its place there."""
    method = module.__dict__.get(_SLOT)
    return method if method is not None and method.module is module else None
