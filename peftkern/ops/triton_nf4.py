"""The 4-bit formats as Triton device functions: the absmax of blocks, and packed codes -> T(fp32(code) *
fp32(absmax)), one rounding.

Two ways that give the same bits. PORTABLE selects fp32 codes one by one and multiplies: any dtype, any
device, the interpreter. PRMT works
on words of eight codes in inline PTX: a block's 16 products are rounded once (which is exact: a block has one
absmax), split into a table of low and one of high bytes, and looked up by byte permutes. Instructions,
counted from the sequences below: 32 a table and 22 a word, 3.8 a weight with four words a table and 6.8 with
one. PORTABLE takes about 20 (1280 in a cubin for 64 weights, all included).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_numerics import INTERPRETED, round_to

__all__ = [
    "LOOKUP",
    "TABLE",
    "Packed",
    "absmax_of",
    "absmax_parts",
    "absmax_value",
    "load_codes",
    "decode",
    "decode_words",
    "decode_method",
    "group_words",
    "to_ptx",
]

# One instruction is (operation, destination, sources...); operands are registers by name, or integers.
# tests/triton/test_decode_ptx.py
# runs these very tables in numpy. "pair" rounds (low, high) into one register.
Instruction = tuple[str | int, ...]
TABLE: tuple[Instruction, ...] = (
    *(("mul", f"v{i}", f"code{i}", "absmax") for i in range(16)),
    *(("pair", f"p{i}", f"v{2 * i}", f"v{2 * i + 1}") for i in range(8)),
    *(("prmt", f"low{i}", f"p{2 * i}", f"p{2 * i + 1}", 0x6420) for i in range(4)),
    *(("prmt", f"high{i}", f"p{2 * i}", f"p{2 * i + 1}", 0x7531) for i in range(4)),
)


def _lookup_half(half: int) -> tuple[Instruction, ...]:
    """Four codes, one a nibble of the selectors' low 16 bits -> two registers of two values."""
    lookups = []
    for plane in ("low", "high"):
        lookups += [
            (
                "prmt",
                f"{plane}_a{half}",
                f"{plane}0",
                f"{plane}1",
                f"index{half}",
            ),  # codes 0 ... 7, by their low three bits
            ("prmt", f"{plane}_b{half}", f"{plane}2", f"{plane}3", f"index{half}"),  # codes 8 ... 15
            (
                "prmt",
                f"{plane}_c{half}",
                f"{plane}_a{half}",
                f"{plane}_b{half}",
                f"pick{half}",
            ),  # one of the two, by the top bit
        ]
    # A byte's high nibble is its first element: nibbles 1, 0, 3, 2 in the order of elements.
    return (
        *lookups,
        ("prmt", f"out{2 * half}", f"low_c{half}", f"high_c{half}", 0x4051),
        ("prmt", f"out{2 * half + 1}", f"low_c{half}", f"high_c{half}", 0x6273),
    )


LOOKUP: tuple[Instruction, ...] = (
    ("and", "index0", "word", 0x77777777),
    ("shr", "index1", "index0", 16),
    ("shr", "top", "word", 1),
    ("and", "top4", "top", 0x44444444),
    ("or", "pick0", "top4", 0x32103210),
    ("shr", "pick1", "pick0", 16),
    *_lookup_half(0),
    *_lookup_half(1),
)
_PTX = {
    "mul": "mul.rn.f32 {0}, {1}, {2};",
    "prmt": "prmt.b32 {0}, {1}, {2}, {3};",
    "and": "and.b32 {0}, {1}, {2};",
    "or": "or.b32 {0}, {1}, {2};",
    "shr": "shr.u32 {0}, {1}, {2};",
    "pair_bf16": "cvt.rn.bf16x2.f32 {0}, {2}, {1};",
    "pair_fp16": "cvt.rn.f16x2.f32 {0}, {2}, {1};",
    # sm_75 rounds one value at a time.
    "pair_fp16_sm75": "{{ .reg .b16 lo, hi; cvt.rn.f16.f32 lo, {1}; cvt.rn.f16.f32 hi, {2}; "
    "mov.b32 {0}, {{lo, hi}}; }}",
}


def to_ptx(
    instructions: tuple[Instruction, ...],
    inputs: list[str],
    outputs: list[str],
    pair: str = "",
    tail: str = "",
) -> str:
    """A PTX block for inline assembly: `outputs` are the operands $0 ..., `inputs` those after them; `tail`
    comes last, as it is."""
    operands = {name: f"${i}" for i, name in enumerate([*outputs, *inputs])}
    scratch = {i[1]: "f32" if i[0] == "mul" else "b32" for i in instructions if i[1] not in operands}
    lines = [f".reg .{kind} {name};" for name, kind in scratch.items()]
    for operation, *arguments in instructions:
        template = _PTX[f"pair_{pair}" if operation == "pair" else operation]
        lines.append(
            template.format(*(operands.get(a, a) if isinstance(a, str) else f"0x{a:x}" for a in arguments))
        )
    return "{\n" + "\n".join(lines) + f"\n{tail}}}"


_PLANES = [f"{plane}{i}" for plane in ("low", "high") for i in range(4)]
_TABLE_INPUTS = ["absmax", *(f"code{i}" for i in range(16))]
_TABLE_BF16 = tl.constexpr(to_ptx(TABLE, _TABLE_INPUTS, _PLANES, "bf16"))
_TABLE_FP16 = tl.constexpr(to_ptx(TABLE, _TABLE_INPUTS, _PLANES, "fp16"))
_TABLE_FP16_SM75 = tl.constexpr(to_ptx(TABLE, _TABLE_INPUTS, _PLANES, "fp16_sm75"))
_TABLE_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["f"] * 17))
# Eight 16-bit results: operands $0 ... $7, the word $8, the table $9 ... $16.
_UNPACK = "\n".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, out{i};" for i in range(4))
_LOOKUP = tl.constexpr(to_ptx(LOOKUP, ["word", *_PLANES], [f"e{i}" for i in range(8)], tail=_UNPACK))
_LOOKUP_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 8 + ["r"] * 9))


def decode_method(dtype: torch.dtype, arch: int) -> str:
    """PORTABLE or PRMT[_SM75] for values of `dtype` on sm_<arch>; 0 is the interpreter."""
    if arch == 0 or dtype == torch.float32 or (arch < 80 and dtype == torch.bfloat16):
        return "PORTABLE"
    return "PRMT" if arch >= 80 else "PRMT_SM75"


def group_words(packed: Tensor, *sizes: int) -> int:
    """Words of eight codes that always lie in one block when everything starts at, and has, a multiple of
    `sizes` elements: 4, 1, or 0.

    Four are a 16-byte load and 32 weights, the smallest block.
    """
    return next(
        (
            words
            for words in (4, 1)
            if packed.data_ptr() % 4 == 0 and all(size % (8 * words) == 0 for size in sizes)
        ),
        0,
    )


class Packed(NamedTuple):
    """A 4-bit weight as kernels take it, in one argument; of the last five, those of its kind of absmax."""

    packed: Any  # uint8 [N K / 2]
    code: Any  # fp32 [16]
    absmax: Any  # fp32 [blocks], or None where it is nested:
    absmax_8bit: Any  # uint8 [blocks]
    absmax_code: Any  # fp32 [256]
    nested_absmax: Any  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)]
    absmax_offset: Any  # fp32 [1]


@triton.jit
def absmax_parts(block, mask, weight, NESTED_BLOCKSIZE: tl.constexpr):
    """What `absmax_value` makes a block's absmax of: the loads that depend on none, to be asked for ahead.
    weight: `Packed`."""
    other = None if mask is None else 0
    if weight.absmax is not None:
        parts = tl.load(weight.absmax + block, mask=mask, other=other), 0.0
    else:
        index = tl.load(weight.absmax_8bit + block, mask=mask, other=other)
        parts = index, tl.load(weight.nested_absmax + block // NESTED_BLOCKSIZE, mask=mask, other=other)
    return parts


@triton.jit
def absmax_value(parts, weight):
    """fp32 absmax; a nested one is code * scale, rounded, + offset, rounded."""
    if weight.absmax is not None:
        absmax = parts[0]
    else:
        code, offset = tl.load(weight.absmax_code + parts[0].to(tl.int32)), tl.load(weight.absmax_offset)
        if INTERPRETED:
            absmax = code * parts[1] + offset
        else:  # an explicit .rn keeps ptxas from fusing the two, and LLVM does not look into assembly
            absmax = tl.inline_asm_elementwise(
                "{ .reg .f32 product; mul.rn.f32 product, $1, $2; add.rn.f32 $0, product, $3; }",
                "=f,f,f,f",
                [code, parts[1], offset],
                tl.float32,
                is_pure=True,
                pack=1,
            )
    return absmax


@triton.jit
def absmax_of(block, mask, weight, NESTED_BLOCKSIZE: tl.constexpr):
    """fp32 absmax of blocks, in `block`'s shape."""
    return absmax_value(absmax_parts(block, mask, weight, NESTED_BLOCKSIZE), weight)


@triton.jit
def load_codes(code_ptr):
    """The 16 fp32 codes as scalars."""
    c0, c1, c2, c3 = tl.load(code_ptr), tl.load(code_ptr + 1), tl.load(code_ptr + 2), tl.load(code_ptr + 3)
    c4, c5, c6, c7 = (
        tl.load(code_ptr + 4),
        tl.load(code_ptr + 5),
        tl.load(code_ptr + 6),
        tl.load(code_ptr + 7),
    )
    c8, c9, c10, c11 = (
        tl.load(code_ptr + 8),
        tl.load(code_ptr + 9),
        tl.load(code_ptr + 10),
        tl.load(code_ptr + 11),
    )
    c12, c13, c14, c15 = (
        tl.load(code_ptr + 12),
        tl.load(code_ptr + 13),
        tl.load(code_ptr + 14),
        tl.load(code_ptr + 15),
    )
    return c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15


@triton.jit
def decode(index, absmax, codes, DTYPE: tl.constexpr):
    """int32 indices 0 ... 15 and the absmax of each -> DTYPE, one rounding."""
    b0, b1, b2, b3 = (index & 1) != 0, (index & 2) != 0, (index & 4) != 0, (index & 8) != 0
    low = tl.where(
        b2,
        tl.where(b1, tl.where(b0, codes[7], codes[6]), tl.where(b0, codes[5], codes[4])),
        tl.where(b1, tl.where(b0, codes[3], codes[2]), tl.where(b0, codes[1], codes[0])),
    )
    high = tl.where(
        b2,
        tl.where(b1, tl.where(b0, codes[15], codes[14]), tl.where(b0, codes[13], codes[12])),
        tl.where(b1, tl.where(b0, codes[11], codes[10]), tl.where(b0, codes[9], codes[8])),
    )
    return round_to(tl.where(b3, high, low) * absmax, DTYPE)


@triton.jit
def decode_words(words, absmax, codes, DTYPE: tl.constexpr, METHOD: tl.constexpr):
    """words int32 [..., W] of eight codes each, absmax fp32 [..., 1] of the block that holds them -> DTYPE
    [..., W, eight values].

    The eight are one axis or three of two: reshape the result. A thread's values come out as neighbours, so
    that this moves no data.
    """
    if METHOD == "PORTABLE":
        nibble = tl.arange(0, 8) ^ 1  # a byte's first element is its high nibble
        index = (tl.expand_dims(words, -1) >> (nibble * 4)) & 15  # [..., W, 8]
        values = decode(index, tl.expand_dims(absmax, -1), codes, DTYPE)
    else:
        asm: tl.constexpr = (
            _TABLE_BF16 if tl.bfloat16 == DTYPE else (_TABLE_FP16 if METHOD == "PRMT" else _TABLE_FP16_SM75)
        )
        l0, l1, l2, l3, h0, h1, h2, h3 = tl.inline_asm_elementwise(  # [..., 1], four bytes of the table each
            asm,
            _TABLE_CONSTRAINTS,
            [
                absmax,
                codes[0],
                codes[1],
                codes[2],
                codes[3],
                codes[4],
                codes[5],
                codes[6],
                codes[7],
                codes[8],
                codes[9],
                codes[10],
                codes[11],
                codes[12],
                codes[13],
                codes[14],
                codes[15],
            ],
            (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(  # [..., W] each
            _LOOKUP,
            _LOOKUP_CONSTRAINTS,
            [words, l0, l1, l2, l3, h0, h1, h2, h3],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        evens = tl.join(tl.join(e0, e4), tl.join(e2, e6))  # [..., W, 2, 2]: element 4 * i + 2 * j
        odds = tl.join(tl.join(e1, e5), tl.join(e3, e7))
        values = tl.join(evens, odds).to(DTYPE, bitcast=True)  # [..., W, 2, 2, 2]
    return values
