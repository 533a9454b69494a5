"""A patched module's forward, asked what one asks of a bound method; bound anew, wrapped, and taken back."""

from __future__ import annotations

import copy
import inspect
import types

import accelerate
import pytest
import torch
from torch import nn

import peftkern
from peftkern.patching.forwards import find

from . import models

pytestmark = pytest.mark.any_isa


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """A stock model and its patched copy."""
    stock = models.lora(models.llama(four_bit=False))
    model = copy.deepcopy(stock)
    peftkern.patch(model, **options)
    return stock, model


def test_every_patched_forward_answers_as_the_stock_one():
    stock, model = pair(fused_loss=True)
    seen = set()
    for (name, theirs), ours in zip(stock.named_modules(), model.modules(), strict=True):
        if find(ours) is None:
            continue
        seen.add(type(find(ours)[1]).__name__)
        ours, theirs = ours.forward, theirs.forward
        assert inspect.signature(ours) == inspect.signature(theirs), name
        assert inspect.signature(ours.__func__) == inspect.signature(theirs.__func__), name
        assert ours.__name__ == theirs.__name__ and ours.__qualname__ == theirs.__qualname__
        assert ours.__code__ is theirs.__code__ and ours.__defaults__ == theirs.__defaults__
        assert hasattr(ours, "__wrapped__") == hasattr(theirs, "__wrapped__"), name
        assert ours.__self__ is not theirs.__self__ and ours.__func__ is ours.__func__
    assert seen >= {"LoraForward", "LossForward", "NormForward", "LayerForward"}


def test_a_signature_binds_the_arguments_of_a_call():
    _, model = pair(fused_loss=True)
    bound = inspect.signature(model.base_model.model.forward).bind(models.IDS, labels=models.IDS)
    assert bound.arguments.keys() == {"input_ids", "labels"}


def test_what_a_bound_method_has_not_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pair()[1].base_model.model.model.norm.forward.nonsense  # noqa: B018


def test_the_function_runs_ours_for_the_module_it_is_given(calls):
    _, model = pair()
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 64)
    layer, other = models.first(model), models.first(twin)
    with torch.no_grad():
        other.lora_B["default"].weight.zero_()
        function = layer.forward.__func__
        assert not torch.equal(function(layer, x), function(other, x)) and calls["lora"] == 2
        peftkern.unpatch(twin)
        function(other, x)
    assert calls["lora"] == 2, "an unpatched module runs stock"


@pytest.fixture
def no_accelerator():
    """accelerate holds one state a process, which the mixed precision of an earlier test would decide."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("keep_fp32_wrapper", [True, False])
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_a_model_that_accelerate_wrapped_and_unwrapped(keep_fp32_wrapper, copied):
    stock = models.peft.inject_adapter_in_model(models.config(), models.llama(four_bit=False)).train()
    expected = stock(input_ids=models.IDS, labels=models.IDS).loss.item()
    model = copy.deepcopy(stock)
    peftkern.patch(model, fused_loss=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(model)
    model = copy.deepcopy(model) if copied else model
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=keep_fp32_wrapper)
    output = model(input_ids=models.IDS, labels=models.IDS)
    assert output.logits is None, "the fused loss runs"
    assert output.loss.item() == pytest.approx(expected, rel=2e-2)
    peftkern.unpatch(model)
    assert model(input_ids=models.IDS, labels=models.IDS).logits is not None


def test_unpatch_reaches_a_forward_inside_a_wrapper(calls):
    _, model = pair()
    layer, x = models.first(model), torch.randn(2, 5, 64)
    inner = layer.forward
    layer.forward = wrapper = lambda x: inner(x) + 1
    layer(x)
    assert calls["lora"] == 1
    before = peftkern.unpatch(model)
    assert before == sum(row.reason is None for row in peftkern.patch(model).rows) + 1, (
        "the wrapped one cannot be patched again"
    )
    calls.clear()
    layer(x)
    assert layer.forward is wrapper and not calls


def test_a_method_bound_anew_is_taken_off(calls):
    _, model = pair()
    layer = models.first(model)
    layer.forward = types.MethodType(layer.forward.__func__, layer)
    assert find(layer)[0] == "forward" and peftkern.unpatch(layer) == 1
    assert "forward" not in layer.__dict__


def test_a_replica_for_data_parallel_runs_the_stock_forward_on_its_own_parameters():
    stock, model = pair(fused_loss=True)
    patched = [module for module in model.modules() if find(module) is not None]
    assert patched
    for module in patched:
        replica = module._replicate_for_data_parallel()
        assert replica.forward.__self__ is replica and replica.forward.__func__ is type(module).forward
        assert find(replica) is None and find(module) is not None
        assert "_replicate_for_data_parallel" not in replica.__dict__
    twin = copy.deepcopy(model)
    layer = models.first(twin)
    assert layer._replicate_for_data_parallel()._parameters == {} and find(layer)[1].module is layer
    peftkern.unpatch(model)
    assert all("_replicate_for_data_parallel" not in module.__dict__ for module in model.modules())
