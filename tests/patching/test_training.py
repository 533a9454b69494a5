"""A patched model inside the things people wrap around it: checkpointing, autocast, compile, generate,
optimizers."""

import copy

import pytest
import torch

import peftkern
from peftkern.patching import weights

from . import models

BOTH = pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])


def patched(dtype=torch.float32, four_bit=True, layers=2, **options):
    model = models.lora(models.llama(dtype, four_bit=four_bit, layers=layers), **options)
    peftkern.patch(model)
    return model.train()


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant, dropout, four_bit, calls):
    model = patched(four_bit=four_bit, lora_dropout=dropout)
    torch.manual_seed(5)
    expected = models.run(model)
    calls.clear()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(5)
    got = models.run(model)
    assert calls["lora"] == 28  # the forward ran twice
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)


def test_dropout_is_drawn_in_training_only_and_follows_the_seed():
    model = patched(lora_dropout=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(models.run(model)["logits"])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    model.eval()
    plain = models.run(model)["logits"]
    peftkern.unpatch(model)
    torch.testing.assert_close(plain, models.run(model)["logits"], rtol=1e-4, atol=1e-5)


def test_dropout_has_the_mean_of_no_dropout():
    model = patched(lora_dropout=0.3)
    layer, x = models.first(model), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([layer(x) for _ in range(600)])
        exact = layer.eval()(x)
    error = (samples.mean(0) - exact).abs() / (samples.std(0) / 600**0.5)
    assert error.max() < 5 and samples.std(0).min() > 0  # 256 means, 5 standard errors


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_trains_like_stock(dtype, four_bit, calls):
    model = models.lora(models.llama(dtype, four_bit=four_bit))
    exact = models.run(models.in_fp64(model))
    results = []
    for step in (lambda: None, lambda: peftkern.patch(model)):
        step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(models.run(model))
    assert calls["lora"] == 14 and calls.dtype == torch.bfloat16
    assert {n: t.dtype for n, t in results[0].items()} == {n: t.dtype for n, t in results[1].items()}
    stock, ours = (models.errors(result, exact) for result in results)
    for name in stock:
        # one sample, not an average: twice, and a rounding
        assert ours[name] <= 2 * stock[name] + 2.0**-8, name


@pytest.mark.any_isa
@pytest.mark.parametrize(
    "four_bit, dropout, backend",
    [
        (True, 0.1, "aot_eager"),
        pytest.param(False, 0.0, "aot_eager", marks=pytest.mark.slow),
        pytest.param(True, 0.0, "inductor", marks=pytest.mark.slow),
        pytest.param(True, 0.1, "inductor", marks=pytest.mark.slow),
        pytest.param(False, 0.1, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_fullgraph_forward_and_backward(four_bit, dropout, backend):
    torch._dynamo.reset()
    model = patched(four_bit=four_bit, layers=1, lora_dropout=dropout)
    expected = models.run(model.eval())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = models.run(compiled)
    torch.testing.assert_close(list(got.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    model.train()
    first = models.run(compiled)
    assert dropout == 0.0 or first["loss"] != got["loss"]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = models.run(compiled)
    assert second["loss"] != first["loss"]


@pytest.mark.any_isa
def test_compile_sees_a_merged_weight():
    torch._dynamo.reset()
    model = patched()
    layer = models.first(model)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(x), layer(x))
    layer.base_layer.weight = models.linear_4bit(torch.nn.Linear(64, 64, bias=False), torch.float32).weight
    torch.testing.assert_close(compiled(x), layer(x))


@BOTH
def test_generate(four_bit, calls):
    model = models.lora(models.llama(four_bit=four_bit)).eval()
    options = dict(
        input_ids=models.IDS[:, :4],
        max_new_tokens=6,
        do_sample=False,
        attention_mask=torch.ones(2, 4, dtype=torch.long),
    )
    expected = model.generate(**options)
    peftkern.patch(model)
    assert torch.equal(model.generate(**options), expected)
    assert calls["lora"] == 14 * 6


@BOTH
def test_training_after_inference_mode(four_bit):
    """A view made in inference mode must not end up among the saved tensors."""
    model = patched(four_bit=four_bit)
    with torch.inference_mode():
        model(input_ids=models.IDS)
    assert len(models.run(model)) == 2 + 28


@BOTH
def test_ten_steps_follow_stock(four_bit):
    stock = models.lora(models.llama(four_bit=four_bit))
    ours = copy.deepcopy(stock)
    peftkern.patch(ours)
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(10):
            curve.append(models.run(model)["loss"].item())
            optimizer.step()
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    assert losses[1][-1] < 0.85 * losses[1][0]


def test_the_saved_tensors_are_the_packed_weight_and_small_ones():
    model = patched(torch.bfloat16, lora_dropout=0.1)
    layer, x = models.first(model), torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    packed = layer.base_layer.weight.data_ptr()
    assert any(t.data_ptr() == packed for t in saved) and any(t.data_ptr() == x.data_ptr() for t in saved)
    allowed = {(32, 64), (32, 4), (4, 64), (64, 4)}
    big = [t for t in saved if t.is_floating_point() and t.numel() > 256 and t.data_ptr() != x.data_ptr()]
    assert all(tuple(t.shape) in allowed - {(32, 64)} for t in big), [tuple(t.shape) for t in big]


REPACKS = pytest.mark.skipif(
    not hasattr(models.bnb.functional, "_convert_weight_packed_for_cpu"),
    reason="this bitsandbytes repacks no weight",
)


def repacked_linear(dtype, nested, out_features=64):
    """A Linear4bit as a stock evaluation leaves it on CPUs with AVX512_BF16; that is plain PyTorch and can be
    done on any machine. Also its weight as it was."""
    torch.manual_seed(0)
    base = models.linear_4bit(torch.nn.Linear(256, out_features).to(dtype), dtype, nested)
    before = copy.deepcopy(base.weight)
    base.weight.data, base.weight.quant_state = models.bnb.functional._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    assert weights.repacked(base)
    return base, before


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


LOST = {
    (torch.bfloat16, False): "nothing was lost",
    (torch.float16, False): "its absmax stays rounded to bf16",
    (torch.float32, False): "its absmax stays rounded to bf16",
    (torch.bfloat16, True): "its absmax was rounded to bf16 and quantized again",
    (torch.float32, True): "its absmax was rounded to bf16 and quantized again",
}


@pytest.mark.parametrize(("dtype", "nested"), LOST, ids=str)
@REPACKS
def test_a_repacked_weight_is_unpacked_and_what_was_lost_is_reported(dtype, nested):
    base, before = repacked_linear(dtype, nested, out_features=512)
    (row,) = peftkern.patch(torch.nn.Sequential(base)).rows
    assert (
        row.got == "linear_4bit"
        and row.note == f"unpacked from bitsandbytes' CPU inference layout: {LOST[dtype, nested]}"
    )
    assert torch.equal(base.weight.data, before.data) and base.weight.quant_state is base.quant_state
    state, old = base.quant_state, before.quant_state
    assert state.dtype == dtype and state.nested is nested and state.absmax.dtype == old.absmax.dtype
    error = relative_error(
        *(peftkern.NF4Weight.from_bnb(weight).dequantize(torch.float32) for weight in (base.weight, before))
    )
    bound = {"nothing was lost": 0.0, "its absmax stays rounded to bf16": 2.0**-9}.get(
        LOST[dtype, nested], 2.0**-8
    )
    assert error <= bound
    if (
        dtype == torch.bfloat16 and nested
    ):  # its nested absmax is exact, nearly all codes too: quantizing anew what was rounded loses 10 x more
        assert torch.equal(state.offset, old.offset) and torch.equal(state.state2.absmax, old.state2.absmax)
        assert (state.absmax != old.absmax).float().mean() < 0.01 and error < 2.0**-11
    x = torch.randn(3, 256, dtype=dtype).requires_grad_()
    base(x).sum().backward()  # bitsandbytes' layout has no gradient
    assert x.grad is not None
    assert peftkern.patch(torch.nn.Sequential(base)).rows[0].note == ""


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@REPACKS
def test_an_unpacked_weight_has_its_bytes_in_the_storage_it_had(storage):
    base = models.linear_4bit(torch.nn.Linear(128, 64).bfloat16(), torch.bfloat16, False, storage=storage)
    before = copy.deepcopy(base.weight)
    base.weight.data, base.weight.quant_state = models.bnb.functional._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    peftkern.patch(torch.nn.Sequential(base))
    assert base.weight.dtype == storage and torch.equal(
        base.weight.data.view(torch.uint8), before.data.view(torch.uint8)
    )
    assert base.weight.shape == before.shape


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@REPACKS
def test_what_bitsandbytes_own_way_back_leaves_is_put_right(nested):
    """Saving a repacked layer brings it back: with a plain absmax still transposed, or the offset of a nested
    one in the weight's dtype."""
    base, before = repacked_linear(torch.bfloat16, nested)
    base.state_dict()
    (row,) = peftkern.patch(torch.nn.Sequential(base)).rows
    assert row.got == "linear_4bit" and row.note.endswith(LOST[torch.bfloat16, nested])
    error = relative_error(
        *(peftkern.NF4Weight.from_bnb(weight).dequantize(torch.float32) for weight in (base.weight, before))
    )
    assert error <= (0.01 if nested else 0.0)
    assert not nested or base.quant_state.offset.dtype == torch.float32


@REPACKS
def test_a_weight_repacked_after_patching_goes_to_stock(calls):
    model = models.lora(models.llama(torch.bfloat16))
    peftkern.patch(model)
    layer = models.first(model)
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        layer(x)
    assert calls["lora"] == 1
    convert = models.bnb.functional._convert_weight_packed_for_cpu
    base = layer.base_layer
    base.weight.data, base.weight.quant_state = convert(base.weight.data, base.weight.quant_state)
    assert layer.forward.cache.operands(base, x) is None


def test_eval_never_repacks(monkeypatch):
    model = models.lora(models.llama(torch.bfloat16))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    peftkern.patch(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=models.IDS)
        with model.disable_adapter():
            model(input_ids=models.IDS)
    assert not any(weights.repacked(layer.base_layer) for layer in models.lora_layers(model).values())
