"""The masks that a transformers model builds for eager attention, built otherwise: per instance, through the
global names under which the model's forward looks up transformers' mask functions."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .attention import against_other_globals, hold_modes, uses
from .forwards import find
from .wrappers import innermost, rewrapped

__all__ = ["MaskMode", "masked", "release_masks", "surround_masks"]

_NAMES = (
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_chunked_causal_mask",
)
_FUNCTIONS = "ALL_MASK_ATTENTION_FUNCTIONS"


class MaskMode(NamedTuple):
    """A function of transformers' `masking_utils`, by its name, and `build(function, options)`: what it
    returns in place of `function(**options)`, the mask of eager attention."""

    name: str
    build: Callable[[Callable[..., Any], dict[str, Any]], Any]

    def replace(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """What the module's forward finds under `name`; `stock` where that cannot be looked into."""
        inner = innermost(stock)
        if inner is None or _FUNCTIONS not in inner.__code__.co_names:
            return stock
        scope = dict(inner.__globals__)
        scope[_FUNCTIONS] = _Masks(scope[_FUNCTIONS], self.build)
        ours = types.FunctionType(
            inner.__code__, scope, inner.__name__, inner.__defaults__, inner.__closure__
        )
        ours.__kwdefaults__ = inner.__kwdefaults__
        return functools.partial(_create, stock, rewrapped(stock, ours))


def _create(stock: Callable[..., Any], ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (stock if torch.compiler.is_compiling() else ours)(*args, **kwargs)


class _Masks:
    """transformers' mask functions, of which the eager one builds something else."""

    def __init__(self, stock: Any, build: Callable[..., Any]) -> None:
        self._stock, self._build = stock, build

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function = self._stock[name]
        return functools.partial(self._eager, function) if name == "eager" else function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def _eager(self, function: Callable[..., Any], **options: Any) -> Any:
        """One row is no matrix. Where everybody reads everything transformers has no mask."""
        sizes = [options.get(name) for name in ("q_length", "kv_length")]
        if not all(isinstance(size, int) for size in sizes) or options["q_length"] <= 1:
            return function(**options)
        if options.get("allow_is_bidirectional_skip") and function(**options | {"q_length": 1}) is None:
            return None
        return self._build(function, options)


def masked(module: nn.Module) -> bool:
    """Whether a module's forward builds masks that `surround_masks` can serve."""
    return any(uses(module, name) for name in _NAMES) and against_other_globals(module) is None


def surround_masks(module: nn.Module, build: Callable[..., Any]) -> bool:
    """Let `build(function, options)` stand for the masks of eager attention that the module's forward builds,
    until `release_masks`; whether that can be.

    build: found by its name where the module is unpickled.
    """
    if not masked(module) or find(module) is not None:
        return False
    hold_modes(module, tuple(MaskMode(name, build) for name in _NAMES if uses(module, name)))
    return True


def release_masks(module: nn.Module) -> None:
    """Undo `surround_masks`."""
    hold_modes(module, None)
