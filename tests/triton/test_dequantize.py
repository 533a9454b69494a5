"""Dequantization by the Triton kernels: every rectangle, format and dtype, bit for bit the reference's."""

from __future__ import annotations

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.formats.nf4 import BLOCKSIZES

pytest.importorskip("triton")

from peftkern.ops.dequantize import reference  # noqa: E402
from peftkern.ops.dequantize import triton as kernels  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [(q, n) for q in ("nf4", "fp4") for n in (True, False)]


def _weight(n: int, k: int, **options) -> NF4Weight:
    with use_backend("reference"):
        return NF4Weight.from_dense(torch.randn(n, k), **options)


def _quant(w: NF4Weight) -> tuple:
    return (
        w.code,
        w.absmax,
        w.absmax_8bit,
        w.absmax_code,
        w.nested_absmax,
        w.absmax_offset,
        w.blocksize,
        w.nested_blocksize,
    )


def _exact(w: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    *quant, blocksize, nested_blocksize = _quant(w)
    return reference.dequantize_4bit(w.packed, *quant, w.shape, blocksize, nested_blocksize, dtype)


def _same_bits(got: torch.Tensor, exact: torch.Tensor) -> bool:
    return torch.equal(got.cpu().contiguous().view(torch.uint8), exact.contiguous().view(torch.uint8))


def _check_whole(device: str, w: NF4Weight, dtype: torch.dtype) -> None:
    on = w.to(device)
    *quant, blocksize, nested_blocksize = _quant(on)
    out = torch.full(w.shape, torch.nan, dtype=dtype, device=device)
    kernels.dequantize_4bit_out(on.packed, *quant, blocksize, nested_blocksize, out)
    exact = _exact(w, dtype)
    assert _same_bits(out, exact)
    assert _same_bits(
        kernels.dequantize_4bit(on.packed, *quant, w.shape, blocksize, nested_blocksize, dtype), exact
    )


# Groups of four words, of one, and none at all; more than one program; one weight; an odd number of them.
@pytest.mark.parametrize("shape", [(64, 192), (130, 40), (7, 333), (1, 1), (3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_weights(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _check_whole(device, _weight(*shape), dtype)


@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_formats(device: str, blocksize: int, quant_type: str, nested: bool) -> None:
    _check_whole(
        device, _weight(70, 288, blocksize=blocksize, quant_type=quant_type, nested=nested), torch.bfloat16
    )


def _rectangles(n: int, k: int) -> list[tuple[slice, slice]]:
    everything = slice(0, n), slice(0, k)
    return [
        everything,
        (slice(0, n // 2), everything[1]),  # a slab of the forward
        (slice(n // 2, n), everything[1]),
        (everything[0], slice(k // 3 // 32 * 32, k // 3 * 2 // 32 * 32)),  # a slab of the backward
        (slice(3, n - 1), slice(8, k - 8)),
        (slice(1, n), slice(5, k - 3)),
        (slice(2, 3), slice(0, k)),
        (slice(0, n), slice(k - 1, k)),
        (slice(4, 4), everything[1]),
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(40, 192), (33, 72), (20, 91)], ids=str)
def test_slices_into_rows_that_lie_apart(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks that straddle rows included; what lies between the rows is not written."""
    w = _weight(*shape)
    on, exact = w.to(device), _exact(w, dtype)
    for rows, cols in _rectangles(*shape):
        height, width = rows.stop - rows.start, cols.stop - cols.start
        for stride in (width, width + 16, width + 3):
            buffer = torch.full((height, stride), torch.nan, dtype=dtype, device=device)
            kernels.dequantize_slice(on.packed, _quant(on), *shape, rows, cols, buffer[:, :width])
            assert _same_bits(buffer[:, :width], exact[rows, cols]), (rows, cols, stride)
            assert buffer[:, width:].isnan().all()


def test_packed_at_an_odd_address(device: str) -> None:
    """A packed tensor within a larger one: words cannot be read, bytes can."""
    w = _weight(16, 64)
    shifted = torch.empty(w.packed.numel() + 1, dtype=torch.uint8, device=device)[1:]
    shifted.copy_(w.packed.flatten())
    on = w.to(device)
    out = torch.full(w.shape, torch.nan, device=device)
    kernels.dequantize_slice(shifted, _quant(on), *w.shape, slice(0, 16), slice(0, 64), out)
    assert _same_bits(out, _exact(w, torch.float32))


def test_a_nested_block_size_of_the_checkpoint(device: str) -> None:
    """128, not the usual 256: it is read, not assumed. The offset changes bits if the product and the sum are
    fused."""
    blocks = 40 * 256 // 64
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (40 * 128,), dtype=torch.uint8, generator=generator)
    code = torch.rand(16, generator=generator) - 0.5
    absmax_8bit = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    parts = (
        torch.rand(256, generator=generator),
        torch.rand(2, generator=generator),
        torch.rand((), generator=generator),
    )
    args = (code, None, absmax_8bit, *parts)
    exact = reference.dequantize_4bit(packed, *args, (40, 256), 64, 128, torch.float32)
    moved = tuple(None if t is None else t.to(device) for t in args)
    assert _same_bits(
        kernels.dequantize_4bit(packed.to(device), *moved, (40, 256), 64, 128, torch.float32), exact
    )
    fused = (
        parts[0].double()[absmax_8bit.long()] * parts[1].double().repeat_interleave(128)[:blocks]
        + parts[2].double()
    ).float()
    assert not torch.equal(fused, reference.dequantize_absmax(absmax_8bit, *parts, 128))
