"""The life of adapters on a patched model: each step gives what stock PEFT gives."""

import copy
import warnings

import pytest
import torch

import peftkern

from . import models
from .versions import COUNTED

BOTH = pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=models.IDS, **options).logits


def pair(four_bit, **options):
    """A stock model and its patched twin."""
    stock = models.lora(models.llama(four_bit=four_bit), **options)
    patched = copy.deepcopy(stock)
    peftkern.patch(patched)
    return stock, patched


def check(stock, patched, **options):
    torch.testing.assert_close(logits(patched, **options), logits(stock, **options), rtol=1e-4, atol=1e-4)


@BOTH
def test_add_set_and_delete(four_bit, calls):
    stock, patched = pair(four_bit)
    first = logits(patched)
    for model in (stock, patched):
        torch.manual_seed(3)
        model.add_adapter("second", models.config(r=6, lora_alpha=3, use_rslora=True))
        models.randomize(model)
        model.set_adapter("second")
    calls.clear()
    check(stock, patched)
    assert calls["lora"] == 14
    assert not torch.allclose(logits(patched), first, rtol=1e-3, atol=1e-3)
    for model in (stock, patched):
        model.set_adapter("default")
        model.delete_adapter("second")
    check(stock, patched)
    assert list(stock.state_dict()) == list(patched.state_dict())


@BOTH
def test_only_the_active_adapter_is_trained(four_bit):
    _, patched = pair(four_bit)
    patched.add_adapter("second", models.config())
    models.randomize(patched)
    patched.set_adapter("second")
    names = [name for name in models.run(patched) if "lora" in name]
    assert len(names) == 28 and all(".second." in name for name in names)


@BOTH
def test_disable_adapter(four_bit, calls):
    stock, patched = pair(four_bit)
    enabled = logits(patched)
    calls.clear()
    with stock.disable_adapter(), patched.disable_adapter():
        check(stock, patched)
        assert calls["lora"] == 0 and calls["linear"] == (14 if four_bit else 0)
        assert not torch.allclose(logits(patched), enabled, atol=1e-2)
    assert torch.equal(logits(patched), enabled)


@BOTH
def test_merge_and_unmerge(four_bit, calls):
    stock, patched = pair(four_bit)
    before = logits(patched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.merge_adapter(), patched.merge_adapter()
    calls.clear()
    check(stock, patched)
    assert calls["lora"] == 0
    assert list(stock.state_dict()) == list(patched.state_dict())
    patched.unmerge_adapter()  # stock has lost its bytes
    assert torch.equal(logits(patched), before) and calls["lora"] == 14


def test_a_merged_weight_is_not_read_from_the_cache():
    """merge() puts a new Params4bit on the base layer; forgetting the old bytes is what this guards."""
    _, patched = pair(True)
    layer = models.first(patched)
    old = layer.base_layer.weight
    logits(patched)
    cache = layer.forward.cache
    assert cache is layer.base_layer.forward.cache and cache._view.packed.data_ptr() == old.data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.merge_adapter()
    logits(patched)
    assert cache._view.packed.data_ptr() == layer.base_layer.weight.data_ptr() != old.data_ptr()


@BOTH
def test_merge_and_unload(four_bit, calls):
    stock, patched = pair(four_bit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, patched = stock.merge_and_unload(), patched.merge_and_unload()
    assert not models.lora_layers(patched)
    assert [type(module) for module in stock.modules()] == [type(module) for module in patched.modules()]
    calls.clear()
    check(stock, patched)
    assert calls == ({"linear": 14} if four_bit else {})
    assert peftkern.unpatch(patched) == (14 if four_bit else 0) + 11 or not COUNTED
    assert torch.equal(logits(patched), logits(stock))


@BOTH
def test_mixed_batch_in_evaluation_as_peft_passes_it(four_bit, calls):
    stock, patched = pair(four_bit)
    for model in (stock, patched):
        torch.manual_seed(3)
        model.add_adapter("second", models.config())
        models.randomize(model)
        model.eval()
    calls.clear()
    check(stock, patched, adapter_names=["second", "__base__"])
    assert calls["lora"] == 14
    calls.clear()
    check(stock, patched, adapter_names=["__base__", "__base__"])
    assert calls["linear"] == 14 and not calls["lora"]
    with pytest.raises(ValueError, match="adapter_names"):
        patched(input_ids=models.IDS, adapter_names=["second"])


@BOTH
def test_several_adapters_with_their_own_dropout(four_bit):
    """p = 1 drops a branch whole, in the fused and in the further adapters alike."""
    stock, patched = pair(four_bit, lora_dropout=1.0)
    for model in (stock, patched):
        torch.manual_seed(3)
        model.add_adapter("second", models.config(lora_dropout=0.0))
        model.add_adapter("third", models.config(lora_dropout=1.0))
        models.randomize(model)
        model.base_model.set_adapter(["default", "second", "third"])
        model.train()
    check(stock, patched)
    with_dropout = logits(patched)
    stock.eval(), patched.eval()
    check(stock, patched)
    assert not torch.allclose(logits(patched), with_dropout, atol=1e-2)


def test_adapters_added_after_patching_need_no_second_patch(calls):
    """get_peft_model on a patched bare model, then patch again: the wrappers join, the bases stay."""
    model = models.llama()
    assert models.linears(peftkern.patch(model)) == {"linear_4bit": 14}
    adapted = models.lora(model)
    logits(adapted)
    assert calls["linear"] == 14
    assert models.linears(peftkern.patch(adapted)) == {"qlora_linear": 14}
    calls.clear()
    logits(adapted)
    assert calls == {"lora": 14}


@BOTH
def test_frozen_adapter_weights_get_no_gradient(four_bit):
    stock, patched = pair(four_bit)
    for model in (stock, patched):
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "layers.0" in name:
                parameter.requires_grad_(False)
    expected, got = models.run(stock), models.run(patched)
    assert expected.keys() == got.keys() and len(got) == 2 + 7
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@BOTH
@pytest.mark.parametrize("module", ["lora_A", "lora_dropout", "base_layer"])
def test_hooks_on_inner_modules_still_fire(module, four_bit):
    _, patched = pair(four_bit)
    layer, fired = models.first(patched), []
    target = layer.base_layer if module == "base_layer" else getattr(layer, module)["default"]
    handle = target.register_forward_hook(lambda *_: fired.append(1))
    logits(patched)
    assert fired == [1]
    handle.remove()
    logits(patched)
    assert fired == [1]


@BOTH
@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 64, dtype=torch.float64), torch.ones(2, 63), torch.ones(2, 64, device="meta")],
    ids=["fp64", "shape", "meta"],
)
def test_inputs_the_kernels_do_not_take_get_stock_behaviour(x, four_bit):
    stock, patched = pair(four_bit)
    outcomes = []
    for model in (stock, patched):
        try:
            y = models.first(model)(x)
            outcomes.append((y.dtype, y.shape, y.device))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
