"""||W||^2 of each row of a 4-bit weight on a GPU: a program decodes one row in registers and keeps nothing of
it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import DECODE_OPS, Launch, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import weight_bytes
from ..triton_nf4 import Packed, absmax_of, decode, decode_words, group_words, load_codes
from . import reference

__all__ = ["row_squares", "row_squares_call", "specializations"]

# Weights of a step and warps: a 16-byte load a thread. Not measured.
WEIGHTS, WARPS = 4096, 4
RAGGED_WEIGHTS = 1024


@triton.jit
def _row_squares_kernel(
    weight,  # `Packed`
    out_ptr,  # fp32 [N]
    units,  # of a row: groups of WORDS words, all of one block, or single weights
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,  # of a group; 0: units are single weights, and rows may start within a byte
    UNITS: tl.constexpr,  # of a step
):
    """The row of the program's number."""
    first = tl.program_id(0).to(tl.int64) * units
    codes = load_codes(weight.code)
    total = tl.zeros((UNITS, 8 * WORDS if WORDS else 1), tl.float32)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)  # [UNITS]
        inside = unit < units
        source = first + unit
        block = source // BLOCKSIZE if WORDS == 0 else source // (BLOCKSIZE // (8 * WORDS))
        absmax = absmax_of(block, inside, weight, NESTED_BLOCKSIZE)  # [UNITS]; outside, a nested one is not 0
        if WORDS == 0:
            byte = tl.load(weight.packed + source // 2, mask=inside, other=0).to(tl.int32)
            nibble = tl.where(source % 2 == 0, byte >> 4, byte & 15)
            values = decode(nibble, absmax, codes, tl.float32)[:, None]
        else:
            offsets = source[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [UNITS, WORDS]
            words_ptrs = weight.packed.to(tl.pointer_type(tl.int32)) + offsets
            words = tl.load(words_ptrs, mask=inside[:, None], other=0)
            decoded = decode_words(words, absmax[:, None], codes, tl.float32, "PORTABLE")
            values = tl.reshape(decoded, [UNITS, 8 * WORDS])
        total += tl.where(inside[:, None], values * values, 0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@work(_row_squares_kernel)
def _row_squares_work(a: Mapping[str, Any]) -> Launch:
    count = a["out_ptr"].numel() * a["units"] * max(8 * a["WORDS"], 1)
    reads = weight_bytes(count, a["weight"].absmax, a["BLOCKSIZE"], a["NESTED_BLOCKSIZE"])
    return Launch("row_squares", reads, nbytes(a["out_ptr"]), 0, DECODE_OPS * count)


def row_squares_call(packed: Tensor, quant: tuple, n: int, k: int, out: Tensor) -> Call:
    """packed: W [n, k]; quant: as `nf4.operands` gives it; out: fp32 [n]."""
    *tables, blocksize, nested_blocksize = quant
    words = group_words(packed, k)
    arguments: dict[str, Any] = {"weight": Packed(packed, *tables), "out_ptr": out}
    unit, weights = (8 * words, WEIGHTS) if words else (1, RAGGED_WEIGHTS)
    arguments |= {"units": k // unit, "BLOCKSIZE": blocksize, "NESTED_BLOCKSIZE": nested_blocksize}
    arguments |= {"WORDS": words, "UNITS": weights // unit}
    return Call(_row_squares_kernel, n, arguments, WARPS, 1)


def row_squares(weight: Tensor, *quant_and_sizes: object) -> Tensor:
    """As the reference, to which a dense weight is left: torch's own reduction reads it once."""
    *quant, n, k = quant_and_sizes
    if quant[0] is None:
        return reference.row_squares(weight, *quant_and_sizes)
    out = torch.empty(n, dtype=torch.float32, device=weight.device)
    run(row_squares_call(weight, tuple(quant), n, k, out))
    return out


def specializations(arch: int) -> Iterator[Specialization]:
    """Nested and plain absmax, the two loads and single weights."""

    def meta(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    nested = (None, meta(1 << 18, torch.uint8), meta(256), meta(1 << 10), meta(1))
    plain = (meta(1 << 18), None, None, None, None)
    packed, out = meta(1 << 23, torch.uint8), meta(4096)
    variants = (
        ("nested", nested, 4096),
        ("plain", plain, 4096),
        ("words", nested, 4072),
        ("ragged", nested, 4095),
    )
    for name, absmax, k in variants:
        call = row_squares_call(packed, (meta(16), *absmax, 64, 256), 4096, k, out)
        wide = ("words_ptrs",) if k == 4096 else ()
        unfused = () if absmax is plain else ("absmax_value",)
        yield specialization(f"row-squares-{name}", call, wide_loads=wide, unfused=unfused)
