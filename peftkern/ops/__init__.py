"""The ops: one folder each, `reference.py` being the definition and the other files its backends."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from ..runtime.backends import select

__all__ = [
    "LIBRARY",
    "accumulation",
    "autocast_off",
    "backend",
    "entry",
    "served",
    "serving",
    "transformed",
    "undispatched",
    "unobserved",
]

LIBRARY = library.Library("peftkern", "DEF")

# Every patched call asks: what the answer takes is bound once.
_compiler, _grad_enabled = torch.compiler, torch.is_grad_enabled
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_dispatch_modes, _profiled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled
_FLAGGED = hasattr(torch.compiler, "_is_exporting_flag")


@functools.cache
def backend(op: str, name: str) -> ModuleType:
    """The module with an op's launchers for a backend; imported at its first use, as Triton is not there on
    every machine."""
    folder = f"{__name__}.{op}"
    if name in ("cuda", "triton"):
        # Some ops are a plan over Triton, CUDA and cuBLAS launches, composed in one file; others have Triton
        # kernels alone.
        name = next(file for file in ("gpu", name, "triton") if importlib.util.find_spec(f"{folder}.{file}"))
    return importlib.import_module(f"{folder}.{name}")


def transformed() -> bool:
    """Whether torch follows what is computed in a way that knows its own operators alone: torch.func's
    transforms, forward-mode AD, and torch.jit.trace and torch.export, whose programs are to run without this
    package."""
    # The compiler of torch 2.11 takes is_exporting() for true in whatever it traces; it reads the flag behind
    # it.
    return (
        forward_ad._current_level >= 0
        or _transforms()
        or _tracing() is not None
        or (_compiler._is_exporting_flag if _FLAGGED else _compiler.is_exporting())
    )


def served(x: Tensor) -> bool:
    """Whether there are kernels for x's device and torch can follow them; elsewhere the stock forward is
    faster than our reference, or the only one that can be followed."""
    if not isinstance(x, Tensor) or transformed():
        return False
    return x.is_cpu or (not x.is_meta and select(x) != "reference")


def serving(x: Tensor, *weights: Tensor) -> str:
    """The backend for tensors like x and these weights; where one has no element, the reference: kernels
    count tiles of what is there."""
    return select(x) if all(map(Tensor.numel, weights)) else "reference"


def unobserved(x: Tensor) -> bool:
    """Whether an op on x may be run without torch's dispatcher, which costs more than one row's arithmetic:
    no gradient is wanted, and nobody traces, transforms, intercepts or profiles what is computed."""
    return not _grad_enabled() and undispatched(x)


def undispatched(x: Tensor) -> bool:
    """As `unobserved`, for a call that records gradients itself."""
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not _compiler.is_compiling()
        and not _dispatch_modes()
        and not transformed()
        and not _profiled()
    )


def entry(x: Tensor, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """How an op on x is called: by its own function where `unobserved`, else as torch.ops.peftkern.<name>."""
    return function if unobserved(x) else getattr(torch.ops.peftkern, name)


def accumulation(x: Tensor) -> torch.dtype:
    """What sums over x are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """The caller has chosen the dtypes; what a backend multiplies in fp32 must not become bf16."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )
