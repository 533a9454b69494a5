"""Which backends exist, why others do not, and which one an op takes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import native_cuda

__all__ = [
    "BACKENDS",
    "available",
    "forced",
    "gpu_arch",
    "native",
    "select",
    "served_by",
    "use_backend",
    "use_cuda_kernels",
]

BACKENDS = ("cpu", "cuda", "triton", "reference")
ABI_VERSION = 14  # of csrc/include/peftkern.h
MIN_ARCH = 75  # Turing: the oldest with tensor cores that Triton still compiles for
_forced: str | None = None


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    # torch is imported above: its OpenMP runtime must be loaded first, so that the extension shares it.
    try:
        extension = importlib.import_module(".._C", __package__)
    except ImportError as error:
        return (
            None,
            f"the native extension is not built ({error}); in the source tree, run: pip install -e . "
            "(needs a C++ compiler)",
        )
    built = getattr(extension, "abi_version", None)
    if built != ABI_VERSION:
        return (
            None,
            f"the native extension is of another version ({built}, not {ABI_VERSION}); run pip install "
            "-e . again",
        )
    return extension, f"native kernels, ISA {extension.isa()}"


def native() -> ModuleType:
    """The extension module; RuntimeError with the reason where it is missing."""
    module, reason = _load_native()
    if module is None:
        raise RuntimeError(reason)
    return module


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors too: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu_arch(index: int | None = None) -> int:
    """The compute capability of a CUDA device (None: the current one), 8.9 as 89."""
    return _arch(_device(index))


@functools.cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _device(index: int | None) -> int:
    """The number of a CUDA device; None is the current one, and 0 where there is none."""
    if index is not None:
        return index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _no_device() -> str:
    """Why there is no device for our kernels; empty where there is one. On ROCm torch calls its devices
    "cuda" too, and reports capabilities that mean nothing of NVIDIA's."""
    if torch.version.hip is not None:
        return f"this torch is built for ROCm ({torch.version.hip}), for which peftkern has no kernels"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def _triton(index: int) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; run: pip install triton"
    import triton

    found = f"Triton {triton.__version__}"
    if interpreted():
        return True, f"{found}, interpreted on the CPU (TRITON_INTERPRET=1): for tests"
    if missing := _no_device():
        return False, f"{found} is there, but {missing}"
    return _new_enough(found, index)


@functools.cache
def _cuda(index: int) -> tuple[bool, str]:
    if torch.version.hip is not None:
        return False, _no_device()
    built, reason = native_cuda.available()
    if not built:
        return False, reason
    if missing := _no_device():
        return False, f"{reason}, but {missing}"
    if refusal := native_cuda.refusal(_arch(index)):
        return False, f"{reason}, {refusal}"
    if not _triton(index)[0]:
        return False, f"{reason}, but the linear's low-rank passes need Triton: {_triton(index)[1]}"
    return _new_enough(reason, index)


def _new_enough(what: str, index: int) -> tuple[bool, str]:
    arch = _arch(index)
    return (
        arch >= MIN_ARCH,
        what if arch >= MIN_ARCH else f"{what}, but sm_{arch} is older than sm_{MIN_ARCH}",
    )


def available(name: str, index: int | None = None) -> tuple[bool, str]:
    """Whether a backend can be used here, and why (or why not); of a GPU's, whether the CUDA device `index`
    (None: the current one) can use it."""
    if name == "cpu":
        module, reason = _load_native()
        return module is not None, reason
    if name == "triton":
        return _triton(_device(index))
    if name == "cuda":
        return _cuda(_device(index))
    if name == "reference":
        return True, "plain PyTorch, any device"
    raise ValueError(f"backend: got {name!r}, expected one of {BACKENDS}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op of the process onto one backend within the block; RuntimeError where it is not
    available, of several CUDA devices on any.

    Process-wide, as autograd runs a GPU's backward in a thread of its own.
    """
    global _forced
    ok, reason = available(name)
    if not ok and not any(available(name, index)[0] for index in range(torch.cuda.device_count())):
        raise RuntimeError(f"backend {name!r}: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend of the `use_backend` block this runs in."""
    return _forced


def select(x: Tensor) -> str:
    """The backend an op takes for tensors like `x`: the forced one, else the best of x's device, else the
    reference, of which a RuntimeWarning tells once where the native extension is missing."""
    kind = x.device.type
    if _forced is not None:
        _check_forced(_forced, x.device)
        return _forced
    if kind == "cpu":
        module, reason = _load_native()
        if module is not None:
            return "cpu"
        _warn_of_reference(reason)
    return _best(x.device.index) if kind == "cuda" and x.dtype != torch.float64 else "reference"


@functools.cache
def _best(index: int) -> str:
    """Of a CUDA device."""
    return next((name for name in ("cuda", "triton") if available(name, index)[0]), "reference")


def _check_forced(name: str, device: torch.device) -> None:
    """RuntimeError where a forced backend cannot read memory of this kind of device, as a GPU's kernel would
    fault on the CPU's, or does not run on this device."""
    kind = device.type
    served = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if interpreted() else "cuda"}.get(name, kind)
    found = ""
    if kind != served and kind != "meta":
        found = f"the tensors are on {kind!r}: it serves {served!r} alone"
    elif kind == "cuda" and not (answer := available(name, device.index))[0]:
        found = f"the tensors are on {str(device)!r}: {answer[1]}"
    if found:
        raise RuntimeError(f"backend {name!r} is forced by use_backend, but {found}")


def served_by(x: Tensor) -> tuple[str, str]:
    """As `select`, and what that is in words: of the reference, also why the kernels for x's device are
    missing, where they are."""
    name = select(x)
    index, best = x.device.index, {"cpu": "cpu", "cuda": "triton"}.get(x.device.type)
    reason = available(name, index)[1]
    if name != "reference" or _forced is not None or best is None or available(best, index)[0]:
        return name, reason
    return name, f"{reason}; {available(best, index)[1]}"


@functools.cache
def _warn_of_reference(missing: str) -> None:
    text = f"peftkern: the slow reference runs (plain PyTorch), as {missing}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def use_cuda_kernels(x: Tensor) -> bool:
    """Whether a GPU's plan may take CUDA C++ kernels beside Triton's."""
    return x.device.type == "cuda" and _forced != "triton" and available("cuda", x.device.index)[0]
