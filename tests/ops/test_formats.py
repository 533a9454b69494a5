"""The 4-bit formats: quantization, dequantization and the views of bitsandbytes' objects, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from peftkern import NF4Weight, use_backend
from peftkern.formats import codes
from peftkern.formats.nf4 import BLOCKSIZES, CODES, code_tensor, dynamic_map
from peftkern.functional import dequantize_4bit, quantize_4bit

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [(q, n) for q in ("nf4", "fp4") for n in (True, False)]


def _indices(packed: torch.Tensor, numel: int) -> torch.Tensor:
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten()[:numel]


def _assert_same_codes(
    first: torch.Tensor,
    second: torch.Tensor,
    dense: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
) -> None:
    """Equal, but for elements within 1e-6 of a threshold, where quantizers may round either way."""
    numel = dense.numel()
    differ = (_indices(first, numel) != _indices(second, numel)).nonzero().flatten()
    scaled = dense.float().flatten()[differ] / absmax.repeat_interleave(blocksize)[:numel][differ]
    code = code_tensor(quant_type).sort().values
    thresholds = (code[1:] + code[:-1]) / 2
    assert ((scaled[:, None] - thresholds).abs().amin(dim=1) < 1e-6).all()
    assert len(differ) <= numel * 1e-4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_equals_the_reference(isa: str, blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    dense = torch.randn(3, 5001).to(dtype)  # odd: a last byte with one element, a last block cut short
    ours = quantize_4bit(dense, quant_type=quant_type, blocksize=blocksize, nested=False)
    with use_backend("reference"):
        reference = quantize_4bit(dense, quant_type=quant_type, blocksize=blocksize, nested=False)
    assert torch.equal(ours.absmax, reference.absmax)
    assert torch.equal(ours.packed, reference.packed)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 192), (7, 333), (1, 1), (130, 64)], ids=str)
def test_dequantize_equals_the_reference_bit_for_bit(
    isa: str, shape: tuple, blocksize: int, quant_type: str, nested: bool, out_dtype: torch.dtype
) -> None:
    weight = quantize_4bit(torch.randn(*shape), quant_type=quant_type, blocksize=blocksize, nested=nested)
    with use_backend("reference"):
        reference = weight.dequantize(out_dtype)
    ours = weight.dequantize(out_dtype)
    assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))
    filled = torch.full(shape, float("nan"), dtype=out_dtype)
    assert dequantize_4bit(weight, out=filled) is filled
    assert torch.equal(filled.view(torch.uint8), reference.view(torch.uint8))


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 127])
def test_every_code_at_every_kind_of_position(isa: str, code: int, position: int) -> None:
    """One marked element among code 7 (zero): the first element of a byte is its high nibble."""
    packed = torch.full((64, 1), 0x77, dtype=torch.uint8)
    packed[position // 2] = code << 4 | 7 if position % 2 == 0 else 7 << 4 | code
    weight = NF4Weight(
        packed, code_tensor("nf4"), (2, 64), torch.float32, 64, "nf4", absmax=torch.tensor([2.0, 3.0])
    )
    expected = torch.zeros(128)
    expected[position] = CODES["nf4"][code] * (2.0 if position < 64 else 3.0)
    assert torch.equal(weight.dequantize().flatten(), expected)


def test_special_values(isa: str) -> None:
    dense = torch.randn(4, 64)
    dense[0] = 0.0
    dense[1, 3] = float("nan")
    dense[2] *= 1e-30
    weight = quantize_4bit(dense, nested=False)
    assert weight.absmax[0] == 0 and torch.isfinite(weight.absmax).all()
    assert _indices(weight.packed, 256)[64 + 3] == 0
    back = weight.dequantize()
    assert not back[0].any()
    assert ((back[2] - dense[2]).abs() <= dense[2].abs().max() * 0.16).all()
    with pytest.raises(ValueError, match="NaN or inf"):
        quantize_4bit(dense, check_finite=True)


def test_ties_go_to_the_lower_code(isa: str) -> None:
    code = code_tensor("nf4")
    dense = torch.zeros(1, 64)
    dense[0, 0] = 1.0  # absmax 1, so that the others stay what they are
    dense[0, 1:16] = (code[1:] + code[:-1]) / 2
    assert _indices(quantize_4bit(dense, nested=False).packed, 64)[1:16].tolist() == list(range(15))


def test_nested_absmax_is_rounded_twice() -> None:
    """code * nested_absmax + offset without a fused multiply-add: one ulp decides."""
    weight = quantize_4bit(torch.randn(512, 512) * torch.rand(512, 1))
    product = (
        weight.absmax_code[weight.absmax_8bit.long()]
        * weight.nested_absmax.repeat_interleave(256)[: weight.absmax_8bit.numel()]
    )
    absmax = product + weight.absmax_offset
    values = weight.dequantize(torch.float32).view(-1, 64)
    row, column = torch.arange(len(values)), values.abs().argmax(dim=1)
    top = code_tensor("nf4")[_indices(weight.packed, 512 * 512).view(-1, 64)[row, column].long()]
    assert torch.equal(values[row, column], top * absmax)


@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitsandbytes_codes_values_and_state_dicts(
    quant_type: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = torch.randn(96, 128).to(dtype)
    options = dict(quant_type=quant_type, compress_statistics=nested, blocksize=blocksize)
    param = bnb.nn.Params4bit(dense.clone(), requires_grad=False, **options).to("cpu")
    theirs = NF4Weight.from_bnb(param)
    assert theirs.packed.data_ptr() == param.data_ptr()  # a view, no copy
    ours = quantize_4bit(dense, quant_type=quant_type, blocksize=blocksize, nested=nested)
    plain_absmax = quantize_4bit(dense, quant_type=quant_type, blocksize=blocksize, nested=False).absmax
    _assert_same_codes(ours.packed, theirs.packed, dense, plain_absmax, blocksize, quant_type)
    assert torch.equal(theirs.dequantize(), bnb.functional.dequantize_4bit(param.data, param.quant_state))

    state = {f"weight.{k}": v for k, v in param.quant_state.as_dict(packed=True).items()} | {
        "weight": param.data
    }
    assert torch.equal(NF4Weight.from_state_dict(state).dequantize(), theirs.dequantize())
    mine = theirs.to_state_dict()
    assert mine.keys() == state.keys()
    restored = bnb.nn.Params4bit.from_prequantized(mine.pop("weight"), mine, device="cpu")
    assert torch.equal(
        bnb.functional.dequantize_4bit(restored.data, restored.quant_state), theirs.dequantize()
    )


def test_the_tables_equal_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert torch.equal(dynamic_map(), bnb.functional.create_dynamic_map())
    for quant_type in CODES:
        assert torch.equal(code_tensor(quant_type), bnb.functional.get_4bit_type(quant_type, device="cpu"))


def test_after_the_first_call_no_value_comes_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory cannot be captured into a CUDA graph, and waits for the device."""
    dense = torch.randn(8, 64)
    first = quantize_4bit(dense)
    for name in ("tensor", "linspace", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("made from values of the host"))
    second = quantize_4bit(dense)
    assert torch.equal(first.code, second.code) and torch.equal(first.absmax_code, second.absmax_code)
    first.code.zero_(), first.absmax_code.zero_()
    assert code_tensor("nf4").equal(second.code) and dynamic_map().equal(second.absmax_code)


def test_values_made_within_a_mode_or_for_inference_are_not_kept() -> None:
    dynamic_map(), codes._kept.cache_clear()
    with FakeTensorMode():
        assert isinstance(code_tensor("fp4"), FakeTensor) and isinstance(dynamic_map(), FakeTensor)
    with torch.inference_mode():
        code_tensor("fp4"), dynamic_map()
    for value in (code_tensor("fp4"), dynamic_map()):
        assert type(value) is torch.Tensor and not value.is_inference()
    assert code_tensor("nf4", "meta").device.type == "meta"


def test_bytes_per_parameter() -> None:
    dense = torch.randn(1024, 1024)
    assert quantize_4bit(dense, nested=False).nbytes / dense.numel() == pytest.approx(0.5625, abs=1e-3)
    assert quantize_4bit(dense).nbytes / dense.numel() == pytest.approx(0.51587, abs=2e-3)


def _damaged(**changes: object) -> dict[str, object]:
    good = quantize_4bit(torch.randn(8, 64))
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    return fields | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "int4"}, "quant_type"),
        ({"blocksize": 48}, "blocksize"),
        ({"nested_blocksize": 100}, "nested_blocksize"),
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, "packed"),
        ({"code": torch.zeros(16, dtype=torch.float16)}, "code"),
        ({"nested_absmax": None}, "nested_absmax"),
        ({"absmax_8bit": torch.zeros(9, dtype=torch.uint8)}, "absmax_8bit"),
        ({"absmax": torch.zeros(8)}, "absmax"),
        ({"shape": (-8, -64)}, "shape"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_damaged_weight_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NF4Weight(**_damaged(**changes))


def test_a_damaged_state_dict_is_refused_by_key() -> None:
    good = quantize_4bit(torch.randn(8, 64)).to_state_dict("layer.weight")
    for key in good:
        with pytest.raises(ValueError, match="layer.weight"):
            NF4Weight.from_state_dict({k: v for k, v in good.items() if k != key}, "layer.weight")
    head = "layer.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="corrupt"):
        NF4Weight.from_state_dict(good | {head: torch.tensor([1, 2, 3], dtype=torch.uint8)}, "layer.weight")


def _meta(**changes: object) -> Callable[[dict], dict]:
    """The state dict whose JSON has other entries; None takes one out."""

    def change(state: dict) -> dict:
        (key,) = (key for key in state if "bitsandbytes__" in key)
        meta = json.loads(bytes(state[key].tolist())) | changes
        text = json.dumps({name: value for name, value in meta.items() if value is not None})
        return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    return change


def _text(text: str) -> Callable[[dict], dict]:
    head = "w.quant_state.bitsandbytes__nf4"
    return lambda state: state | {head: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def _with(**entries: object) -> Callable[[dict], dict]:
    return lambda state: state | {f"w.{name}" if name else "w": value for name, value in entries.items()}


def _one_nan(name: str) -> Callable[[dict], dict]:
    def change(state: dict) -> dict:
        broken = state[f"w.{name}"].clone()
        broken.view(-1)[-1] = float("nan")
        return state | {f"w.{name}": broken}

    return change


TAMPERED = {
    "no object": (_text("[1, 2]"), "JSON list"),
    "a number": (_text("7"), "JSON int"),
    "deeply nested": (_text("[" * 20000), "corrupt"),
    "a name that is no string": (_meta(quant_type=["nf4"]), "quant_type"),
    "another type than its name's": (_meta(quant_type="fp4"), "'fp4', expected the type of its name"),
    "an unknown dtype": (_meta(dtype="float64"), "'float64', expected one of"),
    "a dtype that is a list": (_meta(dtype=[]), "dtype"),
    "a block size in words": (_meta(blocksize="64"), "'64', expected one of"),
    "a block size of another format": (_meta(blocksize=48), "48, expected one of"),
    "sizes below 0": (_meta(shape=[-8, -64]), "-8, -64"),
    "sizes in words": (_meta(shape="8x64"), "shape"),
    "fractions of sizes": (_meta(shape=[8.0, 64]), "8.0, 64"),
    "a size without end": (_meta(shape=[10**4000, 10**4000]), "shape"),
    "another shape": (_meta(shape=[8, 65]), "do not fit together: packed"),
    "no inner block size": (_meta(nested_blocksize=None), "lacks 'nested_blocksize'"),
    "an inner block size of 0": (_meta(nested_blocksize=0), "0, expected a power of two"),
    "an offset in words": (_meta(nested_offset="none"), "nested_offset"),
    "an offset that is NaN": (_meta(nested_offset=float("nan")), "nan, expected a finite number"),
    "a head of floats": (_with(**{"quant_state.bitsandbytes__nf4": torch.randn(7)}), "corrupt"),
    "a head that is text": (_with(**{"quant_state.bitsandbytes__nf4": "{}"}), "str, expected a tensor"),
    "no tensor": (_with(absmax=[1.0]), "list, expected a tensor"),
    "bytes that are no tensor": (_with(**{"": None}), "'w' is NoneType, expected a tensor"),
    "NaN in the inner absmax": (_one_nan("nested_absmax"), "'w.nested_absmax' holds NaN"),
    "NaN in the code": (_one_nan("quant_map"), "'w.quant_map' holds NaN"),
    "absmax of floats": (_with(absmax=torch.ones(32)), "do not fit together: absmax_8bit"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_state_dict_gets_one_clear_error(case: str) -> None:
    change, message = TAMPERED[case]
    good = quantize_4bit(torch.randn(64, 64), blocksize=32).to_state_dict("w")
    NF4Weight.from_state_dict(good, "w")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        NF4Weight.from_state_dict(change(good), "w")
    text = str(caught.value)
    assert text.startswith("state_dict: ") and text.endswith(
        "save the checkpoint again from the quantized model"
    )
    assert len(text) < 400


def test_nan_in_a_plain_absmax_is_refused() -> None:
    good = quantize_4bit(torch.randn(64, 64), nested=False).to_state_dict("w")
    with pytest.raises(ValueError, match="'w.absmax' holds NaN"):
        NF4Weight.from_state_dict(_one_nan("absmax")(good), "w")
    with pytest.raises(TypeError, match="list, expected a mapping"):
        NF4Weight.from_state_dict([good], "w")


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="float64"):
        quantize_4bit(torch.randn(4, 64).double())
    with pytest.raises(ValueError, match="empty"):
        quantize_4bit(torch.empty(0, 64))
    with pytest.raises(ValueError, match="blocksize"):
        quantize_4bit(torch.randn(4, 64), blocksize=16)
    with pytest.raises(ValueError, match="quant_type"):
        quantize_4bit(torch.randn(4, 64), quant_type="nf3")
    weight = quantize_4bit(torch.randn(4, 64))
    with pytest.raises(TypeError, match="dtype"):
        weight.dequantize(torch.int8)
    with pytest.raises(ValueError, match="out"):
        dequantize_4bit(weight, out=torch.empty(64, 4))
    with pytest.raises(ValueError, match="quant_state"):
        NF4Weight.from_bnb(torch.nn.Parameter(torch.randn(4, 64)))


def test_moving_to_a_device_keeps_everything() -> None:
    weight = quantize_4bit(torch.randn(8, 64))
    meta = weight.to("meta")
    assert meta.device.type == "meta" and meta.shape == weight.shape and meta.nested
