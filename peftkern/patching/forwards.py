"""The forwards that `patch` puts on module instances, put there and taken off again. Whatever a call asks for
beyond the plain case goes to the stock forward."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .methods import Method, of_module

__all__ = ["Forward", "find", "install", "remove"]

_SLOTS = ("forward", "_old_forward")  # accelerate's hooks call `_old_forward`; ours goes inside them


class Forward(Method):
    """A patched module's forward.

    group: the linears on the same input that it belongs to, or None. ready: what generation prepared.
    """

    __slots__ = ("cache", "group", "ready")

    def __init__(self, module: nn.Module, previous: Callable[..., Tensor] | None, cache: Any) -> None:
        super().__init__(module, previous)
        self.cache, self.group, self.ready = cache, None, None

    def renew(self) -> None:
        """What has to follow when `cache` was replaced."""

    def let_go(self) -> None:
        """Of what calls have prepared, which holds weights until the next call."""

    def __getstate__(self) -> tuple[Any, ...]:
        return self.module, self.previous, self.cache, self.group

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.module, self.previous, self.cache, self.group = state
        self.ready = self._unbound = None


def find(module: nn.Module) -> tuple[str, Forward] | None:
    """The slot of the instance that holds our forward, and the forward."""
    for slot in _SLOTS:
        value = module.__dict__.get(slot)
        if isinstance(value, Forward):
            return slot, value
        if (
            type(value) is types.MethodType
            and (held := of_module(module)) is not None
            and value == types.MethodType(held.__func__, module)
        ):
            return slot, held  # bound anew by accelerate's unwrap_model
    return None


def install(module: nn.Module, kind: type[Forward], cache: Any) -> Forward:
    """Put a forward of `kind`, made of `cache`, on the instance; one of that kind which is there already
    stays, and is made anew."""
    held = find(module)
    if held is not None and type(held[1]) is not kind:
        remove(module)
        held = None
    if held is not None:
        held[1].cache, held[1].group = cache, None
        held[1].renew()
        return held[1]
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = kind(module, module.__dict__.get(slot), cache)
    forward.hold(slot)
    return forward


def remove(module: nn.Module) -> bool:
    """Give the instance back the forward it had; whether there was one of ours."""
    slot, forward = find(module) or (None, of_module(module))
    if forward is None:
        return False
    if forward.group is not None:
        forward.group.dissolve(f"{type(module).__name__} was unpatched")
    forward.retire()
    if slot is None:
        return True  # inside a wrapper, which stays
    if forward.previous is not None:
        setattr(module, slot, forward.previous)
    elif slot == "forward":
        del module.forward
    else:
        setattr(module, slot, types.MethodType(type(module).forward, module))
    return True
