"""A Triton launch as data: made by `run`, compiled without a GPU by way of `specialization`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .specialization import Specialization

__all__ = ["UNSPECIALIZED", "Call", "run", "specialization"]

# Integers whose value must not make a variant of its own: such kernels have @triton.jit(do_not_specialize=UNSPECIALIZED).
UNSPECIALIZED = ("M", "threshold", "first_programs", "chunks0", "chunks1", "chunks2")

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Call:
    """One launch of `programs` programs in one dimension, with every argument of the kernel by name; a tuple is an argument for several
    members of a group, indexed by constants in the kernel.

    max_registers: a thread may have; left to itself ptxas may spill a few for the sake of one more block an SM.
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


def run(call: Call) -> None:
    """Launches on the current stream of the tensors' device."""
    flat = (part for v in call.arguments.values() for part in (v if isinstance(v, tuple) else (v,)))
    device = next(part.device for part in flat if isinstance(part, Tensor))
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, **call.options}
    if device.type != "cuda":
        call.kernel[(call.programs,)](**call.arguments, **options)
        return
    with torch.cuda.device(device):
        call.kernel[(call.programs,)](**call.arguments, **options)


def _type(part: Any) -> Any:
    """Of a tuple's member: its type at run time, or the constant itself."""
    if isinstance(part, Tensor):
        return _POINTERS[part.dtype]
    if isinstance(part, float):
        return "fp32"
    return part if part is None or part == 1 else "i32" if abs(part) < 2**31 else "i64"


def specialization(name: str, call: Call, **promises: Any) -> Specialization:
    """What Triton compiles for the call, its tensors (of any device, also "meta") taken as aligned to 16 bytes."""
    signature, constexprs, divisible = {}, {}, []
    parameters = inspect.signature(call.kernel.fn).parameters  # the interpreter's kernels have no other description
    for key, value in call.arguments.items():
        constant = "constexpr" in str(parameters[key].annotation) or value is None
        if constant or (type(value) is int and value == 1 and key not in UNSPECIALIZED):
            constexprs[key] = value
        elif isinstance(value, tuple):
            signature[key] = tuple(_type(part) for part in value)
            divisible += [(key, i) for i, part in enumerate(value) if isinstance(part, Tensor) or (type(part) is int and part % 16 == 0)]
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
    return Specialization(name, call.kernel, signature, constexprs, **stages, options=call.options, **promises)
