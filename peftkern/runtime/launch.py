"""A Triton launch as data: made by `run`, compiled without a GPU by way of `specialization`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import plan
from .record import launched, unwatched
from .specialization import Specialization, mapped

__all__ = ["UNSPECIALIZED", "Call", "run", "specialization"]

# Integers whose value must not make a variant of its own: such kernels have
# @triton.jit(do_not_specialize=UNSPECIALIZED).
# In a tuple Triton compiles for values whatever a kernel says: an odd number there makes one variant alone.
UNSPECIALIZED = ("M", "threshold", "first_programs")

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Call:
    """One launch of `programs` programs in one dimension, with every argument of the kernel by name. A tuple
    of several members is indexed by constants in the kernel; a named tuple is several operands in one
    argument; either may hold the other.

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
    device = next(_tensors(call.arguments.values())).device
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


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


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
        key.append(value if constant or value is None else _kind(value, specialized))
    return values, tuple(key)


def _kind(value: Any, specialized: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    if isinstance(value, tuple):
        return tuple([_kind(part, True) for part in value])
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
    """An argument's type at run time, or None, which Triton makes a constant."""
    if isinstance(part, Tensor):
        return _POINTERS[part.dtype]
    if isinstance(part, float):
        return "fp32"
    return part if part is None else "i32" if abs(part) < 2**31 else "i64"


def _type_or_one(part: Any) -> Any:
    """As `_type`; or 1, which Triton makes a constant too where it compiles for values."""
    return part if type(part) is int and part == 1 else _type(part)


def _divisible(path: Any, value: Any, specialized: bool) -> Iterator[Any]:
    """The argument, or the paths to parts of a tuple, that are multiples of 16, as tensors' addresses are."""
    if isinstance(value, tuple):
        start = path if isinstance(path, tuple) else (path,)
        for i, part in enumerate(value):
            yield from _divisible((*start, i), part, True)
    elif isinstance(value, Tensor) or (specialized and type(value) is int and value % 16 == 0):
        yield path


def specialization(name: str, call: Call, **promises: Any) -> Specialization:
    """What Triton compiles for the call, its tensors (of any device, also "meta") taken as aligned to 16
    bytes."""
    signature, constexprs, divisible = {}, {}, []
    # the interpreter's kernels have no other description
    parameters = inspect.signature(call.kernel.fn).parameters
    for key, value in call.arguments.items():
        constant, specialized = "constexpr" in str(parameters[key].annotation), key not in UNSPECIALIZED
        whole = specialized or isinstance(value, tuple)
        kind = None if constant else mapped(value, _type_or_one if whole else _type)
        if kind is None or kind == 1:
            constexprs[key] = value
        else:
            signature[key] = kind
            divisible += _divisible(key, value, specialized)
    stages = {"num_warps": call.num_warps, "num_stages": call.num_stages, "divisible_by_16": tuple(divisible)}
    return Specialization(
        name, call.kernel, signature, constexprs, **stages, options=call.options, **promises
    )
