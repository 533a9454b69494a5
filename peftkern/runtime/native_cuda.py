"""What every launcher of a CUDA kernel needs: the module, the stream of a tensor's device, and the weight's
descriptor."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .native import address, dtype_of
from .record import unrecordable

__all__ = ["available", "native_cuda", "serves", "stream_of", "weight_view"]

ABI_VERSION = 1  # of csrc/include/peftkern_cuda.h


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        from .. import _C_cuda
    except ImportError as error:
        return (
            None,
            f"the CUDA kernels are not built ({error}); run: PEFTKERN_CUDA=1 pip install -e . (needs nvcc)",
        )
    if _C_cuda.abi_version != ABI_VERSION:
        return (
            None,
            f"the CUDA kernels are of another version ({_C_cuda.abi_version}, not {ABI_VERSION}); run: "
            "pip install -e .",
        )
    return _C_cuda, f"CUDA kernels for sm_{_C_cuda.architectures.replace(';', ', sm_')}"


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
        have = f"supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "is missing"
        return (
            False,
            f"{reason}, built with CUDA {runtime // 1000}.{runtime % 1000 // 10}, but the driver {have}",
        )
    return True, reason


def serves(arch: int, built: str) -> bool:
    """Whether code built for `built` ("80;86") runs on sm_<arch>: machine code within its major version, the
    newest's PTX from there on."""
    known = [int(a.rstrip("af")) for a in built.split(";")]
    return arch >= known[-1] or any(a // 10 == arch // 10 and a <= arch for a in known)


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
