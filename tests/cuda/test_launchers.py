"""The Python launchers of the CUDA kernels: over the emulated module with tensors of the CPU, and on a device
with `pytest -m gpu`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.formats.nf4 import code_tensor, dynamic_map
from peftkern.ops.dequantize import cuda as dequantize
from peftkern.ops.dequantize import reference as dequantize_reference
from peftkern.ops.quantize import cuda as quantize
from peftkern.ops.quantize import reference as quantize_reference
from peftkern.runtime import native_cuda

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated":
        request.getfixturevalue("emulated_module")
        return "cpu"
    return "cuda"


def _weight(shape: tuple[int, int], nested: bool, device: str) -> tuple[Tensor, tuple, NF4Weight]:
    """packed and the op's tuple on the device, and the weight on the CPU."""
    w = NF4Weight.from_dense(torch.randn(*shape), nested=nested)
    quant = tuple(
        t if t is None else t.to(device)
        for t in (w.code, w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    )
    return w.packed.to(device), (*quant, w.blocksize, w.nested_blocksize), w


def _expected(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    absmax = (w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    return dequantize_reference.dequantize_4bit(
        w.packed, w.code, *absmax, w.shape, w.blocksize, w.nested_blocksize, dtype
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(12, 128), (3, 77)], ids=str)
def test_dequantize(device: str, shape: tuple, nested: bool, dtype: torch.dtype) -> None:
    packed, quant, weight = _weight(shape, nested, device)
    *absmax, blocksize, nested_blocksize = quant
    expected = _expected(weight, dtype)
    got = dequantize.dequantize_4bit(packed, *absmax, shape, blocksize, nested_blocksize, dtype)
    assert got.device.type == device and torch.equal(got.cpu(), expected)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    dequantize.dequantize_4bit_out(packed, *quant, out)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_slice_into_a_slab(device: str, dtype: torch.dtype) -> None:
    packed, quant, weight = _weight((12, 192), True, device)
    slab = torch.full((12, 200), float("nan"), dtype=dtype, device=device)
    for rows, cols in (
        (slice(2, 9), slice(64, 192)),
        (slice(4, 5), slice(0, 192)),
        (slice(None), slice(1, 8)),
        (slice(3, 3), slice(0, 64)),
    ):
        expected = _expected(weight, dtype)[rows, cols]
        out = slab[: expected.shape[0], : expected.shape[1]].fill_(float("nan"))
        assert dequantize.dequantize_slice(packed, quant, 12, 192, rows, cols, out) is out
        assert torch.equal(out.cpu(), expected)
    assert slab[:, 192:].isnan().all()


def test_out_is_checked(device: str) -> None:
    packed, quant, _ = _weight((4, 64), True, device)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize.dequantize_4bit_out(packed, *quant, torch.empty(64, 4, device=device).T)
    with pytest.raises(ValueError, match="expected \\(2, 64\\)"):
        dequantize.dequantize_slice(
            packed, quant, 4, 64, slice(0, 2), slice(0, 64), torch.empty(3, 64, device=device)
        )
    with pytest.raises(ValueError, match="unit stride"):
        dequantize.dequantize_slice(
            packed, quant, 4, 64, slice(0, 2), slice(0, 64), torch.empty(64, 2, device=device).T
        )
    with pytest.raises(TypeError, match="float64"):
        dequantize.dequantize_4bit_out(packed, *quant, torch.empty(4, 64, dtype=torch.float64, device=device))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize(device: str, dtype: torch.dtype) -> None:
    w, code = torch.randn(7, 333).to(dtype), code_tensor("nf4")
    packed, absmax = quantize.quantize_4bit(w.to(device), 64, code.to(device))
    for got, expected in zip((packed, absmax), quantize_reference.quantize_4bit(w, 64, code), strict=True):
        assert torch.equal(got.cpu(), expected)
    transposed = quantize.quantize_4bit(w.to(device).T, 64, code.to(device))
    assert torch.equal(transposed[0].cpu(), quantize_reference.quantize_4bit(w.T, 64, code)[0])
    values = absmax.cpu() - absmax.cpu().mean()
    for got, expected in zip(
        quantize.quantize_absmax(values.to(device), dynamic_map().to(device), 256),
        quantize_reference.quantize_absmax(values, dynamic_map(), 256),
        strict=True,
    ):
        assert torch.equal(got.cpu(), expected)


def test_status_codes_become_exceptions(emulated_module: ModuleType) -> None:
    w = torch.zeros(64)
    with pytest.raises(ValueError, match="block size"):
        quantize.quantize_4bit(w, 48, code_tensor("nf4"))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated_module.quantize_4bit(w.data_ptr(), 0, 64, 64, w.data_ptr(), w.data_ptr(), w.data_ptr(), 0, 3)


def test_available_says_why_not(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_cuda.available() == (True, "emulated")
    for driver, words in (
        (0, "built with CUDA 12.8, but the driver is missing"),
        (11040, "but the driver supports CUDA 11.4"),
    ):
        native_cuda.available.cache_clear()
        monkeypatch.setattr(emulated_module, "versions", lambda driver=driver: (driver, 12080))
        ok, reason = native_cuda.available()
        assert not ok and words in reason


def test_a_missing_module_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peftkern._C_cuda", None)
    monkeypatch.delattr("peftkern._C_cuda", raising=False)
    module, reason = native_cuda._load.__wrapped__()
    assert module is None and "PEFTKERN_CUDA=1 pip install" in reason


@pytest.mark.parametrize(
    ("built", "runs_on", "not_on"),
    [
        ("80", (80, 86, 89, 90, 120), (75,)),
        ("75;80", (75, 80, 89, 100), (70,)),
        ("86;90", (86, 89, 90, 120), (75, 80)),
        ("90", (90, 100), (89,)),
    ],
)
def test_which_gpus_a_build_serves(built: str, runs_on: tuple[int, ...], not_on: tuple[int, ...]) -> None:
    assert all(native_cuda.serves(arch, built) for arch in runs_on)
    assert not any(native_cuda.serves(arch, built) for arch in not_on)
