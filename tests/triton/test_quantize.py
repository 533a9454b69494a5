"""Quantization by the Triton kernel: the reference's codes and absmax, exactly."""

from __future__ import annotations

import pytest
import torch

from peftkern.formats.nf4 import BLOCKSIZES, CODES, code_tensor, dynamic_map

pytest.importorskip("triton")

from peftkern.ops.quantize import reference  # noqa: E402
from peftkern.ops.quantize import triton as kernels  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def _check(device: str, w: torch.Tensor, blocksize: int, code: torch.Tensor) -> None:
    packed, absmax = kernels.quantize_4bit(w.to(device), blocksize, code.to(device))
    exact_packed, exact_absmax = reference.quantize_4bit(w, blocksize, code)
    assert torch.equal(packed.cpu(), exact_packed)
    assert torch.equal(absmax.cpu(), exact_absmax)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", sorted(CODES))
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_equals_the_reference(device: str, blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    """Odd: a last byte with one element, a last block cut short."""
    _check(device, torch.randn(3, 3001).to(dtype), blocksize, code_tensor(quant_type))


@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 64, 4096, 4097])
def test_sizes(device: str, numel: int) -> None:
    _check(device, torch.randn(numel), 32, code_tensor("nf4"))


def test_nothing(device: str) -> None:
    packed, absmax = kernels.quantize_4bit(torch.empty(0, 64, device=device), 64, code_tensor("nf4", device))
    assert packed.shape == (0, 1) and absmax.shape == (0,)


@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_ties_go_to_the_lower_code(device: str, quant_type: str) -> None:
    """The midpoints themselves, their neighbours on both sides, and the codes."""
    code = code_tensor(quant_type)
    ordered = code.sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2
    inf = torch.tensor(torch.inf)
    values = torch.cat([torch.ones(1), middle, middle.nextafter(inf), middle.nextafter(-inf), code])
    assert len(values) == 62
    _check(device, values, 64, code)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_odd_values(device: str, quant_type: str) -> None:
    """Blocks of zeros, of NaN, with infinities, with subnormals whose inverse is infinite; and a cut last
    block of subnormals."""
    w = torch.randn(7 * 32 + 3)
    w[32:64] = 0.0
    w[64:96] = torch.nan
    w[96], w[97], w[98] = torch.inf, -torch.inf, torch.nan
    w[128:160] = 1e-41
    w[160:192:3] = -0.0
    w[224:] = 1e-42
    _check(device, w, 32, code_tensor(quant_type))


def test_a_code_in_any_order(device: str) -> None:
    _check(device, torch.randn(40, 48), 64, code_tensor("nf4")[torch.randperm(16)])


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_absmax_to_8_bits(device: str, count: int, blocksize: int) -> None:
    absmax, code = torch.rand(count) - 0.5, dynamic_map()
    got = kernels.quantize_absmax(absmax.to(device), code.to(device), blocksize)
    for ours, exact in zip(got, reference.quantize_absmax(absmax, code, blocksize), strict=True):
        assert torch.equal(ours.cpu(), exact)
