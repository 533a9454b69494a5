"""Which backends exist, why others do not, and which one an op takes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

__all__ = ["BACKENDS", "available", "explain", "native", "select", "use_backend"]

BACKENDS = ("cpu", "reference")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("peftkern_backend", default=None)


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  torch's OpenMP runtime must be loaded first, so that the extension shares it

    try:
        from . import _C
    except ImportError as error:
        return None, f"the native extension is not built ({error}); run: pip install -e . (needs a C++ compiler)"
    return _C, f"native kernels, ISA {_C.isa()}"


def native() -> ModuleType:
    """The extension module; RuntimeError with the reason where it is missing."""
    module, reason = _load_native()
    if module is None:
        raise RuntimeError(reason)
    return module


def available(name: str) -> tuple[bool, str]:
    """Whether a backend can be used here, and why (or why not)."""
    if name == "cpu":
        module, reason = _load_native()
        return module is not None, reason
    if name == "reference":
        return True, "plain PyTorch, any device"
    raise ValueError(f"backend: got {name!r}, expected one of {BACKENDS}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op onto one backend within the block; RuntimeError where it is not available."""
    ok, reason = available(name)
    if not ok:
        raise RuntimeError(f"backend {name!r}: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(x: Tensor) -> str:
    """The backend an op takes for tensors like `x`: the forced one, else the device's native one, else the reference."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if x.device.type == "cpu" and _load_native()[0] is not None:
        return "cpu"
    return "reference"


def explain(x: Tensor, n: int, k: int) -> str:
    """Which kernel a 4-bit linear with out_features `n` and in_features `k` takes for `x` [..., k], and why."""
    backend = select(x)
    reason = available(backend)[1]
    if backend != "cpu":
        return f"{backend}: {reason}"
    from .ops.qlora_linear import config

    m = x.numel() // max(k, 1)
    choice = config.choose(dtype=str(x.dtype).removeprefix("torch."), isa=native().isa(), m=m, n=n, k=k)
    return f"cpu: {reason}; {choice.regime} ({choice.why})"
