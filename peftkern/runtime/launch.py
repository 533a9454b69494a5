"""A Triton launch as data: made by `run`, compiled without a GPU by way of `specialization`."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import plan
from .record import launched, unwatched
from .specialization import Specialization

__all__ = ["UNSPECIALIZED", "Call", "run", "specialization"]

# Integers whose value must not make a variant of its own: such kernels have
# @triton.jit(do_not_specialize=UNSPECIALIZED).
UNSPECIALIZED = ("M", "threshold", "first_programs", "chunks0", "chunks1", "chunks2")

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Call:
    """One launch of `programs` programs in one dimension, with every argument of the kernel by name; a tuple
    is an argument for several members of a group, indexed by constants in the kernel.

    max_registers: a thread may have; left to itself ptxas may spill a few for the sake of one more block an
    SM.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What goes into the launch beside warps and stages."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}

    def interpret(self, arguments: dict[str, Any]) -> None:
        """Launches the kernel with these arguments through Triton itself, which may interpret it."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        self.kernel[(self.programs,)](**arguments, **options)


def run(call: Call) -> None:
    """Launches on the current stream of the tensors' device; a launch on tensors without storage is only
    listed, in the plan that is being made."""
    flat = (part for v in call.arguments.values() for part in (v if isinstance(v, tuple) else (v,)))
    device = next(part.device for part in flat if isinstance(part, Tensor))
    if device.type == "meta":
        plan.add(call)
    elif device.type != "cuda":
        with unwatched():
            call.interpret(call.arguments)
        launched(call, None, None)
    elif device.index == torch.cuda.current_device():
        _launch(call, device.index)
    else:
        with torch.cuda.device(device):
            _launch(call, device.index)


# Compiled kernels by what they were compiled for: Triton finds them too, but takes longer over thirty
# arguments.
_compiled: dict[tuple, Any] = {}


def _launch(call: Call, device: int) -> None:
    """On the current device, whose number is `device`."""
    values, key = _bind(call, device)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(call.programs, 1, 1)](*values)
        launched(call, compiled, values)
        return
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, **call.options}
    # Triton returns what it launched. A kernel that it interprets, or one under a debugger's hooks, returns
    # nothing.
    with unwatched():
        compiled = call.kernel[(call.programs,)](**call.arguments, **options)
    if hasattr(compiled, "run"):
        _compiled[key] = compiled
        launched(call, compiled, values)
    else:
        launched(call, None, None)


def _bind(call: Call, device: int) -> tuple[list[Any], tuple]:
    """The arguments in the kernel's order, and all that its machine code depends on: of tensors the dtype and
    whether they are aligned to 16 bytes, of integers whether they are 1, multiples of 16 and 32 bits wide, of
    constants the value."""
    values, key = [], [call.kernel, device, call.num_warps, call.num_stages, call.max_registers]
    for name, constant, specialized in _parameters(call.kernel):
        value = call.arguments[name]
        values.append(value)
        if constant or value is None:
            key.append(value)
        elif isinstance(value, tuple):
            key.append(tuple(_kind(part, specialized) for part in value))
        else:
            key.append(_kind(value, specialized))
    return values, tuple(key)


def _kind(value: Any, specialized: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    if type(value) is int:
        if specialized and (value == 1 or value % 16 == 0):
            return (value == 1, -(1 << 31) <= value < 1 << 31)
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return type(value)


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, bool, bool], ...]:
    """Of each argument of a kernel: its name, whether it is a constant, and whether Triton compiles for its
    value."""
    return tuple((p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params)


def _type(part: Any) -> Any:
    """Of a tuple's member: its type at run time, or the constant itself."""
    if isinstance(part, Tensor):
        return _POINTERS[part.dtype]
    if isinstance(part, float):
        return "fp32"
    return part if part is None or part == 1 else "i32" if abs(part) < 2**31 else "i64"


def specialization(name: str, call: Call, **promises: Any) -> Specialization:
    """What Triton compiles for the call, its tensors (of any device, also "meta") taken as aligned to 16
    bytes."""
    signature, constexprs, divisible = {}, {}, []
    # the interpreter's kernels have no other description
    parameters = inspect.signature(call.kernel.fn).parameters
    for key, value in call.arguments.items():
        constant = "constexpr" in str(parameters[key].annotation) or value is None
        if constant or (type(value) is int and value == 1 and key not in UNSPECIALIZED):
            constexprs[key] = value
        elif isinstance(value, tuple):
            signature[key] = tuple(_type(part) for part in value)
            divisible += [
                (key, i)
                for i, part in enumerate(value)
                if isinstance(part, Tensor) or (type(part) is int and part % 16 == 0)
            ]
        elif isinstance(value, Tensor):
            signature[key] = _POINTERS[value.dtype]
            divisible.append(key)
        elif isinstance(value, float):
            signature[key] = "fp32"
        else:
            signature[key] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and key not in UNSPECIALIZED:
                divisible.append(key)
    stages = {"num_warps": call.num_warps, "num_stages": call.num_stages, "divisible_by_16": tuple(divisible)}
    return Specialization(
        name, call.kernel, signature, constexprs, **stages, options=call.options, **promises
    )
