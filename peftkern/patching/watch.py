"""What a prepared call was made of, looked at again before the next one: entries that are to be the same
objects, tensors at the same places, lists with the same items, hooks that nobody has registered."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.native import native
from .hooks import EVERYWHERE

__all__ = ["Watch"]

_ABSENT, _ADDRESS = object(), Tensor.data_ptr
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The lists that `holds` goes through: a loop over many entries is faster than the calls that made
    them."""

    __slots__ = (
        "_codes",
        "_dicts",
        "_empty",
        "_frozen",
        "_functions",
        "_listed",
        "_others",
        "_places",
        "_tensors",
    )

    def __init__(self) -> None:
        self._dicts: list[Any] = []  # a dict, a key and a value, again and again
        self._others: list[tuple[Mapping[str, Any], str, Any]] = []  # the entries of other mappings
        self._empty: list[Any] = [*EVERYWHERE]
        self._listed: list[tuple[list[Any], list[Any]]] = []
        self._functions: set[tuple[type, str]] = set()  # of which the entries and codes are listed
        self._codes: list[tuple[types.FunctionType, types.CodeType]] = []
        self._tensors: list[Tensor] = []
        self._frozen: list[Tensor] = []
        self._places: list[int] = []

    def entry(self, owner: Mapping[str, Any], *keys: str) -> None:
        """What the mapping has under the keys, which may be nothing."""
        found = [(owner, key, owner.get(key, _ABSENT)) for key in keys]
        if type(owner) is dict:
            self._dicts.extend(part for entry in found for part in entry)
        else:
            self._others.extend(found)

    def listed(self, items: list[Any]) -> None:
        """A list's items."""
        self._listed.append((items, list(items)))

    def place(self, *tensors: Tensor | None) -> None:
        """Where the tensors lie; None is none."""
        with torch._C.DisableTorchFunctionSubclass():
            self._tensors.extend(t for t in tensors if t is not None)
            self._places = list(map(_ADDRESS, self._tensors))

    def frozen(self, tensor: Tensor) -> None:
        """That it requires no grad."""
        self._frozen.append(tensor)

    def function(self, kind: type, name: str = "forward") -> None:
        """A class's function, and its code, once for all that are of the class."""
        owner = next((base for base in kind.__mro__ if name in base.__dict__), kind)
        if (owner, name) in self._functions:
            return
        self._functions.add((owner, name))
        self.entry(owner.__dict__, name)
        found = owner.__dict__.get(name)
        if isinstance(found, types.FunctionType):
            self._codes.append((found, found.__code__))

    def module(self, module: nn.Module) -> None:
        """That nobody watches its calls, and the forward on the instance."""
        held = module.__dict__
        self.entry(held, "forward")
        self._empty.extend(held[name] for name in _HOOKS)

    def holds(self) -> bool:
        """Whether all is as it was."""
        if not native().entries_hold(self._dicts, _ABSENT, self._empty):
            return False
        for owner, key, value in self._others:
            if owner.get(key, _ABSENT) is not value:
                return False
        for items, before in self._listed:
            if items != before:
                return False
        for function, code in self._codes:
            if function.__code__ is not code:
                return False
        for tensor in self._frozen:
            if tensor.requires_grad:
                return False
        # bitsandbytes' parameter takes 2 us for what a plain tensor tells in 0.1 us.
        with torch._C.DisableTorchFunctionSubclass():
            return list(map(_ADDRESS, self._tensors)) == self._places
