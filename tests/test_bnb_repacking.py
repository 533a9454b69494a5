"""The hook where bitsandbytes would repack its weights: every test makes stock repack on any CPU, and shows
that it does."""

import copy
import importlib
import io

import pytest
import torch

from peftkern import NF4Weight, bnb_backend, use_backend
from peftkern.formats.bnb_repacked import codes_in_row_order, keep_plain, plain_absmax
from peftkern.runtime import backends

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
modules = importlib.import_module("bitsandbytes.nn.modules")
if not hasattr(modules, "_convert_weight_packed_for_cpu"):
    pytest.skip(f"bitsandbytes {bnb.__version__} does not repack weights", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NESTED = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])


@pytest.fixture(autouse=True)
def repacking(monkeypatch):
    """Every layer believes it is on a CPU with AVX512_BF16; the hook is out, and as it was afterwards."""
    was = bnb_backend.unregister()
    monkeypatch.delenv("PEFTKERN_BNB_BACKEND", raising=False)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    if not backends.available("cpu")[0]:
        monkeypatch.setattr(backends, "available", lambda name: (True, "the reference, for the test"))
    yield
    monkeypatch.undo()  # what a test set would keep the hook from coming back, and so from all tests after it
    bnb_backend.unregister()
    assert not was or bnb_backend.register(), bnb_backend.state()


def linear(out_features=64, in_features=128, dtype=torch.float32, nested=True, **options):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=nested,
        **options,
    )
    layer = layer.to(dtype).to("cpu").requires_grad_(False)
    assert layer.support_avx512bf16_for_cpu
    return layer


def repacked(layer):
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def evaluate(layer, x):
    layer.eval()
    with torch.no_grad():
        return layer(x)


def gradient(layer, x):
    layer.train()
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    return leaf.grad


def dense(layer):
    """The layer's weight in fp64, of its exact codes and its absmax as it is, by the reference."""
    with use_backend("reference"):
        return NF4Weight.from_bnb(layer).dequantize(torch.float32).double()


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_stock_repacks():
    """What the other tests guard against; it also shows that this fixture drives it."""
    layer, x = linear(), torch.randn(3, 128)
    evaluate(layer, x)
    assert repacked(layer) and layer.weight.quant_state.absmax.dtype == torch.bfloat16


@NESTED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_after_an_evaluation(dtype, nested):
    layer, x = linear(dtype=dtype, nested=nested), torch.randn(5, 128, dtype=dtype)
    assert bnb_backend.register(), bnb_backend.state()
    state, data = layer.weight.quant_state, layer.weight.data.clone()
    absmax = state.absmax.clone()
    first = gradient(layer, x)
    y = evaluate(layer, x)
    with torch.inference_mode():
        assert relative_error(layer(x[:1]), y[:1].double()) < 0.01
    assert torch.equal(gradient(layer, x), first)
    assert (
        layer.weight.quant_state is state
        and torch.equal(state.absmax, absmax)
        and torch.equal(layer.weight.data, data)
    )
    exact = x.double() @ dense(layer).t() + layer.bias.double()
    bound = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 2e-3}[dtype]
    assert relative_error(y, exact) < bound
    assert relative_error(first, 2 * exact @ dense(layer)) < bound


@NESTED
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(48, 64), (64, 80), (7, 96), (1, 64), (33, 34)], ids=str)
def test_shapes_that_cannot_be_repacked_are_evaluated(shape, rows, nested):
    layer, x = linear(*shape, nested=nested), torch.randn(rows, shape[1])
    with pytest.raises((AssertionError, RuntimeError)):
        evaluate(copy.deepcopy(layer), x)
    assert bnb_backend.register()
    exact = x.double() @ dense(layer).t() + layer.bias.double()
    assert relative_error(evaluate(layer, x), exact) < 1e-6
    assert relative_error(gradient(layer, x), 2 * exact @ dense(layer)) < 1e-6


def test_unregister_lets_it_repack_again_and_register_stops_it():
    layers, x = [linear() for _ in range(3)], torch.randn(2, 128)
    stock = modules._convert_weight_packed_for_cpu
    assert bnb_backend.register() and "no weight is repacked" in bnb_backend.state()[1]
    evaluate(layers[0], x)
    built_meanwhile = linear()
    assert bnb_backend.unregister() and modules._convert_weight_packed_for_cpu is stock
    evaluate(layers[1], x)
    evaluate(built_meanwhile, x)
    assert bnb_backend.register()
    evaluate(layers[2], x)
    assert [repacked(layer) for layer in (*layers, built_meanwhile)] == [False, True, False, True]


def test_switched_off_it_repacks(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", "0")
    assert not bnb_backend.register()
    layer = linear()
    evaluate(layer, torch.randn(2, 128))
    assert repacked(layer)


def test_suspended_is_stock_inside_and_the_hook_outside():
    assert bnb_backend.register()
    inside, outside, x = linear(), linear(), torch.randn(2, 128)
    with bnb_backend.suspended():
        assert not bnb_backend.state()[0]
        evaluate(inside, x)
    evaluate(outside, x)
    assert bnb_backend.state()[0] and repacked(inside) and not repacked(outside)
    bnb_backend.unregister()
    with bnb_backend.suspended():
        pass
    assert not bnb_backend.state()[0]


def test_another_replacement_of_the_function_is_left_alone(monkeypatch):
    stock = modules._convert_weight_packed_for_cpu
    assert bnb_backend.register() and modules._convert_weight_packed_for_cpu is not stock

    def others(qweight, quant_state):
        return qweight, quant_state

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", others)
    bnb_backend.unregister()
    assert modules._convert_weight_packed_for_cpu is others
    monkeypatch.undo()
    modules._convert_weight_packed_for_cpu = stock


def test_ours_given_back_to_the_name_while_unregistered_is_not_taken_for_stock(monkeypatch):
    stock = modules._convert_weight_packed_for_cpu
    bnb_backend.register()
    with monkeypatch.context() as patch:
        patch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *args: args)
        bnb_backend.unregister()
    assert bnb_backend.register() and bnb_backend.unregister()
    assert modules._convert_weight_packed_for_cpu is stock


def test_a_function_with_other_arguments_is_left_alone(monkeypatch):
    def newer(layer):
        raise NotImplementedError

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", newer)
    assert bnb_backend.register()
    assert "repacking is left as it is, unknown arguments" in bnb_backend.state()[1]
    assert modules._convert_weight_packed_for_cpu is newer


def test_a_version_that_does_not_repack(monkeypatch):
    monkeypatch.delattr(modules, "_convert_weight_packed_for_cpu")
    assert bnb_backend.register() and "repack" not in bnb_backend.state()[1]
    assert bnb_backend.unregister() and not hasattr(modules, "_convert_weight_packed_for_cpu")


def test_evaluation_compiles():
    torch._dynamo.reset()
    layer, x = linear().eval(), torch.randn(4, 128)
    assert bnb_backend.register()
    expected = evaluate(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert not repacked(layer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_made_after_an_evaluation_are_whole(how):
    layer, x = linear(), torch.randn(4, 128)
    assert bnb_backend.register()
    y = evaluate(layer, x)
    if how == "deepcopy":
        copied = copy.deepcopy(layer)
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        copied = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        copied, saved = linear(), layer.state_dict()
        copied.weight = bnb.nn.Params4bit.from_prequantized(
            saved["weight"],
            {k: v for k, v in saved.items() if k.startswith("weight.")},
            device="cpu",
            module=copied,
        )
        copied.bias = layer.bias
    assert torch.equal(evaluate(copied, x), y) and torch.equal(gradient(copied, x), gradient(layer, x))


@NESTED
@pytest.mark.parametrize("reader", ["bitsandbytes", "ours"])
def test_a_layer_repacked_before_the_hook_has_values_and_gradients(nested, reader, monkeypatch):
    """Its absmax is rounded for good, but it evaluates, trains and decodes by what it has left."""
    layer, x = linear(nested=nested), torch.randn(5, 128)
    whole = dense(layer)
    evaluate(layer, x)
    assert repacked(layer)
    if reader == "ours":  # a CPU whose bitsandbytes cannot read the layout
        monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: False)
    elif not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes reads its own layout only on CPUs with AVX512_BF16")
    assert bnb_backend.register()
    assert (
        relative_error(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), whole)
        < 0.003
    )
    exact = x.double() @ whole.t() + layer.bias.double()
    assert relative_error(evaluate(layer, x), exact) < 0.005
    assert relative_error(evaluate(layer, x[:1]), exact[:1]) < 0.005
    assert relative_error(gradient(layer, x), 2 * exact @ whole) < 0.01


def test_a_plain_absmax_that_bitsandbytes_has_left_transposed_is_read_rightly():
    """Saving a repacked layer brings its bytes back to the plain layout, but not a plain absmax."""
    layer, x = linear(dtype=torch.bfloat16, nested=False), torch.randn(5, 128).bfloat16()
    exact = x.double() @ dense(layer).t() + layer.bias.double()
    weight = dense(layer)
    evaluate(layer, x)
    layer.state_dict()
    assert not repacked(layer) and layer.weight.quant_state.absmax.dim() == 2
    assert bnb_backend.register()
    assert torch.equal(
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight.bfloat16()
    )
    assert relative_error(evaluate(layer, x), exact) < 0.01
    assert relative_error(gradient(layer, x), 2 * exact @ weight) < 0.02


@pytest.mark.parametrize("shape", [(32, 64), (96, 320), (64, 64)], ids=str)
def test_codes_in_row_order_undoes_the_interleaving(shape):
    weight, state = bnb.functional.quantize_4bit(torch.randn(shape), quant_type="nf4")
    absmax = state.absmax.clone()
    packed, packed_state = bnb.functional._convert_weight_packed_for_cpu(weight, copy.deepcopy(state))
    assert torch.equal(codes_in_row_order(packed, shape), weight)
    assert torch.equal(codes_in_row_order(packed.t(), shape), weight)
    assert torch.equal(plain_absmax(packed_state.absmax, shape, 64), absmax.bfloat16().float())
    assert torch.equal(plain_absmax(absmax, shape, 64), absmax)


def test_codes_of_another_size_are_an_error():
    with pytest.raises(ValueError, match=r"packed: got 64 bytes, expected 4096 for shape \(64, 128\)"):
        codes_in_row_order(torch.zeros(64, 1, dtype=torch.uint8), (64, 128))


def test_keep_plain_is_of_the_instances_alone():
    model, x = torch.nn.Sequential(linear(), torch.nn.ReLU(), linear(128, 64)), torch.randn(2, 128)
    assert keep_plain(model) == 2 and keep_plain(model) == 0
    evaluate(model, x)
    assert not repacked(model[0]) and not repacked(model[2]) and linear().support_avx512bf16_for_cpu
