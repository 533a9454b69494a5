"""Quantization on CUDA: codes and absmax bit for bit as the definition gives them."""

from __future__ import annotations

import ctypes

import pytest
import torch

from peftkern.formats.nf4 import BLOCKSIZES, code_tensor, dynamic_map
from peftkern.ops.quantize import reference

from ..native.compiled import i64, pointer
from .device_library import CudaLibrary

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def _assert_quantizes_as_the_reference(
    library: CudaLibrary, w: torch.Tensor, blocksize: int, quant_type: str
) -> None:
    code = code_tensor(quant_type)
    packed, absmax = library.quantize(w.to(library.device), blocksize, code.to(library.device))
    expected_packed, expected_absmax = reference.quantize_4bit(w, blocksize, code)
    assert torch.equal(absmax.cpu(), expected_absmax)
    assert torch.equal(packed.cpu(), expected_packed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("numel", [1, 7, 64, 4095, 9001])
def test_every_size(
    cuda_library: CudaLibrary, numel: int, blocksize: int, quant_type: str, dtype: torch.dtype
) -> None:
    """Odd lengths end in half a byte, and in a block cut short."""
    _assert_quantizes_as_the_reference(cuda_library, torch.randn(numel).to(dtype), blocksize, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 256, 512])
def test_special_values(cuda_library: CudaLibrary, blocksize: int, quant_type: str) -> None:
    """NaN is code 0 and does not count in the absmax; zero blocks have absmax 0; infinities, subnormals."""
    w = torch.randn(6 * blocksize)
    w[:blocksize] = 0
    w[blocksize : 2 * blocksize] *= 1e-41
    w[2 * blocksize + 3], w[3 * blocksize + 5], w[4 * blocksize + 1] = (
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    w[5 * blocksize :] = float("nan")
    _assert_quantizes_as_the_reference(cuda_library, w, blocksize, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_take_the_lower_code(cuda_library: CudaLibrary, quant_type: str) -> None:
    """The thresholds themselves, and their neighbours on both sides; the absmax is 1, so that nothing is
    rounded on the way."""
    ordered = code_tensor(quant_type).sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = torch.cat(
        [
            middle,
            torch.nextafter(middle, torch.tensor(9.0)),
            torch.nextafter(middle, torch.tensor(-9.0)),
            ordered,
        ]
    )
    w = torch.cat([near, torch.tensor([1.0, -1.0]), torch.zeros(64)])[:64]
    assert w.abs().max() == 1 and len(near) <= 62
    _assert_quantizes_as_the_reference(cuda_library, w, 64, quant_type)


@pytest.mark.parametrize("offset", [1, 2, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_that_start_anywhere(cuda_library: CudaLibrary, dtype: torch.dtype, offset: int) -> None:
    w = torch.randn(offset + 1024).to(dtype).to(cuda_library.device)[offset:]
    code = code_tensor("nf4")
    packed, absmax = cuda_library.quantize(w, 64, code.to(cuda_library.device))
    expected = reference.quantize_4bit(w.cpu(), 64, code)
    assert torch.equal(packed.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])


@pytest.mark.parametrize("blocksize", [1, 8, 256, 1024])
@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_absmax(cuda_library: CudaLibrary, count: int, blocksize: int) -> None:
    code = dynamic_map()
    values = torch.randn(count) * 0.05
    values[: min(3, count)] = 0
    values[count // 2] = float("nan") if count > 300 else 0.02
    out, nested = cuda_library.quantize_absmax(
        values.to(cuda_library.device), code.to(cuda_library.device), blocksize
    )
    expected_out, expected_nested = reference.quantize_absmax(values, code, blocksize)
    assert torch.equal(nested.cpu(), expected_nested)
    assert torch.equal(out.cpu(), expected_out)


def test_absmax_at_every_threshold(cuda_library: CudaLibrary) -> None:
    code = dynamic_map()
    middle = (code[1:] + code[:-1]) / 2
    values = torch.cat(
        [
            code,
            middle,
            torch.nextafter(middle, torch.tensor(9.0)),
            torch.nextafter(middle, torch.tensor(-9.0)),
        ]
    )
    out, nested = cuda_library.quantize_absmax(
        values.to(cuda_library.device), code.to(cuda_library.device), 2048
    )
    assert nested.item() == 1
    assert torch.equal(out.cpu(), reference.quantize_absmax(values, code, 2048)[0])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_no_order_of_threads_changes_a_code(emulated: ctypes.CDLL, order: int) -> None:
    library = CudaLibrary(emulated, "cpu")
    emulated.pk_emulation_order(order)
    try:
        for blocksize in (64, 4096):
            _assert_quantizes_as_the_reference(library, torch.randn(9000), blocksize, "nf4")
        values, code = torch.rand(700), dynamic_map()
        for got, expected in zip(
            library.quantize_absmax(values, code, 256),
            reference.quantize_absmax(values, code, 256),
            strict=True,
        ):
            assert torch.equal(got, expected)
    finally:
        emulated.pk_emulation_order(0)


def test_arguments_are_checked(emulated: ctypes.CDLL) -> None:
    null, shape, dtype, block = 1, 2, 3, 4
    w, code, out = torch.randn(64), code_tensor("nf4"), torch.empty(64)

    def call(pointer_to_w=w, dtype_number=0, numel=64, blocksize=64) -> int:
        return emulated.pk_quantize_4bit_cuda(
            pointer(pointer_to_w),
            dtype_number,
            i64(numel),
            blocksize,
            pointer(code),
            pointer(out),
            pointer(out),
            pointer(None),
            -1,
        )

    assert [call(None), call(numel=0), call(dtype_number=3), call(blocksize=24), call(blocksize=8192)] == [
        null,
        shape,
        dtype,
        block,
        block,
    ]
    absmax = (pointer(w), i64(64), 100, pointer(out), pointer(out), pointer(out), pointer(None), -1)
    assert emulated.pk_quantize_absmax_cuda(*absmax) == block
