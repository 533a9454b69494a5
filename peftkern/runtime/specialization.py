"""What a Triton kernel is compiled with, as data: the launchers' variants can then be compiled and inspected
without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Specialization", "mapped"]


@dataclass(frozen=True, eq=False)
class Specialization:
    """One variant of a kernel as one of our launchers compiles it, and what its machine code must look like.

    A module `triton*.py` under peftkern/ops, of a kernel or beside its module, has

        def specializations(arch: int) -> Iterable[Specialization]

    which yields every variant that its launchers use on sm_<arch> (75, 80, 86, 89, 90, 100, 120; others: the
    nearest), built from the same config functions as the launch. The first one yielded for a kernel is its
    main one: the quick tests compile only that, so it is the largest tile on the commonest dtypes (bf16).
    tests/cubins compiles them (`python -m tests.cubins.table --help`).

        Specialization(
            name="dequantize-bf16-nested",
            kernel=_dequantize_kernel,
            signature={"packed_ptr": "*u8", "absmax_ptr": "*u8", "out_ptr": "*bf16", "numel": "i64"},
            constexprs={"bias_ptr": None, "NESTED": True, "BLOCK": 2048},
            num_warps=8,
            num_stages=1,
            divisible_by_16=("packed_ptr", "out_ptr", "numel"),
            wide_loads=("packed_ptr",),
            unfused=("nested_absmax",),
        )

    name: unique in its module; letters, digits and dashes.
    kernel: the `@triton.jit` function.
    signature: type of each argument that is passed at run time ("*bf16", "*fp16", "*fp32", "*u8", "*i64",
        "i32", "i64", "fp32"); of a tuple a tuple of its members' types, named and nested as it is, where None
        or 1 stands for a member that Triton makes a constant.
    constexprs: every other argument: the tl.constexpr ones, and None for a pointer that is not given (Triton
        makes those constants, as it does with an integer that equals 1). Each argument of the kernel is in
        exactly one of the two; the order does not matter.
    divisible_by_16: arguments, or (argument, index, ...) within a tuple, that Triton finds divisible by 16 at
        the launch: pointers that are aligned to 16 bytes (all of torch's own tensors, not every slice of one)
        and integers such as K that are a multiple of 16. Without it no load is 16 bytes wide.
    options: what else goes into the launch (`enable_fp_fusion`, `maxnreg`, ...).
    expects_mma: the kernel has a product that must run on tensor cores. Triton uses none on sm_75 (3.6 and
        3.9 lower tl.dot to FFMA there): say `arch >= 80`.
    wide_loads: pointers, by the name they have on the source line of their `tl.load(...)`, whose global loads
        must all be 16 bytes wide; at least one of them must be loaded.
    unfused: names of `@triton.jit` device functions on whose source lines no multiplication may have been
        fused with an addition.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible_by_16: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    expects_mma: bool = False
    wide_loads: tuple[str, ...] = ()
    unfused: tuple[str, ...] = ()


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with what is not a tuple in it changed; tuples, named ones too, keep their kind."""
    if not isinstance(value, tuple):
        return change(value)
    parts = [mapped(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
