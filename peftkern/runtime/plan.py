"""The plan of a GPU op: what a call launches, found by running the op itself on tensors without storage.

On tensors of the device "meta" `launch.run` launches nothing: within `planning` it lists the launch with the
bytes and operations that its kernel states (`work`), and torch's operators are listed beside it. So the code
that runs is the only description of what runs.

Bytes are those of device memory, once each: what caches hold between launches is left out, as are tables of
at most a few hundred entries (codes, seeds).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DECODE_OPS",
    "INTERPRETED",
    "PHILOX_OPS",
    "Device",
    "Launch",
    "add",
    "device_of",
    "listed",
    "nbytes",
    "planning",
    "states",
    "work",
]

PHILOX_OPS = 12  # a draw: ten rounds of about ten instructions for eight of them
DECODE_OPS = 8  # a weight, by byte permutes into exactly scaled 16-bit values


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the bytes that it reads and writes, tensor-core FLOPs, ALU operations outside
    them.

    call: the Triton launch itself (`launch.Call`), which can be compiled; None of other kernels.
    """

    name: str
    reads: int
    writes: int
    flops: int = 0
    ops: int = 0
    call: Any = field(default=None, compare=False, repr=False)

    def beside(self, other: Launch) -> Launch:
        """Both in one launch."""
        sums = (getattr(self, key) + getattr(other, key) for key in ("reads", "writes", "flops", "ops"))
        return Launch(f"{self.name}+{other.name}", *sums)


@dataclass(frozen=True)
class Device:
    """What plans depend on: the compute capability (8.9 as 89), multiprocessors, bytes of L2.

    cuda: the CUDA C++ kernels are built; name: of the card whose tuned limits apply, empty for the table's.
    """

    arch: int
    multiprocessors: int
    l2: int
    cuda: bool = False
    name: str = ""


INTERPRETED = Device(89, 128, 72 << 20)  # the interpreter follows a 4090's plan


class _OfThread(threading.local):
    launches: list[Launch] | None = None
    device: Device | None = None


_current = _OfThread()


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    arch = 10 * found.major + found.minor
    return Device(arch, found.multi_processor_count, found.L2_cache_size, name=found.name)


def device_of(x: Tensor) -> Device:
    """The GPU that x lies on; of a tensor without storage the planned one, of a CPU's the interpreter's."""
    return _cuda_device(x.device.index) if x.is_cuda else _current.device or INTERPRETED


# A kernel's function from its arguments by name to its launch.
_work: dict[Any, Callable[[Mapping[str, Any]], Launch]] = {}


def work(*kernels: Any) -> Callable[[Callable], Callable]:
    """Decorates the function that says of a launch's arguments what these kernels move and compute."""

    def keep(function: Callable[[Mapping[str, Any]], Launch]) -> Callable:
        _work.update(dict.fromkeys(kernels, function))
        return function

    return keep


def states(kernel: Any) -> bool:
    """Whether the kernel has its `work`."""
    return kernel in _work


def nbytes(*values: Any) -> int:
    """Bytes of tensors, also within tuples and lists, whose other parts count nothing."""
    found = 0
    for value in values:
        if isinstance(value, Tensor):
            found += value.numel() * value.element_size()
        elif isinstance(value, (tuple, list)):
            found += nbytes(*value)
    return found


@contextlib.contextmanager
def planning(device: Device = INTERPRETED) -> Iterator[list[Launch]]:
    """Lists, in order, what the ops called within the block on tensors without storage launch on `device`."""
    before, launches = (_current.launches, _current.device), []
    _current.launches, _current.device = launches, device
    try:
        with _Operators(launches):
            yield launches
    finally:
        _current.launches, _current.device = before


def add(call: Any) -> None:
    """A Triton launch (`launch.Call`) on tensors without storage."""
    listed(replace(_work[call.kernel](call.arguments), call=call))


def listed(launch: Launch) -> None:
    """A launch of the plan that is being made."""
    if _current.launches is None:
        raise RuntimeError(
            f"{launch.name}: got tensors without storage, expected a GPU's; a plan is made within `planning`"
        )
    _current.launches.append(launch)


_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.addmm_)
_ALLOCATIONS = (_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided)


class _Operators(TorchDispatchMode):
    """Lists torch's operators that compute; views and allocations launch nothing."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind, views = func.overloadpacket, func.is_view
        if not views and kind not in _ALLOCATIONS and isinstance(result, Tensor):
            self.launches.append(_operator(kind, args, kwargs, result))
        return result


def _operator(kind: Any, args: tuple, kwargs: Mapping[str, Any], result: Tensor) -> Launch:
    """One launch that reads its operands and writes its result once."""
    operands = [t for t in args if isinstance(t, Tensor)]
    operands += [t for name, t in kwargs.items() if name != "out" and isinstance(t, Tensor)]
    if kind in _PRODUCTS:
        (m, depth), columns = operands[-2].shape, operands[-1].shape[1]
        return Launch("mm", nbytes(operands), nbytes(result), 2 * m * depth * columns)
    name = kind.__name__.rstrip("_").lstrip("_")
    return Launch(name, nbytes(operands), nbytes(result))
