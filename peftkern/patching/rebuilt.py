"""What a norm gave, in a fused decoder layer: what would be saved of it for backward is computed again there,
from the residual stream, which the norm itself has saved.

Hooks for saved tensors stand around the block that reads the norm's output: of that they keep a recipe, of
all else what was kept without them."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .. import functional
from .blocks import NormForward
from .forwards import find
from .hooks import has_hooks

__all__ = ["REBUILT", "rebuilding"]

REBUILT = "_peftkern_rebuilt_norms"  # of a layer: whether it does this

_outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def rebuilding(norm: nn.Module, y: Tensor, s: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, what is saved of y = norm(s) takes no memory beside that of s."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    held = find(norm)
    ours = held is not None and held[0] == "forward" and type(held[1]) is NormForward and not has_hooks(norm)
    found = held[1].operands(s) if ours and y is not s and y.is_contiguous() else None
    return contextlib.nullcontext() if found is None else _Rebuilding(y, s, *found)


class _Rebuilding:
    """The hooks. Autograd holds on to them as long as to what they packed: y's storage is let go at the end
    of the block."""

    def __init__(self, y: Tensor, s: Tensor, weight: Tensor, eps: float, mode: Any) -> None:
        self.storage, self.key, self.like = (
            y.untyped_storage(),
            y.untyped_storage()._cdata,
            (y.numel(), y.dtype),
        )
        self.s, self.weight, self.versions = s.detach(), weight, (_version(s), _version(weight))
        self.options = {"eps": eps, "offset": mode.offset, "cast": mode.cast}
        self.outer = _outer_hooks(False)
        self.waiting: weakref.WeakSet[_Recipe] = weakref.WeakSet()
        self.value: Tensor | None = None
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.storage = self.key = self.hooks = None
        if self.outer is not None:  # whose packing has s: a checkpoint, which keeps nothing of it, frees it
            self.s = None

    def pack(self, tensor: Tensor) -> Any:
        if self._is_output(tensor):
            recipe = _Recipe(tensor.shape, None if self.outer is None else self.outer[0](self.s))
            self.waiting.add(recipe)
            return recipe
        return _Kept(tensor) if self.outer is None else self.outer[0](tensor)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Recipe):
            return self._again(packed).view(packed.shape)
        return packed.tensor() if self.outer is None else self.outer[1](packed)

    def _is_output(self, tensor: Tensor) -> bool:
        """All of y, in any shape."""
        return (
            self.key is not None
            and (tensor.numel(), tensor.dtype) == self.like
            and tensor.is_contiguous()
            and tensor.untyped_storage()._cdata == self.key
        )

    def _again(self, packed: _Recipe) -> Tensor:
        """y, computed once for all that have saved it: it is kept until the last of them has it."""
        y = self._computed(packed) if self.value is None else self.value
        self.waiting.discard(packed)
        self.value = y if self.waiting else None
        return y

    def _computed(self, packed: _Recipe) -> Tensor:
        if self.outer is None:
            s, now = self.s, (_version(self.s), _version(self.weight))
        else:
            s, now = self.outer[1](packed.stream), (self.versions[0], _version(self.weight))
        if now != self.versions:
            raise RuntimeError(
                "a norm's output cannot be computed again for backward: the residual stream or the norm's "
                f"weight was written to since (versions {now}, expected {self.versions})"
            )
        with torch.no_grad():
            return functional.rms_norm(s, self.weight.detach(), **self.options)


class _Recipe:
    """In place of y, of which `shape` was saved. stream: s, as the hooks around ours have packed it."""

    __slots__ = ("shape", "stream", "__weakref__")

    def __init__(self, shape: torch.Size, stream: Any) -> None:
        self.shape, self.stream = shape, stream


class _Kept:
    """A saved tensor, which must not have been written to when it is needed. Detached, as autograd's node may
    have made it."""

    __slots__ = ("held", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.held, self.version = tensor.detach(), _version(tensor)

    def tensor(self) -> Tensor:
        if _version(self.held) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: {self.held.dtype} {tuple(self.held.shape)} is at version {_version(self.held)}, "
                f"expected version {self.version}"
            )
        return self.held


def _version(tensor: Tensor) -> int:
    """How often it was written to. Inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version
