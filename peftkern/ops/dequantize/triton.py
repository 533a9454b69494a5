"""Dequantization in one launch, nested absmax included: any rectangle of a 4-bit weight, written with a row
stride."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run
from ...runtime.plan import DECODE_OPS, Launch, device_of, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import weight_bytes
from ..triton_nf4 import absmax_of, decode, decode_method, decode_words, group_words, load_codes
from ..triton_nf4 import absmax_value as absmax_value  # tests/cubins finds it here by name

__all__ = [
    "dequantize_ragged_tile",
    "dequantize_tile",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "decode_work",
    "dequantize_slice",
    "specializations",
    "tiles",
]

# Weights of a program and its warps: two 16-byte loads a thread in flight. Not measured.
WEIGHTS, WARPS = 8192, 4
RAGGED_WEIGHTS, RAGGED_WARPS = 1024, 4


@triton.jit
def dequantize_tile(
    pid,
    packed_ptr,  # uint8, 4-byte aligned, read as words of eight codes
    code_ptr,  # fp32 [16]
    absmax_ptr,  # fp32 [blocks], or None where it is nested:
    absmax_8bit_ptr,  # uint8 [blocks]
    absmax_code_ptr,  # fp32 [256]
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]
    absmax_offset_ptr,  # fp32 [1]
    out_ptr,  # [rows, cols]
    out_stride,  # elements from a row of `out` to the next
    start,  # the rectangle's first group in the weight; a group is WORDS words, all of one block
    row_groups,  # groups of a row of the weight
    col_groups,  # groups of a row of the rectangle
    groups,  # of the rectangle
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_ROW: tl.constexpr,  # the rectangle is one run of weights
    METHOD: tl.constexpr,
):
    """GROUPS groups of the rectangle's, counted row by row."""
    WIDTH: tl.constexpr = 8 * WORDS
    group = pid * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    inside = group < groups
    row = tl.zeros_like(group) if ONE_ROW else group // col_groups
    col = group - row * col_groups
    source = start + row * row_groups + col
    absmax = absmax_of(  # [GROUPS]
        source // (BLOCKSIZE // WIDTH),
        inside,
        absmax_ptr,
        absmax_8bit_ptr,
        absmax_code_ptr,
        nested_absmax_ptr,
        absmax_offset_ptr,
        NESTED_BLOCKSIZE,
    )
    offsets = source.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [GROUPS, WORDS]
    words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + offsets, mask=inside[:, None], other=0)
    values = decode_words(words, absmax[:, None], load_codes(code_ptr), out_ptr.dtype.element_ty, METHOD)
    values = tl.reshape(values, [GROUPS, WIDTH])
    target = (row.to(tl.int64) * out_stride + col * WIDTH)[:, None] + tl.arange(0, WIDTH)[
        None, :
    ]  # [GROUPS, WIDTH]
    tl.store(out_ptr + target, values, mask=inside[:, None])


@triton.jit
def dequantize_ragged_tile(
    pid,
    packed_ptr,  # uint8, any alignment; the rest as above, in weights in place of groups
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    out_ptr,
    out_stride,
    start,
    row_weights,
    col_weights,
    weights,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK weights of the rectangle's, each on its own: rows may start within a byte."""
    index = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = index < weights
    row = index // col_weights
    col = index - row * col_weights
    source = start + row * row_weights + col
    absmax = absmax_of(
        source // BLOCKSIZE,
        inside,
        absmax_ptr,
        absmax_8bit_ptr,
        absmax_code_ptr,
        nested_absmax_ptr,
        absmax_offset_ptr,
        NESTED_BLOCKSIZE,
    )
    byte = tl.load(packed_ptr + source // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(source % 2 == 0, byte >> 4, byte & 15)
    tl.store(
        out_ptr + row * out_stride + col,
        decode(nibble, absmax, load_codes(code_ptr), out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    out_ptr,
    out_stride,
    start,
    row_units,
    col_units,
    units,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,  # of a group; 0: units are single weights
    UNITS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    METHOD: tl.constexpr,
):
    if WORDS == 0:
        dequantize_ragged_tile(
            tl.program_id(0),
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
            out_ptr,
            out_stride,
            start,
            row_units,
            col_units,
            units,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            UNITS,
        )
    else:
        dequantize_tile(
            tl.program_id(0),
            packed_ptr,
            code_ptr,
            absmax_ptr,
            absmax_8bit_ptr,
            absmax_code_ptr,
            nested_absmax_ptr,
            absmax_offset_ptr,
            out_ptr,
            out_stride,
            start,
            row_units,
            col_units,
            units,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            WORDS,
            UNITS,
            ONE_ROW,
            METHOD,
        )


@work(_dequantize_kernel)
def _dequantize_work(a: Mapping[str, Any]) -> Launch:
    return decode_work(a, a["out_ptr"])


def decode_work(a: Mapping[str, Any], out: Tensor) -> Launch:
    """Weights decoded into `out` once: their codes, their blocks' absmax, their values."""
    count = a["units"] * max(8 * a["WORDS"], 1)
    reads = weight_bytes(count, a["absmax_ptr"], a["BLOCKSIZE"], a["NESTED_BLOCKSIZE"])
    return Launch("slab", reads, nbytes(out), 0, DECODE_OPS * count)


def tiles(
    packed: Tensor, quant: tuple, k: int, rows: slice, cols: slice, out: Tensor, *, arch: int | None = None
) -> tuple[int, dict[str, object]]:
    """Programs and arguments of `_dequantize_kernel` for W[rows, cols] -> `out`; `quant` is the op's tuple, k
    the weight's width, `arch` stands in for the device's own."""
    code, *absmax, blocksize, nested_blocksize = quant
    height, width = rows.stop - rows.start, cols.stop - cols.start
    start, stride = rows.start * k + cols.start, out.stride(0) if height > 1 else width
    if width == k and stride == k:  # the rectangle is one run of weights, whatever k is
        height, width, stride = 1, height * k, height * k
    words = group_words(packed, start, width, *(() if height == 1 else (k,)))
    unit, in_program = 8 * words or 1, WEIGHTS if words else RAGGED_WEIGHTS
    units = height * width // unit
    names = ("absmax_ptr", "absmax_8bit_ptr", "absmax_code_ptr", "nested_absmax_ptr", "absmax_offset_ptr")
    arguments = {
        "packed_ptr": packed,
        "code_ptr": code,
        **dict(zip(names, absmax, strict=True)),
        "out_ptr": out,
    }
    sizes = {
        "out_stride": stride,
        "start": start // unit,
        "row_units": k // unit,
        "col_units": width // unit,
        "units": units,
    }
    method = (
        decode_method(out.dtype, arch or (0 if out.is_cpu else device_of(out).arch)) if words else "PORTABLE"
    )
    constants = {
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": nested_blocksize,
        "WORDS": words,
        "UNITS": in_program // unit,
    }
    constants |= {"ONE_ROW": height == 1, "METHOD": method}
    return -(-units * unit // in_program), arguments | sizes | constants


def dequantize_slice(
    packed: Tensor, quant: tuple, n: int, k: int, rows: slice, cols: slice, out: Tensor
) -> Tensor:
    """W[rows, cols] of a weight [n, k] -> `out` [rows, cols], whose rows may lie apart; `quant` is the op's
    tuple."""
    programs, arguments = tiles(packed, quant, k, rows, cols, out)
    if programs:
        run(Call(_dequantize_kernel, programs, arguments, WARPS if arguments["WORDS"] else RAGGED_WARPS, 1))
    return out


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor | None,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    nested_absmax: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    dequantize_4bit_out(
        packed,
        code,
        absmax,
        absmax_8bit,
        absmax_code,
        nested_absmax,
        absmax_offset,
        blocksize,
        nested_blocksize,
        out,
    )
    return out


def dequantize_4bit_out(packed: Tensor, *quant_and_out: object) -> None:
    """As the reference."""
    *quant, out = quant_and_out
    numel = out.numel()
    dequantize_slice(packed, tuple(quant), 1, numel, slice(0, 1), slice(0, numel), out.view(1, numel))


def specializations(arch: int) -> Iterator[Specialization]:
    """Every kind of variant: dtypes, nested and plain, the two loads and the ragged kernel."""
    pointers = {
        "absmax_8bit_ptr": "*u8",
        "absmax_code_ptr": "*fp32",
        "nested_absmax_ptr": "*fp32",
        "absmax_offset_ptr": "*fp32",
    }
    sizes = dict.fromkeys(("out_stride", "start", "row_units", "col_units", "units"), "i32")
    constants = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256}
    for dtype in (
        (torch.float16, torch.bfloat16, torch.float32)
        if arch < 80
        else (torch.bfloat16, torch.float16, torch.float32)
    ):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        rest = {"ONE_ROW": True, "METHOD": decode_method(dtype, arch)}
        nested = Specialization(
            name=f"dequantize-{short}-nested",
            kernel=_dequantize_kernel,
            signature={"packed_ptr": "*u8", "code_ptr": "*fp32", **pointers, "out_ptr": f"*{short}", **sizes},
            constexprs={"absmax_ptr": None, **constants, "WORDS": 4, "UNITS": WEIGHTS // 32, **rest},
            num_warps=WARPS,
            divisible_by_16=("packed_ptr", "code_ptr", *pointers, "out_ptr", "out_stride"),
            wide_loads=("packed_ptr",),
            unfused=("absmax_value",),
        )
        yield nested
        plain = {
            "packed_ptr": "*u8",
            "code_ptr": "*fp32",
            "absmax_ptr": "*fp32",
            "out_ptr": f"*{short}",
            **sizes,
        }
        slab = {"absmax_ptr": None, **constants, "WORDS": 4, "UNITS": WEIGHTS // 32, **rest, "ONE_ROW": False}
        yield replace(nested, name=f"dequantize-{short}-slice", constexprs=slab)
        yield replace(
            nested,
            name=f"dequantize-{short}-plain",
            signature=plain,
            constexprs={**dict.fromkeys(pointers), **constants, "WORDS": 4, "UNITS": WEIGHTS // 32, **rest},
            divisible_by_16=("packed_ptr", "code_ptr", "absmax_ptr", "out_ptr", "out_stride"),
        )
        single = {"absmax_ptr": None, **constants, "WORDS": 1, "UNITS": WEIGHTS // 8, **rest}
        yield replace(nested, name=f"dequantize-{short}-words", constexprs=single, wide_loads=())
        ragged = {
            "absmax_ptr": None,
            **constants,
            "WORDS": 0,
            "UNITS": RAGGED_WEIGHTS,
            "ONE_ROW": False,
            "METHOD": "PORTABLE",
        }
        yield replace(
            nested,
            name=f"dequantize-{short}-ragged",
            constexprs=ragged,
            num_warps=RAGGED_WARPS,
            wide_loads=(),
        )
