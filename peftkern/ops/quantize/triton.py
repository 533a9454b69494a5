"""Blockwise quantization in one launch: to 4 bits, packed, and of the absmax to 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.specialization import Specialization
from ..triton_numerics import to_fp32

__all__ = ["_quantize_tile", "quantize_4bit", "quantize_absmax", "specializations"]

VALUES, VALUES_8BIT, WARPS = 4096, 2048, 4  # of a program; at least one block. Not measured.


@triton.jit
def _nearest(scaled, thresholds_ptr, order_ptr, BITS: tl.constexpr):
    """int32 index of the nearest of 2**BITS codes: a tie goes to the lower code, NaN to index 0.

    thresholds: the midpoints of the sorted codes, [2**BITS - 1]; order: the index of each of them, [2**BITS].
    """
    rank = tl.zeros_like(scaled).to(tl.int32)  # thresholds below the value, found by halving
    for bit in tl.static_range(BITS):
        candidate = rank + (1 << (BITS - 1 - bit))
        rank = tl.where(scaled > tl.load(thresholds_ptr + candidate - 1), candidate, rank)
    return tl.where(scaled == scaled, tl.load(order_ptr + rank), 0)


@triton.jit
def _quantize_tile(
    pid,
    values_ptr,  # [numel], any float
    thresholds_ptr,  # fp32 [2**BITS - 1]
    order_ptr,  # int32 [2**BITS]
    out_ptr,  # uint8: [(numel + 1) / 2] where BITS is 4, [numel] where it is 8
    absmax_ptr,  # fp32 [ceil(numel / BLOCKSIZE)]
    numel,
    out_bytes,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
):
    """BLOCKS blocks: their absmax and the index of the code nearest to value * (1 / absmax)."""
    block = pid.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    inside = index < numel
    values = to_fp32(tl.load(values_ptr + index, mask=inside, other=0.0))
    absmax = tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=1)  # [BLOCKS]
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)
    inverse = tl.where(absmax > 0, tl.div_rn(1.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)
    # What is past the end counts as 0, which an infinite inverse would make NaN.
    codes = _nearest(tl.where(inside, values * inverse[:, None], 0.0), thresholds_ptr, order_ptr, BITS)
    if BITS == 8:
        tl.store(out_ptr + index, codes.to(tl.uint8), mask=inside)
    else:
        first, second = tl.split(tl.reshape(codes, [BLOCKS, BLOCKSIZE // 2, 2]))
        byte = (
            block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
        )  # [BLOCKS, BLOCKSIZE / 2]
        tl.store(out_ptr + byte, (first << 4 | second).to(tl.uint8), mask=byte < out_bytes)


@triton.jit
def _quantize_kernel(
    values_ptr,
    thresholds_ptr,
    order_ptr,
    out_ptr,
    absmax_ptr,
    numel,
    out_bytes,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
):
    pid = tl.program_id(0)
    _quantize_tile(
        pid,
        values_ptr,
        thresholds_ptr,
        order_ptr,
        out_ptr,
        absmax_ptr,
        numel,
        out_bytes,
        BLOCKSIZE,
        BLOCKS,
        BITS,
    )


def _quantize(values: Tensor, code: Tensor, blocksize: int, out: Tensor) -> Tensor:
    """Fills `out` with the indices, returns the absmax."""
    values, numel = values.contiguous(), values.numel()
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=values.device)
    if numel == 0:
        return absmax
    ordered, order = torch.sort(code, stable=True)
    thresholds = (ordered[:-1] + ordered[1:]) / 2
    bits = code.numel().bit_length() - 1
    blocks = max(1, (VALUES if bits == 4 else VALUES_8BIT) // blocksize)
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        grid = (-(-absmax.numel() // blocks),)
        constants = {"BLOCKSIZE": blocksize, "BLOCKS": blocks, "BITS": bits}
        _quantize_kernel[grid](
            values,
            thresholds,
            order.int(),
            out,
            absmax,
            numel,
            out.numel(),
            **constants,
            num_warps=WARPS,
            num_stages=1,
        )
    return absmax


def quantize_4bit(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    packed = torch.empty(((w.numel() + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    return packed, _quantize(w, code, blocksize, packed)


def quantize_absmax(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """As the reference."""
    out = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    return out, _quantize(absmax, absmax_code, blocksize, out)


def specializations(arch: int) -> Iterator[Specialization]:
    """4 bits from each dtype, the longest blocks, and the absmax's 8 bits."""
    rows = [("fp16", 64, 4), ("bf16", 64, 4)] if arch < 80 else [("bf16", 64, 4), ("fp16", 64, 4)]
    for short, blocksize, bits in (*rows, ("fp32", 64, 4), ("bf16", 4096, 4), ("fp32", 256, 8)):
        yield Specialization(
            name=f"quantize-{bits}bit-{short}-{blocksize}",
            kernel=_quantize_kernel,
            signature={
                "values_ptr": f"*{short}",
                "thresholds_ptr": "*fp32",
                "order_ptr": "*i32",
                "out_ptr": "*u8",
                "absmax_ptr": "*fp32",
                "numel": "i32",
                "out_bytes": "i32",
            },
            constexprs={
                "BLOCKSIZE": blocksize,
                "BLOCKS": max(1, (VALUES if bits == 4 else VALUES_8BIT) // blocksize),
                "BITS": bits,
            },
            num_warps=WARPS,
            divisible_by_16=(
                "values_ptr",
                "thresholds_ptr",
                "order_ptr",
                "out_ptr",
                "absmax_ptr",
                "numel",
                "out_bytes",
            ),
            wide_loads=("values_ptr",),
        )
