"""Per instance, reversible, and carried along by deepcopy, pickle, state_dict and saving."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import peftkern

from . import models
from .versions import COUNTED

pytestmark = pytest.mark.any_isa


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_unpatch_restores_everything(four_bit, calls):
    model = models.lora(models.llama(torch.bfloat16, four_bit=four_bit))
    before, classes = models.run(model), [type(module) for module in model.modules()]
    contents = [set(module.__dict__) for module in model.modules()]
    peftkern.patch(model)
    patched = models.run(model)
    assert not torch.equal(patched["logits"], before["logits"])  # another rounding: ours did run
    assert [type(module) for module in model.modules()] == classes
    peftkern.unpatch(model)
    same(models.run(model), before)
    assert [set(module.__dict__) for module in model.modules()] == contents


def test_other_instances_are_untouched(calls):
    patched, other = models.lora(models.llama()), models.lora(models.llama())
    peftkern.patch(patched)
    other(input_ids=models.IDS)
    assert not calls


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("how", models.COPIES)
def test_copies_are_patched_and_independent(how, four_bit, calls):
    model = models.lora(models.llama(four_bit=four_bit))
    peftkern.patch(model)
    before = models.run(model)
    twin = models.copied(model, how)
    calls.clear()
    same(models.run(twin), before)
    assert calls["lora"] == 14
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    same(models.run(twin), before)
    assert peftkern.unpatch(model) > 0
    calls.clear()
    same(models.run(twin), before)
    assert calls["lora"] == 14
    assert models.first(twin).forward.module is models.first(twin)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_state_dict_and_saved_adapter_are_identical(four_bit, tmp_path):
    model = models.lora(models.llama(four_bit=four_bit))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "stock")
    peftkern.patch(model)
    models.run(model)
    same(model.state_dict(), before)
    adapter = {name: tensor + 1 for name, tensor in before.items() if "lora_" in name}
    assert model.load_state_dict(adapter, strict=False).unexpected_keys == []
    assert torch.equal(
        models.first(model).lora_A["default"].weight,
        next(value for name, value in adapter.items() if "o_proj.lora_A" in name),
    )
    model.load_state_dict({name: before[name] for name in adapter}, strict=False)
    model.save_pretrained(tmp_path / "patched")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


class Counting(ModelHook):
    def __init__(self):
        self.seen = 0

    def pre_forward(self, module, *args, **kwargs):
        self.seen += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["hook first", "patch first"])
def test_accelerate_hooks_keep_running(order, calls):
    """accelerate wraps `forward` on the instance and calls `_old_forward`: ours goes inside, whichever came
    first."""
    model = models.lora(models.llama())
    before, layer, hook = models.run(model), models.first(model), Counting()
    if order == "patch first":
        peftkern.patch(model)
    add_hook_to_module(layer, hook)
    if order == "hook first":
        wrapped = layer.forward
        report = peftkern.patch(model)
        assert not report.fallbacks and layer.forward is wrapped
    calls.clear()
    patched = models.run(model)
    assert hook.seen == 1 and calls["lora"] == 14
    torch.testing.assert_close(patched, before, rtol=1e-4, atol=1e-5)
    assert peftkern.unpatch(model) == 28 + 11 or not COUNTED
    same(models.run(model), before)
    assert hook.seen == 2
    remove_hook_from_module(layer)
    same(models.run(model), before)


def test_a_foreign_forward_on_an_instance_is_kept():
    model = models.lora(models.llama())
    layer = models.first(model)
    layer.forward = theirs = lambda x: x * 0
    report = peftkern.patch(model)
    assert "replaced on the instance" in report.fallbacks[0].reason
    assert layer.forward is theirs
    peftkern.unpatch(model)
    assert layer.forward is theirs
