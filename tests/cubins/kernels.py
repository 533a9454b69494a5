"""Small kernels that keep or break one promise each: what the checks of this folder are checked with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import triton
import triton.language as tl

from peftkern.runtime.specialization import Specialization


@triton.jit
def _affine(value, scale, offset):
    return value * scale + offset


@triton.jit
def _copy_kernel(packed_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + offsets)  # [BLOCK]
    tl.store(out_ptr + offsets, _affine(packed.to(tl.float32), scale, 0.5))


@triton.jit
def _product_kernel(a_ptr, out_ptr, SIZE: tl.constexpr, TENSOR_CORES: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * SIZE + columns)  # [SIZE, SIZE]
    product = (
        tl.dot(a, a) if TENSOR_CORES else tl.dot(a.to(tl.float32), a.to(tl.float32), input_precision="ieee")
    )
    tl.store(out_ptr + rows * SIZE + columns, product)


def specializations(arch: int) -> Iterator[Specialization]:
    half = "*fp16" if arch < 80 else "*bf16"
    copy = Specialization(
        name="copy",
        kernel=_copy_kernel,
        signature={"packed_ptr": "*u8", "out_ptr": "*fp32", "scale": "fp32"},
        constexprs={"BLOCK": 2048},
        divisible_by_16=("packed_ptr", "out_ptr"),
        options={"enable_fp_fusion": False},
        wide_loads=("packed_ptr",),
        unfused=("_affine",),
    )
    yield copy
    yield replace(copy, name="unaligned", divisible_by_16=("out_ptr",))
    yield replace(copy, name="fused", options={"enable_fp_fusion": True})
    yield replace(copy, name="incomplete", constexprs={})
    yield replace(copy, name="twice", constexprs={"BLOCK": 2048, "scale": 1.0})
    yield replace(copy, name="indivisible", divisible_by_16=("BLOCK",))
    yield replace(copy, name="misnamed", wide_loads=("weight_ptr",))
    yield replace(copy, name="uncalled", unfused=("_scale",))
    product = Specialization(
        name="product",
        kernel=_product_kernel,
        signature={"a_ptr": half, "out_ptr": "*fp32"},
        constexprs={"SIZE": 64, "TENSOR_CORES": True},
        divisible_by_16=("a_ptr", "out_ptr"),
        expects_mma=arch >= 80,
    )
    yield product
    yield replace(product, name="no-mma", constexprs={"SIZE": 64, "TENSOR_CORES": False}, num_warps=8)
    yield replace(
        product,
        name="spilling",
        constexprs={"SIZE": 32, "TENSOR_CORES": False},
        options={"maxnreg": 24},
        expects_mma=False,
    )
