"""PEFT's merge, unmerge and unload of a patched model: rounded once, undone to the byte, every kind."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import peftkern
from peftkern import NF4Weight
from peftkern.functional import quantize_4bit
from peftkern.patching import merged
from tests.adapters import merging
from tests.adapters.merging import KINDS, adapted, assert_same, layers, logits, snapshot
from tests.patching import models

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
FORMATS = {
    "nested": {},
    "plain": {"nested": False},
    "fp4": {"quant_type": "fp4"},
    "bf16 storage": {"storage": torch.bfloat16},
}


@BASES
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_to_the_byte(kind, four_bit):
    model = adapted(kind, four_bit=four_bit)
    peftkern.patch(model)
    before, outputs = snapshot(model), logits(model)
    for _ in range(3):
        model.merge_adapter()
        merged = snapshot(model)
        changed = [name for name, value in merged.items() if not torch.equal(value, before[name])]
        assert changed and not any("lora" in name for name in changed)
        model.unmerge_adapter()
        assert_same(model, before)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back_and_is_rounded_once(name):
    model = adapted(**FORMATS[name])
    peftkern.patch(model)
    before = snapshot(model)
    want = {}
    for path, layer in layers(model).items():
        weight = NF4Weight.from_bnb(layer.base_layer)
        goal = merging.defined(weight.dequantize(torch.float32), merging.branches(layer)).float()
        once = quantize_4bit(goal, quant_type=weight.quant_type, nested=weight.nested)
        want[path] = once.dequantize(torch.float32)
    model.merge_adapter()
    for path, layer in layers(model).items():
        got = NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32)
        # The sum in fp64 may put a code, or the 8-bit code of a block's absmax, to the other side of a tie.
        assert (got - want[path]).norm() <= 2e-3 * want[path].norm()
        assert layer.base_layer.weight.dtype == (torch.bfloat16 if name == "bf16 storage" else torch.uint8)
    model.unmerge_adapter()
    assert_same(model, before)


@BASES
def test_adapters_merged_one_after_the_other_are_rounded_once(four_bit):
    one, two = (adapted(four_bit=four_bit) for _ in range(2))
    for model in (one, two):
        merging.add(model, "second", r=3)
        model.base_model.set_adapter(["default", "second"])
        peftkern.patch(model)
    before = snapshot(one)
    one.merge_adapter()
    two.merge_adapter(["default"])
    two.merge_adapter(["second"])
    assert_same(one, snapshot(two))
    assert next(iter(layers(two).values())).merged_adapters == ["default", "second"]
    two.unmerge_adapter()
    assert_same(two, before)


@BASES
@pytest.mark.parametrize("kinds", [("lora", "dora"), ("dora", "lora"), ("dora", "dora")])
def test_several_kinds_merge_to_what_they_compute(kinds, four_bit):
    """Against the stock forward: the dense base to fp32 rounding, the 4-bit one by definition."""
    model = adapted(kinds[0], four_bit=four_bit)
    merging.add(model, "second", r=3, use_dora=kinds[1] == "dora")
    model.base_model.set_adapter(["default", "second"])
    stock = copy.deepcopy(model)
    merging.install(model)
    if not four_bit:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=1e-4)
        return
    layer = models.first(model)
    goal = merging.defined(
        NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32),
        merging.branches(layer, ("default", "second")),
    )
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        want = (x.double() @ goal.t()).float()
        torch.testing.assert_close(models.first(stock)(x), want, rtol=1e-4, atol=1e-4)
    layer.merge()
    error = NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32).double() - goal
    assert error.norm() < 0.12 * goal.norm()


def test_bias_is_merged_with_its_scaling_and_without_a_bias_named():
    model = adapted("bias", four_bit=True)
    peftkern.patch(model)
    layer = models.first(model) if models.first(model).base_layer.bias is not None else None
    layer = layer or next(layer for layer in layers(model).values() if layer.base_layer.bias is not None)
    before, own = layer.base_layer.bias, layer.lora_B["default"].bias
    layer.merge()
    torch.testing.assert_close(layer.base_layer.bias, before + layer.scaling["default"] * own)
    layer.unmerge()
    assert layer.base_layer.bias is before


@BASES
def test_deepcopy_and_pickle_of_a_merged_model_unmerge_too(four_bit):
    for how in models.COPIES:
        model = adapted(four_bit=four_bit)
        peftkern.patch(model)
        before = snapshot(model)
        model.merge_adapter()
        other = models.copied(model, how)
        assert_same(other, snapshot(model))
        other.unmerge_adapter()
        assert_same(other, before)
        assert next(iter(layers(model).values())).merged  # the model itself is as it was
        model.unmerge_adapter()
        assert_same(model, before)


@BASES
def test_unpatching_keeps_the_way_back_of_what_is_merged(four_bit):
    model = adapted(four_bit=four_bit)
    peftkern.patch(model)
    before = snapshot(model)
    first, *others = layers(model).values()
    first.merge()
    peftkern.unpatch(model)
    assert "merge" in first.__dict__ and not any("merge" in layer.__dict__ for layer in others)
    model.unmerge_adapter()
    assert_same(model, before)
    assert not {"merge", "unmerge"} & first.__dict__.keys()


def test_excluded_layers_and_unpatched_models_keep_pefts_merge():
    model = adapted()
    peftkern.patch(model, exclude=["layers.1"])
    kept = {name for name, layer in layers(model).items() if "merge" in layer.__dict__}
    assert kept and all("layers.0" in name for name in kept)
    peftkern.unpatch(model)
    assert not any("merge" in layer.__dict__ for layer in layers(model).values())
    assert type(first := models.first(model)).merge is type(first).__dict__["merge"]


@BASES
def test_disabling_merged_adapters_unmerges_them(four_bit):
    model = adapted(four_bit=four_bit)
    peftkern.patch(model)
    before = snapshot(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert_same(model, before)


def test_unloading_a_dense_model_frees_the_old_weights_as_it_goes(monkeypatch):
    """A layer and its forward refer to each other: only the garbage collector frees the weights."""
    model = adapted(four_bit=False)
    peftkern.patch(model)
    old = [weakref.ref(layer.base_layer.weight) for layer in layers(model).values()]
    monkeypatch.setattr(merged, "_COLLECTED_FROM", 30_000)  # two weights
    gc.collect()
    gc.disable()
    try:
        model.merge_and_unload()
        alive = sum(reference() is not None for reference in old)
    finally:
        gc.enable()
    assert alive <= 4


@BASES
def test_unload_leaves_no_trace(four_bit):
    model, other = adapted(four_bit=four_bit), adapted(four_bit=four_bit)
    for one in (model, other):
        peftkern.patch(one)
    other.merge_adapter()
    outputs = logits(other)
    plain = model.merge_and_unload()
    assert not layers(plain)
    torch.testing.assert_close(logits(plain), outputs, rtol=1e-5, atol=1e-5)
    peftkern.unpatch(plain)
    assert not [module for module in plain.modules() if any("peftkern" in key for key in module.__dict__)]


def test_a_tied_head_is_untied_and_tied_again():
    config = models.transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = models.transformers.LlamaForCausalLM(config)
    model = models.peft.get_peft_model(base, models.config(target_modules=["lm_head", "q_proj"]))
    models.randomize(model)
    merging.fill(model)
    peftkern.patch(model.eval())
    outputs = logits(model)
    embeddings = model.get_base_model().get_input_embeddings().weight
    model.merge_adapter()
    head = model.get_base_model().lm_head.base_layer.weight
    assert head is not embeddings and model.get_base_model().get_input_embeddings().weight is embeddings
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert model.get_base_model().lm_head.base_layer.weight is embeddings


@pytest.mark.parametrize("target", ["embed_tokens", "wte", "c_attn"])
def test_embeddings_and_conv1d(target):
    if target == "embed_tokens":
        model = models.lora(models.llama(four_bit=False), target_modules=["embed_tokens", "q_proj"])
    else:
        config = models.transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)
        torch.manual_seed(0)
        base = models.transformers.GPT2LMHeadModel(config)
        options = {"target_modules": [target], "fan_in_fan_out": target == "c_attn"}
        model = models.peft.get_peft_model(base, models.config(**options))
    merging.fill(model)
    peftkern.patch(model.eval(), dense=True)
    before, outputs = snapshot(model), logits(model)
    model.merge_adapter()
    layer = next(layer for name, layer in layers(model).items() if target in name)
    name = next(name for name in before if target in name and "base_layer.weight" in name)
    assert not torch.equal(layer.base_layer.weight, before[name])
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_same(model, before)


def test_other_variants_get_pefts_own_answer():
    model = adapted()
    peftkern.patch(model)
    layer = models.first(model)

    class Arrow:
        @staticmethod
        def merge_safe(*args):
            raise RuntimeError("Cannot merge an active Arrow router adapter.")

    layer.lora_variant["default"] = Arrow()
    with pytest.raises(RuntimeError, match="Arrow"):
        layer.merge()
    assert not layer.merged


def test_nan_is_named_and_nothing_is_merged():
    model = adapted()
    peftkern.patch(model)
    layer, before = models.first(model), snapshot(model)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    told = "NaNs detected in the merged weights: adapter 'default' holds NaN or inf"  # PEFT's words first
    with pytest.raises(ValueError, match=told):
        layer.merge()
    assert not layer.merged and layer.base_layer.weight is not None
    name = next(name for name in before if name.endswith("0.self_attn.o_proj.lora_B.default.weight"))
    layer.lora_B["default"].weight.data = before[name]
    assert_same(model, before)


def test_warnings_are_pefts():
    model = adapted()
    peftkern.patch(model)
    layer = models.first(model)
    layer.merge()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.merge()
        layer.unmerge()
        layer.unmerge()
    text = " ".join(str(item.message) for item in caught)
    assert "already merged" in text and "Already unmerged" in text and "rounding errors" not in text


def test_a_repacked_weight_is_merged_in_the_plain_format():
    """bitsandbytes' CPU inference path repacks a weight; its bytes then are in another layout."""
    model = adapted(dtype=torch.bfloat16)
    layer = models.first(model)
    weight = NF4Weight.from_bnb(layer.base_layer)
    base = weight.dequantize(torch.float32)
    if not getattr(layer.base_layer, "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU's bitsandbytes repacks nothing")
    with torch.no_grad():
        nn.Module.__call__(layer.base_layer, torch.randn(2, layer.in_features, dtype=torch.bfloat16))
    peftkern.patch(model)
    layer.merge()
    merged = NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32).double()
    goal = merging.defined(base, merging.branches(layer))
    assert (merged - goal).norm() < 0.12 * goal.norm()
