"""Logits that nobody has made yet: what a forward does to them is written down, and they are made where it
does anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .weights import FLOATS

__all__ = ["DeferredLogits", "LogitForm", "made"]

_SCALE, _TANH, _CAST = "scale", "tanh", "cast"
_ROUNDING = 1e-12  # of l / c * c


class LogitForm(NamedTuple):
    """What a model does to its logits l: scale * l, or softcap * tanh(scale * l / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


class DeferredLogits:
    """Passes for `head(hidden)`, [..., words], until something other than a scale, a cap or a cast is asked
    of it.

    From then on it passes for the tensor, which is made once: whatever a forward does with its logits comes
    out as with the stock head, writing into them included.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        words: int,
        dtype: torch.dtype,
        changes: tuple[tuple[str, Any], ...] = (),
    ) -> None:
        self.head, self.hidden, self.words, self.dtype, self.changes = head, hidden, words, dtype, changes
        self.tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.words))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def form(self) -> LogitForm | None:
        """The changes in one formula; None where they have none, or where the tensor was made and may have
        been written into."""
        if self.tensor is not None or self.dtype not in FLOATS:
            return None
        scale, cap = 1.0, None
        for kind, value in self.changes:
            if kind == _TANH:
                if cap is not None:
                    return None
                cap = 1.0
            elif kind == _SCALE and cap is None:
                scale = scale * value
            elif kind == _SCALE:
                cap = cap * value
        scale = scale if cap is None else scale * cap
        if not scale > 0 or (cap is not None and not cap > 0):
            return None
        return LogitForm(1.0 if abs(scale - 1.0) < _ROUNDING else scale, cap)

    def make(self) -> Tensor:
        """The logits themselves."""
        if self.tensor is None:
            logits = self.head(self.hidden)
            for kind, value in self.changes:
                logits = (
                    logits * value
                    if kind == _SCALE
                    else torch.tanh(logits)
                    if kind == _TANH
                    else logits.to(value)
                )
            self.tensor = logits
        return self.tensor

    def _changed(self, kind: str, value: Any = None) -> DeferredLogits | Tensor:
        if self.tensor is not None:
            return self.tensor * value if kind == _SCALE else torch.tanh(self.tensor)
        dtype = value if kind == _CAST else self.dtype
        return DeferredLogits(self.head, self.hidden, self.words, dtype, (*self.changes, (kind, value)))

    def __mul__(self, other: Any) -> Any:
        return self._changed(_SCALE, other) if _is_number(other) else self.make() * made(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return (
            self._changed(_SCALE, 1.0 / other) if _is_number(other) and other else self.make() / made(other)
        )

    def tanh(self) -> Any:
        return self._changed(_TANH)

    def contiguous(self) -> Any:
        return self if self.tensor is None else self.tensor.contiguous()

    def float(self) -> Any:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.get("dtype", args[0] if args else None)
        if self.tensor is None and isinstance(target, torch.dtype) and len(args) + len(kwargs) == 1:
            return self if target is self.dtype else self._changed(_CAST, target)
        if self.tensor is None and target == self.device and len(args) + len(kwargs) == 1:
            return self
        return self.make().to(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*made(args), **made(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("head", "hidden", "words", "dtype", "changes", "tensor"):
            raise AttributeError(name)
        return getattr(self.make(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.make()[made(index)] = made(value)


def made(value: Any) -> Any:
    """`value` with the tensor in the place of every DeferredLogits in it."""
    if isinstance(value, DeferredLogits):
        return value.make()
    if type(value) is dict:
        return {key: made(item) for key, item in value.items()}
    return type(value)(made(item) for item in value) if type(value) in (list, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.make(), name)(*made(others))

    operator.__name__ = name
    return operator


_ARITHMETIC = (
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "pow",
    "rpow",
    "matmul",
    "floordiv",
    "mod",
    "neg",
    "abs",
)
_OTHERS = (
    "and",
    "or",
    "invert",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "len",
    "iter",
    "getitem",
    "bool",
    "float",
    "int",
)
for _name in (*_ARITHMETIC, *_OTHERS):
    setattr(DeferredLogits, f"__{_name}__", _of_the_tensor(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__
