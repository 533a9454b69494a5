"""Dequantization in one launch, nested absmax included: any rectangle of a 4-bit weight, written with a row
stride."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import DECODE_OPS, Launch, device_of, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import ceil_div, weight_bytes
from ..triton_nf4 import Packed, absmax_of, decode, decode_method, decode_words, group_words, load_codes

__all__ = [
    "Format",
    "Rectangle",
    "decode_call",
    "decode_rectangles",
    "decode_work",
    "decoding",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "dequantize_kernel",
    "dequantize_slice",
    "rectangle",
    "specializations",
]

# Weights of a program and its warps: two 16-byte loads a thread in flight. Not measured.
WEIGHTS, WARPS = 8192, 4
RAGGED_WEIGHTS, RAGGED_WARPS = 1024, 4
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Rectangle(NamedTuple):
    """Rows and columns of a 4-bit weight to be decoded, in one argument of a kernel. A unit is a group of
    words, all of one block, or a single weight where FORMAT.words is 0."""

    weight: Any  # `Packed`; its codes 4-byte aligned where they are read as words
    out: Any  # [rows, cols]
    out_stride: Any  # elements from a row of `out` to the next
    start: Any  # the rectangle's first unit in the weight
    row_units: Any  # units of a row of the weight
    col_units: Any  # units of a row of the rectangle
    units: Any  # of the rectangle


@dataclass(frozen=True)
class Format:
    """What a kernel that decodes rectangles is compiled for. words: of a unit, 4 or 1 of eight codes; 0: a
    unit is a weight. units: of a program. one_row: the rectangle is one run of weights. count: of rectangles
    (of a tuple with None in it Triton 3.6 takes no length)."""

    blocksize: int
    nested_blocksize: int
    words: int
    units: int
    one_row: bool
    method: str
    count: int = 1


@triton.jit
def _word_units(pid, r, FORMAT: tl.constexpr):
    """FORMAT.units units of the rectangle's, counted row by row."""
    UNITS: tl.constexpr = FORMAT.units
    WORDS: tl.constexpr = FORMAT.words
    WIDTH: tl.constexpr = 8 * FORMAT.words
    METHOD: tl.constexpr = FORMAT.method
    unit = pid * UNITS + tl.arange(0, UNITS)  # [UNITS]
    inside = unit < r.units
    row = tl.zeros_like(unit) if FORMAT.one_row else unit // r.col_units
    col = unit - row * r.col_units
    source = r.start + row * r.row_units + col
    block = source // (FORMAT.blocksize // WIDTH)
    absmax = absmax_of(block, inside, r.weight, FORMAT.nested_blocksize)  # [UNITS]
    offsets = source.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [UNITS, WORDS]
    words_ptrs = r.weight.packed.to(tl.pointer_type(tl.int32)) + offsets
    words = tl.load(words_ptrs, mask=inside[:, None], other=0)
    codes = load_codes(r.weight.code)
    values = decode_words(words, absmax[:, None], codes, r.out.dtype.element_ty, METHOD)
    values = tl.reshape(values, [UNITS, WIDTH])
    # [UNITS, WIDTH]
    target = (row.to(tl.int64) * r.out_stride + col * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(r.out + target, values, mask=inside[:, None])


@triton.jit
def _single_weights(pid, r, FORMAT: tl.constexpr):
    """FORMAT.units weights of the rectangle's, each on its own: rows may start within a byte."""
    UNITS: tl.constexpr = FORMAT.units
    index = pid.to(tl.int64) * UNITS + tl.arange(0, UNITS)  # [UNITS]
    inside = index < r.units
    row = index // r.col_units
    col = index - row * r.col_units
    source = r.start + row * r.row_units + col
    absmax = absmax_of(source // FORMAT.blocksize, inside, r.weight, FORMAT.nested_blocksize)
    byte = tl.load(r.weight.packed + source // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(source % 2 == 0, byte >> 4, byte & 15)
    values = decode(nibble, absmax, load_codes(r.weight.code), r.out.dtype.element_ty)
    tl.store(r.out + row * r.out_stride + col, values, mask=inside)


@triton.jit
def _rectangle(pid, r, FORMAT: tl.constexpr):
    if FORMAT.words == 0:
        _single_weights(pid, r, FORMAT)
    else:
        _word_units(pid, r, FORMAT)


@triton.jit
def decode_rectangles(pid, rectangles, FORMAT: tl.constexpr):
    """Rectangles of one format, one after the other by program ids."""
    COUNT: tl.constexpr = FORMAT.count
    if COUNT == 1:
        _rectangle(pid, rectangles[0], FORMAT)
    else:
        first = 0
        for i in tl.static_range(COUNT):
            programs = tl.cdiv(rectangles[i].units, FORMAT.units)
            if (pid >= first) & (pid < first + programs):
                _rectangle(pid - first, rectangles[i], FORMAT)
            first += programs


@triton.jit
def dequantize_kernel(rectangles, FORMAT: tl.constexpr):
    decode_rectangles(tl.program_id(0), rectangles, FORMAT)


@work(dequantize_kernel)
def decode_work(a: Mapping[str, Any]) -> Launch:
    """Weights decoded once: their codes, their blocks' absmax, their values."""
    form, count, reads = a["FORMAT"], 0, 0
    for r in a["rectangles"]:
        weights = r.units * max(8 * form.words, 1)
        reads += weight_bytes(weights, r.weight.absmax, form.blocksize, form.nested_blocksize)
        count += weights
    return Launch("slab", reads, nbytes([r.out for r in a["rectangles"]]), 0, DECODE_OPS * count)


def rectangle(
    packed: Tensor, quant: tuple, k: int, rows: slice, cols: slice, out: Tensor, *, arch: int | None = None
) -> tuple[Rectangle, Format]:
    """W[rows, cols] -> `out`; `quant` is the op's tuple, k the weight's width, `arch` stands in for the
    device's own."""
    *tables, blocksize, nested_blocksize = quant
    height, width = rows.stop - rows.start, cols.stop - cols.start
    start, stride = rows.start * k + cols.start, out.stride(0) if height > 1 else width
    if width == k and stride == k:  # the rectangle is one run of weights, whatever k is
        height, width, stride = 1, height * k, height * k
    words = group_words(packed, start, width, *(() if height == 1 else (k,)))
    unit, in_program = 8 * words or 1, WEIGHTS if words else RAGGED_WEIGHTS
    arch = 0 if out.is_cpu else arch or device_of(out).arch
    method = decode_method(out.dtype, arch) if words else "PORTABLE"
    found = Rectangle(
        Packed(packed, *tables), out, stride, start // unit, k // unit, width // unit, height * width // unit
    )
    return found, Format(blocksize, nested_blocksize, words, in_program // unit, height == 1, method)


def decoding(rectangles: Sequence[tuple[Rectangle, Format]]) -> tuple[int, dict[str, Any]]:
    """Programs and arguments of rectangles that share a format."""
    form = rectangles[0][1]
    assert all(other == form for _, other in rectangles)
    programs = sum(ceil_div(r.units, form.units) for r, _ in rectangles)
    form = replace(form, count=len(rectangles))
    return programs, {"rectangles": tuple(r for r, _ in rectangles), "FORMAT": form}


def decode_call(rectangles: Sequence[tuple[Rectangle, Format]]) -> Call:
    """The launch that decodes rectangles of one format."""
    programs, arguments = decoding(rectangles)
    warps = WARPS if arguments["FORMAT"].words else RAGGED_WARPS
    return Call(dequantize_kernel, programs, arguments, warps, 1)


def dequantize_slice(
    packed: Tensor, quant: tuple, n: int, k: int, rows: slice, cols: slice, out: Tensor
) -> Tensor:
    """W[rows, cols] of a weight [n, k] -> `out` [rows, cols], whose rows may lie apart; `quant` is the op's
    tuple."""
    if out.numel():
        run(decode_call([rectangle(packed, quant, k, rows, cols, out)]))
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
    """Every kind of variant: dtypes, nested and plain, the two loads and single weights."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, k = 4096, 4096
    nested = (None, meta(n * k // 64, dtype=torch.uint8), meta(256), meta(n * k // 64 // 256), meta(1))
    plain = (meta(n * k // 64), None, None, None, None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32) if arch < 80 else _DTYPES:
        for name, absmax, width, columns in (
            ("nested", nested, k, k),
            ("slice", nested, k, k // 2),
            ("plain", plain, k, k),
            ("words", nested, k + 8, k),
            ("ragged", nested, k + 1, k),
        ):
            packed, quant = meta(n * width // 2, dtype=torch.uint8), (meta(16), *absmax, 64, 256)
            out = meta(n, columns, dtype=dtype)
            part = rectangle(packed, quant, width, slice(0, n), slice(0, columns), out, arch=arch)
            title = f"dequantize-{_SHORT[dtype]}-{name}"
            wide = () if name in ("words", "ragged") else ("words_ptrs",)
            unfused = () if absmax is plain else ("absmax_value",)
            yield specialization(title, decode_call([part]), wide_loads=wide, unfused=unfused)
    many = [rectangle(packed, quant, k, slice(0, n), slice(0, k), meta(n, k, dtype=torch.float16), arch=arch)]
    yield specialization("dequantize-fp16-three", decode_call(many * 3), unfused=("absmax_value",))
