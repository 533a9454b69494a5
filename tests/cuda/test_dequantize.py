"""Dequantization on CUDA: every path bit for bit against the definition."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.formats.nf4 import code_tensor, dynamic_map
from peftkern.ops.dequantize import reference

from ..native.compiled import DTYPES, c_weight, i64, pointer
from .device_library import CudaLibrary

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True)]
SHAPES = [
    (3, 192),
    (5, 96),
    (4, 80),
    (7, 333),
    (1, 1),
    (2, 4160),
]  # rows of whole blocks, of halves, of 16s, odd; one element; more threads


def _weight(shape: tuple[int, int], quant_type: str, nested: bool, blocksize: int, device: str) -> NF4Weight:
    """Random codes under random scales, negative and zero ones too: the formats' whole range, not what a
    quantizer makes of it."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    absmax = torch.randn(blocks)
    absmax[::5] = 0
    parts = {"absmax": absmax}
    if nested:
        parts = {
            "absmax_8bit": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            "absmax_code": dynamic_map(),
            "nested_absmax": torch.rand(-(-blocks // 256)) + 0.1,
            "absmax_offset": torch.randn(()),
        }
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
    weight = NF4Weight(packed, code_tensor(quant_type), shape, torch.bfloat16, blocksize, quant_type, **parts)
    return weight.to(device)


def _expected(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    w = weight.to("cpu")
    absmax = (w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    return reference.dequantize_4bit(
        w.packed, w.code, *absmax, w.shape, w.blocksize, w.nested_blocksize, dtype
    )


def _assert_same_bits(got: Tensor, expected: Tensor) -> None:
    integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
    assert torch.equal(got.cpu().contiguous().view(integer), expected.contiguous().view(integer))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_weights(
    cuda_library: CudaLibrary, shape: tuple, blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    weight = _weight(shape, quant_type, nested, blocksize, cuda_library.device)
    out = cuda_library.poisoned(*shape, dtype=dtype)
    cuda_library.dequantize(weight, (0, shape[0]), (0, shape[1]), out)
    _assert_same_bits(out, _expected(weight, dtype))


# Whole rows; whole blocks; a ragged end; half a block; one column; an odd start; no rows.
WINDOWS = [
    ((0, 6), (0, 256)),
    ((1, 5), (64, 192)),
    ((2, 3), (128, 250)),
    ((0, 6), (32, 64)),
    ((3, 6), (16, 17)),
    ((5, 6), (7, 256)),
    ((2, 2), (0, 9)),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [256, 352, 250])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize(("rows", "cols"), WINDOWS)
def test_windows(
    cuda_library: CudaLibrary, rows: tuple, cols: tuple, blocksize: int, k: int, dtype: torch.dtype
) -> None:
    """Into a slab with wider rows, 16-byte aligned ones or not: elements beside the window stay as they
    were."""
    cols = (min(cols[0], k), min(cols[1], k))
    weight = _weight((6, k), "nf4", True, blocksize, cuda_library.device)
    slab = cuda_library.poisoned(max(rows[1] - rows[0], 1), k + 24 + rows[0] % 2, dtype=dtype)
    out = slab[: rows[1] - rows[0], : cols[1] - cols[0]]
    cuda_library.dequantize(weight, rows, cols, out)
    _assert_same_bits(out, _expected(weight, dtype)[rows[0] : rows[1], cols[0] : cols[1]])
    assert slab[:, cols[1] - cols[0] :].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("out_offset", "packed_offset"), [(1, 0), (0, 1), (0, 4), (8, 16)])
def test_unaligned_memory(
    cuda_library: CudaLibrary, out_offset: int, packed_offset: int, dtype: torch.dtype
) -> None:
    """Views that start anywhere: 16-byte accesses would fault there."""
    weight = _weight((4, 128), "nf4", True, 64, cuda_library.device)
    shifted = torch.empty(packed_offset + 256, dtype=torch.uint8, device=cuda_library.device)[packed_offset:]
    shifted.copy_(weight.packed)
    flat = cuda_library.poisoned(4 * 128 + out_offset, dtype=dtype)
    out = flat[out_offset:].view(4, 128)
    cuda_library.dequantize(replace(weight, packed=shifted), (0, 4), (0, 128), out)
    _assert_same_bits(out, _expected(weight, dtype))
    assert flat[:out_offset].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_byte_at_every_place_of_a_thread(cuda_library: CudaLibrary, dtype: torch.dtype) -> None:
    """All 256 bytes in each of the 32 byte positions of a block of 64, under a code table of 16 unlike
    numbers."""
    byte, position = torch.arange(256).repeat_interleave(32), torch.arange(32).repeat(256)
    packed = (byte + 37 * position).to(torch.uint8)
    absmax = torch.linspace(0.01, 3, 256)
    weight = NF4Weight(packed, torch.randn(16), (256, 64), torch.bfloat16, 64, "nf4", absmax=absmax).to(
        cuda_library.device
    )
    out = cuda_library.poisoned(256, 64, dtype=dtype)
    cuda_library.dequantize(weight, (0, 256), (0, 64), out)
    _assert_same_bits(out, _expected(weight, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scales_at_the_edges_of_the_dtype(cuda_library: CudaLibrary, dtype: torch.dtype) -> None:
    """Products that overflow, vanish, or are subnormal round as PyTorch's; infinity and NaN stay what they
    are."""
    absmax = torch.tensor(
        [
            3e38,
            1e38,
            7e4,
            65504.0,
            6e-5,
            1e-7,
            3e-8,
            1e-38,
            1e-40,
            1e-45,
            0.0,
            -0.0,
            float("inf"),
            -2.0,
            1.0,
            0.3,
        ]
    )
    weight = NF4Weight(
        torch.randint(0, 256, (512,), dtype=torch.uint8),
        code_tensor("nf4"),
        (16, 64),
        dtype,
        64,
        "nf4",
        absmax=absmax,
    )
    out = cuda_library.poisoned(16, 64, dtype=dtype)
    cuda_library.dequantize(weight.to(cuda_library.device), (0, 16), (0, 64), out)
    expected, got = _expected(weight, dtype), out.cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    _assert_same_bits(torch.where(got.isnan(), 0, got), torch.where(expected.isnan(), 0, expected))


def test_the_nested_absmax_is_two_roundings(cuda_library: CudaLibrary) -> None:
    """Against what a fused multiply-add gives: the cases must differ, and ours must be the separate
    rounding."""
    weight = _weight((256, 64), "nf4", True, 64, cuda_library.device)
    weight = replace(
        weight, packed=torch.full_like(weight.packed, 0xFF)
    )  # code 15 is 1.0: the output is the absmax
    w = weight.to("cpu")
    product = w.absmax_code[w.absmax_8bit.long()].double() * w.nested_absmax.double()
    fused = (product + w.absmax_offset.double()).float()
    separate = product.float() + w.absmax_offset
    assert (fused != separate).any()
    out = cuda_library.poisoned(256, 64, dtype=torch.float32)
    cuda_library.dequantize(weight, (0, 256), (0, 64), out)
    assert torch.equal(out.cpu(), separate[:, None].expand(256, 64))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_no_order_of_threads_changes_a_bit(emulated: ctypes.CDLL, order: int) -> None:
    library = CudaLibrary(emulated, "cpu")
    emulated.pk_emulation_order(order)
    try:
        for dtype in FLOATS:
            weight = _weight((5, 832), "nf4", True, 64, "cpu")
            out = library.poisoned(5, 832, dtype=dtype)
            library.dequantize(weight, (0, 5), (0, 832), out)
            _assert_same_bits(out, _expected(weight, dtype))
    finally:
        emulated.pk_emulation_order(0)


def test_it_is_one_launch(emulated: ctypes.CDLL) -> None:
    before = emulated.pk_emulation_launches()
    CudaLibrary(emulated, "cpu").dequantize(
        _weight((4, 128), "nf4", True, 64, "cpu"), (0, 4), (64, 128), torch.empty(4, 64)
    )
    assert emulated.pk_emulation_launches() == before + 1


NULL, SHAPE, DTYPE, BLOCKSIZE, CUDA = 1, 2, 3, 4, 64
REFUSED = [
    ({"data": 0}, {}, NULL),
    ({"code": 0}, {}, NULL),
    ({"absmax_8bit": 0}, {}, NULL),
    ({"blocksize": 48}, {}, BLOCKSIZE),
    ({"blocksize": 16}, {}, BLOCKSIZE),
    ({"nested_blocksize": 100}, {}, BLOCKSIZE),
    ({"k": 0}, {}, SHAPE),
    ({}, {"row": -1}, SHAPE),
    ({}, {"row": 3, "rows": 2}, SHAPE),
    ({}, {"rows": (1 << 63) - 1, "row": 1}, SHAPE),
    ({}, {"col": 65}, SHAPE),
    ({}, {"ld_out": 63}, SHAPE),
    ({}, {"dtype": 3}, DTYPE),
    ({}, {"out": 0}, NULL),
    ({}, {"device": 7}, CUDA),
    ({}, {"out": 0, "rows": 0}, 0),
]


@pytest.mark.parametrize(("of_weight", "of_call", "status"), REFUSED)
def test_arguments_are_checked(emulated: ctypes.CDLL, of_weight: dict, of_call: dict, status: int) -> None:
    weight = _weight((4, 64), "nf4", True, 64, "cpu")
    descriptor, out = c_weight(weight), torch.empty(4, 64)
    for name, value in of_weight.items():
        setattr(descriptor, name, value)
    good = {
        "row": 0,
        "rows": 4,
        "col": 0,
        "cols": 64,
        "out": out.data_ptr(),
        "ld_out": 64,
        "dtype": DTYPES[out.dtype],
        "device": -1,
    }
    call = {**good, **of_call}
    sizes = (i64(call[name]) for name in ("row", "rows", "col", "cols"))
    arguments = (
        *sizes,
        ctypes.c_void_p(call["out"]),
        i64(call["ld_out"]),
        call["dtype"],
        pointer(None),
        call["device"],
    )
    assert emulated.pk_dequantize_4bit_cuda(ctypes.byref(descriptor), *arguments) == status
    if status == CUDA:
        assert emulated.pk_cuda_error_text() == b"invalid device ordinal"
