"""The bitsandbytes hook: bitsandbytes' values from our kernels, switchable, and never in the way of `import
bitsandbytes`."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftkern.functional
from peftkern import NF4Weight, bnb_backend
from peftkern.formats import nf4
from peftkern.runtime import backends

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from . import stock as theirs  # noqa: E402
from .cases import nightly  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (7, 33), (5,), (50,), (3, 4, 50), (96, 130), (64, 80)]
# since 0.50; it serves calls with and without autograd alike
GEMM = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
OPS = ["quantize_4bit", "dequantize_4bit", "gemv_4bit"] + ["gemm_4bit"] * GEMM
NATIVE = backends.available("cpu")[0]
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """Each test starts without the hook and leaves it as it was; without the native extension the ops run
    their reference."""
    was = bnb_backend.unregister()
    monkeypatch.delenv("PEFTKERN_BNB_BACKEND", raising=False)
    if not NATIVE:
        monkeypatch.setattr(backends, "available", lambda name: (True, "the reference, for the test"))
    yield
    monkeypatch.undo()  # what a test set would keep the hook from coming back, and so from all tests after it
    bnb_backend.unregister()
    assert not was or bnb_backend.register(), bnb_backend.state()


def both(function):
    """What bitsandbytes gives alone, and with our kernels."""
    stock = function()
    assert bnb_backend.register(), bnb_backend.state()
    return stock, function()


def sample(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def codes(packed, numel):
    flat = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:numel].long()


def nearest(packed, absmax, w, blocksize, quant_type):
    """Whether every code is the one nearest to x / absmax, or within 1e-6 of a threshold."""
    values = nf4.code_tensor(quant_type).double()
    scaled = w.flatten().double() / absmax.double().repeat_interleave(blocksize)[: w.numel()]
    distances = (scaled[:, None] - values).abs()
    chosen = distances.gather(1, codes(packed, w.numel())[:, None])
    return bool((chosen <= distances.amin(1, keepdim=True) + 2e-6).all())


@pytest.mark.skipif(not NATIVE, reason="the native extension is not built")
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_token_takes_the_short_way_with_the_same_bits(quant_type, nested, monkeypatch):
    """And what the kernel would misread takes the long one: strides, another dtype of an operand, sizes that
    do not fit."""
    assert bnb_backend.register(), bnb_backend.state()
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("before 0.50 bitsandbytes has no gemm_4bit")
    weight = NF4Weight.from_dense(sample((40, 128)), quant_type=quant_type, nested=nested)
    scales = (
        dict(
            absmax_8bit=weight.absmax_8bit, absmax_code=weight.absmax_code, absmax_offset=weight.absmax_offset
        )
        if nested
        else {}
    )
    absmax, x, bias = (
        weight.nested_absmax if nested else weight.absmax,
        sample((1, 2, 128), torch.bfloat16),
        sample((40,)),
    )
    taken = []
    few_rows = bnb_backend.cpu.few_rows
    monkeypatch.setattr(bnb_backend.cpu, "few_rows", lambda *args: taken.append(few_rows(*args)) or taken[-1])

    def call(x=x, packed=weight.packed, absmax=absmax, bias=bias):
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, [40, 128], absmax, 64, quant_type, bias, **scales)

    y = call()
    assert taken and taken[0] is not None and torch.equal(y, peftkern.functional.linear_4bit(x, weight, bias))
    strided = torch.empty(1, 2, 256, dtype=x.dtype)[..., ::2].copy_(x)
    taken.clear()
    assert torch.equal(call(x=strided), y) and torch.equal(call(absmax=absmax.double()), y) and not taken
    with pytest.raises(ValueError, match="packed"):
        call(packed=weight.packed[:-1])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_quantize_gives_the_same_codes(blocksize, shape, dtype, quant_type):
    """But where x / absmax is within 1e-6 of a threshold, where bitsandbytes' own backends differ among
    themselves."""
    w = sample(shape, dtype)
    assert bnb_backend.register()
    ours, our_absmax = torch.ops.bitsandbytes.quantize_4bit(w, blocksize, quant_type, torch.uint8)
    assert nearest(ours, our_absmax, w, blocksize, quant_type)
    bnb_backend.unregister()
    theirs.need(theirs.quantizes(shape, blocksize), f"it quantizes no {shape} in blocks of {blocksize}")
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(w, blocksize, quant_type, torch.uint8)
    assert ours.shape == packed.shape and ours.dtype == packed.dtype
    assert torch.equal(our_absmax, absmax)
    theirs.need(
        nearest(packed, absmax, w, blocksize, quant_type), f"it takes other than the nearest code of {dtype}"
    )
    ordered = nf4.code_tensor(quant_type).sort().values
    scaled = w.flatten().float() / absmax.repeat_interleave(blocksize)[: w.numel()]
    near = (scaled[:, None] - (ordered[:-1] + ordered[1:]) / 2).abs().amin(1) < 1e-6
    values = nf4.code_tensor(quant_type)
    assert torch.equal(values[codes(ours, w.numel())][~near], values[codes(packed, w.numel())][~near])


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_quant_storage_and_nesting_round_trip(nested, storage):
    w = sample((96, 128), torch.bfloat16)
    options = dict(quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    (packed, state), (ours, our_state) = both(lambda: bnb.functional.quantize_4bit(w, **options))
    assert ours.dtype == packed.dtype == storage and ours.shape == packed.shape
    assert torch.equal(ours.view(torch.uint8), packed.view(torch.uint8)) and torch.equal(
        our_state.absmax, state.absmax
    )
    dense = bnb.functional.dequantize_4bit(packed, state)
    bnb_backend.unregister()
    theirs.need(theirs.decodes((96, 128), 64, "nf4", torch.bfloat16), "its dequantization in bf16")
    assert torch.equal(dense, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 2048])
def test_dequantize_is_bit_equal(blocksize, shape, dtype, quant_type):
    packed, absmax = theirs.quantized(sample(shape), blocksize, quant_type)
    args = packed, absmax, blocksize, quant_type, shape, dtype
    exact = theirs.exact(*args)
    assert bnb_backend.register()
    ours = torch.ops.bitsandbytes.dequantize_4bit(*args)
    assert ours.shape == exact.shape and torch.equal(ours, exact)
    theirs.need(
        theirs.decodes(shape, blocksize, quant_type, dtype),
        f"its dequantization of {shape} in blocks of {blocksize}",
    )
    bnb_backend.unregister()
    assert torch.equal(ours, torch.ops.bitsandbytes.dequantize_4bit(*args))


def linear(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return (
        bnb.nn.Linear4bit(64, 48, compute_dtype=dtype, quant_type="nf4", **options)
        .to("cpu")
        .requires_grad_(False)
    )


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear4bit_forward_and_backward(dtype, nested, m):
    """Error against fp64 at most 1.5 times that of bitsandbytes, for y with and without autograd and for
    dx."""
    layer, x = linear(dtype, compress_statistics=nested), sample((m, 64), dtype)
    layer.bias.data = layer.bias.data.to(dtype)

    def step():
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        with torch.no_grad():
            evaluated = layer(x)
        assert not GEMM or torch.equal(evaluated, y)
        return y.detach(), evaluated, leaf.grad

    stock, ours = both(step)
    weight = NF4Weight.from_bnb(layer).dequantize(torch.float32).double()
    exact = x.double() @ weight.t() + layer.bias.double()
    for got, wanted, truth in zip(ours, stock, (exact, exact, 2 * exact @ weight), strict=True):
        assert got.dtype == wanted.dtype
        assert (got.double() - truth).norm() <= 1.5 * (wanted.double() - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 80), (7, 33)], ids=str)
def test_gemv_takes_plain_weights(shape, quant_type):
    """bitsandbytes' own reads only the repacked layout on CPUs with AVX512_BF16, and may abort the
    process."""
    assert bnb_backend.register()
    packed, state = bnb.functional.quantize_4bit(sample(shape), quant_type=quant_type)
    weight = theirs.exact(packed, state.absmax, 64, quant_type, shape, torch.float32).double()
    x = sample((2, shape[1])).requires_grad_()
    y = bnb.functional.gemv_4bit(x, packed, state=state)
    torch.testing.assert_close(y.double(), x.double() @ weight.t(), rtol=1e-5, atol=1e-5)
    dy = sample((2, shape[0]))
    y.backward(dy)
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=1e-5, atol=1e-5)


# a process of its own says whether bitsandbytes' is right; the test above compares with fp64
@pytest.mark.slow
def test_gemv_of_plain_weights_equals_bitsandbytes():
    theirs.need(theirs.gemv_reads_plain(), "its gemv_4bit of plain weights")
    layer, x = linear(compress_statistics=False), sample((1, 64))
    state = layer.weight.quant_state
    stock, ours = both(lambda: bnb.functional.gemv_4bit(x, layer.weight.data, state=state))
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    "m",
    [1, pytest.param(2, marks=pytest.mark.skipif(not GEMM, reason="before 0.50 gemv_4bit is of one row"))],
)
def test_gemv_compiles(m):
    torch._dynamo.reset()
    packed, state = bnb.functional.quantize_4bit(sample((48, 64)), quant_type="nf4")
    assert bnb_backend.register()

    def gradient(function):
        x = sample((m, 64)).requires_grad_()
        function(x).sum().backward()
        return x.grad

    def gemv(x):
        return bnb.functional.gemv_4bit(x, packed, state=state) + 1

    torch.testing.assert_close(
        gradient(torch.compile(gemv, fullgraph=True, backend="aot_eager")), gradient(gemv)
    )


@pytest.mark.skipif(
    not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"),
    reason="this bitsandbytes repacks no weight",
)
def test_repacked_weights_go_to_bitsandbytes_untouched_where_it_reads_them(monkeypatch):
    x = sample((1, 64), torch.bfloat16)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert bnb_backend.register()
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    seen = []

    class Stock:
        def call_boxed(self, keys, *args):
            seen.append(args)
            return torch.zeros(1, 64, dtype=torch.bfloat16)

    monkeypatch.setitem(bnb_backend._Hook.stock, "gemv_4bit", Stock())
    bnb.matmul_4bit(x, packed, quant_state=state)
    assert (
        len(seen) == 1 and seen[0][1].data_ptr() == packed.data_ptr() and seen[0][3].dtype == torch.bfloat16
    )


def test_compiles():
    torch._dynamo.reset()
    layer, x = linear(), sample((4, 64))
    assert bnb_backend.register()
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


def test_sizes_that_do_not_fit_are_an_error_not_a_crash():
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(sample((64, 64)), 64, "nf4", torch.uint8)
    assert bnb_backend.register()
    with pytest.raises(
        ValueError, match="absmax: got torch.float32 with 8 elements, expected torch.float32 with 64"
    ):
        torch.ops.bitsandbytes.dequantize_4bit(packed, absmax[:8], 64, "nf4", (64, 64), torch.float32)
    with pytest.raises(ValueError, match="packed: got torch.uint8 with 2048 elements"):
        torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", (640, 64), torch.float32)
    if GEMM:
        with pytest.raises(ValueError, match="packed: got torch.uint8 with 2048 elements"):
            torch.ops.bitsandbytes.gemm_4bit(sample((2, 64)), packed, (640, 64), absmax, 64, "nf4")


def test_what_our_kernels_do_not_take_goes_to_bitsandbytes():
    w = sample((8, 64)).double()

    def outcome():
        try:
            return torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
        except RuntimeError as error:  # before 0.50
            return torch.tensor([]), str(error)

    stock, ours = both(outcome)
    assert torch.equal(stock[0], ours[0])
    assert ours[1] == stock[1] if isinstance(stock[1], str) else torch.equal(stock[1], ours[1])


def overridden():
    return [name for name in OPS if torch._C._dispatch_dump(f"bitsandbytes::{name}").count("bnb_backend.py")]


def test_register_is_idempotent_and_unregister_undoes_it():
    assert bnb_backend.register() and bnb_backend.register()
    repacks = "; no weight is repacked" if hasattr(bnb.nn.modules, "_convert_weight_packed_for_cpu") else ""
    assert bnb_backend.state() == (True, f"overrides {', '.join(OPS)}{repacks}")
    assert overridden() == OPS
    assert bnb_backend.unregister() and not bnb_backend.unregister()
    assert bnb_backend.state() == (False, "unregistered by the caller")
    assert overridden() == []


@pytest.mark.parametrize("value", ["0", "false", " OFF "])
def test_switched_off_by_the_environment(value, monkeypatch):
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", value)
    assert not bnb_backend.register()
    assert bnb_backend.state() == (False, "switched off by PEFTKERN_BNB_BACKEND") and overridden() == []


def test_without_the_native_extension_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda name: (False, "the native extension is not built"))
    assert not bnb_backend.register()
    assert bnb_backend.state() == (False, "the native extension is not built") and overridden() == []


def test_an_op_with_other_arguments_is_left_alone(monkeypatch):
    monkeypatch.setitem(bnb_backend._ARGUMENTS, "gemv_4bit", ("A", "B"))
    assert bnb_backend.register()
    assert "; left as they are, unknown arguments: gemv_4bit" in bnb_backend.state()[1]
    assert "gemv_4bit" not in overridden()


def test_a_failure_is_logged_and_leaves_bitsandbytes_whole(monkeypatch, caplog):
    monkeypatch.setitem(bnb_backend._KERNELS, "gemv_4bit", None)
    with caplog.at_level(logging.WARNING):
        assert not bnb_backend.register()
    assert len(caplog.records) == 1 and "bitsandbytes keeps its own CPU kernels" in caplog.text
    assert bnb_backend.state()[1].startswith("registration failed: ") and overridden() == []


@pytest.mark.parametrize("value", nightly(["1", "0"], quick=["1"]))  # "0" within this process: above
def test_importing_bitsandbytes_registers_through_the_entry_point(value, tmp_path):
    """In a fresh process, with the package's metadata on the path: bitsandbytes imports us while it is itself
    half imported."""
    info = tmp_path / "peftkern-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peftkern\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[bitsandbytes.backends]\npeftkern = peftkern.bnb_backend:register\n"
    )
    program = "import bitsandbytes, peftkern.bnb_backend as b; print(b.state()[0])"
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "PEFTKERN_BNB_BACKEND": value, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(value == "1" and NATIVE)] and "Overriding" not in result.stderr
