"""What every launcher of a CUDA kernel needs: the module, the stream of a tensor's device, and the weight's
descriptor."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from .abi import address, dtype_of
from .record import unrecordable

__all__ = ["available", "machine_code", "native_cuda", "refusal", "serves", "stream_of", "weight_view"]

ABI_VERSION = 1  # of csrc/include/peftkern_cuda.h


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module(".._C_cuda", __package__)
    except ImportError as error:
        return (
            None,
            f"the CUDA kernels are not built ({error}); run: PEFTKERN_CUDA=1 pip install -e . (needs nvcc)",
        )
    if extension.abi_version != ABI_VERSION:
        return (
            None,
            f"the CUDA kernels are of another version ({extension.abi_version}, not {ABI_VERSION}); run: "
            "pip install -e .",
        )
    return extension, f"CUDA kernels for sm_{extension.architectures.replace(';', ', sm_')}"


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the module is built and this machine's driver can run it, and why not; a device is not asked
    for."""
    module, reason = _load()
    if module is None:
        return False, reason
    driver, runtime = module.versions()
    # within a major version every driver runs every runtime's code for its architecture
    if driver // 1000 < runtime // 1000:
        have = f"supports CUDA {_version(driver)}" if driver else "is missing"
        return False, f"{reason}, built with CUDA {_version(runtime)}, but the driver {have}"
    return True, reason


def machine_code(arch: int, built: str) -> bool:
    """Whether what was built for `built` ("80;86") has machine code that runs on sm_<arch>: that of an older
    or equal architecture of its major version."""
    known = [int(a.rstrip("af")) for a in built.split(";")]
    return any(a // 10 == arch // 10 and a <= arch for a in known)


def serves(arch: int, built: str) -> bool:
    """Whether code built for `built` ("80;86") runs on sm_<arch>: its machine code, or the newest's PTX from
    there on."""
    return machine_code(arch, built) or arch >= int(built.split(";")[-1].rstrip("af"))


def refusal(arch: int) -> str:
    """Why the module's code does not run on sm_<arch>; empty where it does. The module is there."""
    module = native_cuda()
    return _refusal(arch, module.architectures, *module.versions())


def _refusal(arch: int, built: str, driver: int, runtime: int) -> str:
    """A driver runs machine code of every toolkit of its major version, but it compiles no PTX that is newer
    than itself (CUDA compatibility guide, minor version compatibility)."""
    rebuild = f"run: PEFTKERN_CUDA_ARCHS={arch} pip install -e . --no-deps"
    if not serves(arch, built):
        return f"not for this sm_{arch}; {rebuild}"
    if not machine_code(arch, built) and driver < runtime:
        return (
            f"of which this sm_{arch} needs PTX of CUDA {_version(runtime)}, which a driver for CUDA "
            f"{_version(driver)} does not compile; {rebuild}"
        )
    return ""


def _version(number: int) -> str:
    """13000 as 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def native_cuda() -> ModuleType:
    """The extension module; RuntimeError with the reason where it is missing. It loads without a driver
    too."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def stream_of(x: Tensor) -> tuple[int, int]:
    """The current stream of x's device and the device's number: the last two arguments of every kernel.

    (0, -1) for a tensor of the CPU, which only the tests' emulated module takes.
    """
    unrecordable("a CUDA C++ kernel")
    if not x.is_cuda:
        return 0, -1
    return torch.cuda.current_stream(x.device).cuda_stream, x.device.index


def weight_view(weight: Tensor, quant: tuple, n: int, k: int) -> object:
    """The C descriptor of a 4-bit weight; `quant` as in the op's schema. It holds addresses only: the caller
    holds the tensors."""
    code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize, nested_blocksize = quant
    parts = (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset)
    return native_cuda().Weight(
        weight.data_ptr(), *map(address, parts), n, k, blocksize, nested_blocksize, dtype_of(None)
    )
