"""LoRA on bases without a fused form: the base runs as it is, the branch is peftkern's; every dtype and
gradient is stock's."""

import copy

import pytest
import torch
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.bnb import Linear8bitLt
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.patching import mixed_adapters

from . import models

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOTH = pytest.mark.parametrize("kind", ["conv1d", "8bit"])


class Foreign(nn.Module):
    """What GPTQ, AWQ and AQLM look like from outside: features, a buffer of integers, a forward."""

    def __init__(self, k=64, n=48):
        super().__init__()
        self.in_features, self.out_features = k, n
        self.register_buffer(
            "qweight",
            torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(5), dtype=torch.int8),
        )

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 32)


def eight_bit():
    torch.manual_seed(5)
    dense = nn.Linear(64, 48)
    base = models.bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    base.load_state_dict(dense.state_dict())
    return base.to("cpu").requires_grad_(False)


def conv1d():
    torch.manual_seed(5)
    return Conv1D(48, 64).requires_grad_(False)


MAKERS = {
    "conv1d": lambda config: Linear(conv1d(), "default", **models.arguments(config), r=4, lora_alpha=8),
    "8bit": lambda config: Linear8bitLt(
        eight_bit(), "default", **models.arguments(config), r=4, lora_alpha=8
    ),
    "gptq": lambda config: GPTQLoraLinear(
        Foreign(), "default", **models.arguments(config), r=4, lora_alpha=8
    ),
    "awq": lambda config: AwqLoraLinear(Foreign(), "default", **models.arguments(config), r=4, lora_alpha=8),
    "aqlm": lambda config: AqlmLoraLinear(
        Foreign(), "default", **models.arguments(config), r=4, lora_alpha=8
    ),
}


def layer_of(kind, dtype=torch.float32, **options):
    config = models.config(fan_in_fan_out=kind == "conv1d", **options)
    layer = MAKERS[kind](config)
    if kind == "conv1d":
        layer.base_layer.to(dtype)
    models.randomize(layer)
    return layer


def results(layer, x, autocast=None):
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(leaf)
    y.float().square().sum().backward()
    return {"y": y.detach(), "dx": leaf.grad} | models.grads(layer)


def input_of(dtype):
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def check(layer, x, calls, autocast=None, expected=1):
    stock = results(layer, x, autocast)
    report = peftkern.patch(layer)
    assert report.rows[0].got == "lora_add" and report.rows[0].note.startswith("on its stock base: ")
    patched = results(layer, x, autocast)
    assert calls["add"] == expected and stock.keys() == patched.keys() and len(stock) >= 4
    unit = max(UNIT[x.dtype], UNIT[autocast or x.dtype])
    for name, value in stock.items():
        assert patched[name].dtype == value.dtype, name
        assert (patched[name].double() - value.double()).norm() <= 8 * unit * value.double().norm(), name


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_and_gradients_are_stocks(kind, dtype, calls):
    check(layer_of(kind, dtype), input_of(dtype), calls)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["conv1d", "gptq", "awq", "aqlm"])
def test_autocast(kind, autocast, calls):
    if kind == "conv1d":
        check(layer_of(kind), input_of(torch.float32), calls, autocast)
        return
    check(layer_of(kind), input_of(autocast), calls, autocast)


@BOTH
@pytest.mark.parametrize(
    "options", [dict(use_rslora=True), dict(lora_bias=True)], ids=["rslora", "lora-bias"]
)
def test_lora_options(kind, options, calls):
    layer = layer_of(kind, **options)
    if "lora_bias" in options:
        nn.init.normal_(layer.lora_B["default"].bias)
    check(layer, input_of(torch.float32), calls)


@BOTH
def test_several_active_adapters(kind, calls):
    layer = layer_of(kind)
    layer.update_layer(
        "second", 3, lora_alpha=6, **models.arguments(models.config(fan_in_fan_out=kind == "conv1d"))
    )
    models.randomize(layer)
    layer.set_adapter(["default", "second"])
    check(layer, input_of(torch.float32), calls, expected=2)


@BOTH
def test_disabled_and_merged_adapters_run_stock(kind, calls):
    layer = layer_of(kind)
    stock, x = copy.deepcopy(layer), input_of(torch.float32)
    peftkern.patch(layer)
    for step in (
        lambda it: it.enable_adapters(False),
        lambda it: it.enable_adapters(True),
        lambda it: it.merge(),
        lambda it: it.unmerge(),
    ):
        step(stock), step(layer)
        torch.testing.assert_close(layer(x), stock(x), rtol=1e-4, atol=1e-4)
    assert calls["add"] == 2


def test_dropout_is_seeded_and_regenerated_by_checkpointing(calls):
    layer, x = layer_of("conv1d", lora_dropout=0.5), input_of(torch.float32).requires_grad_()
    peftkern.patch(layer)
    got = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        y.sum().backward()
        got.append({"y": y.detach()} | models.grads(layer))
    assert calls["add"] == 3
    assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])
    torch.manual_seed(4)
    assert not torch.equal(layer(x), got[0]["y"])


def test_a_trainable_base_gets_its_gradient_and_once_frozen_is_fused(calls):
    layer = Linear(nn.Linear(64, 48), "default", config=models.config(), r=4, lora_alpha=8)
    models.randomize(layer)
    layer.base_layer.requires_grad_(True)
    check(layer, input_of(torch.float32), calls)
    assert layer.base_layer.weight.grad is not None
    layer.base_layer.requires_grad_(False)
    assert models.linears(peftkern.patch(layer)) == {"qlora_linear": 1}
    layer(input_of(torch.float32))
    assert calls["lora"] == 1 and peftkern.unpatch(layer) == 1 and "forward" not in layer.__dict__


def test_hooks_on_the_base_fire(calls):
    layer, seen = layer_of("conv1d"), []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    check(layer, input_of(torch.float32), calls)
    assert len(seen) == 2


def test_no_copy_of_a_conv1d_weight_is_kept():
    layer = layer_of("conv1d")
    weight, saved = layer.base_layer.weight, []
    peftkern.patch(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(input_of(torch.float32).requires_grad_())
    same = [t for t in saved if t.numel() == weight.numel() and t.shape != (15, 64)]
    assert same and all(t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for t in same)


@pytest.mark.parametrize(
    "change, reason",
    [(lambda base: base.to("meta"), "meta device"), (lambda base: base.double(), "float64")],
    ids=["meta", "fp64"],
)
def test_what_the_branch_cannot_be_added_onto_is_named(change, reason):
    layer = layer_of("conv1d")
    change(layer.base_layer)
    with pytest.raises(ValueError, match=reason):
        peftkern.patch(layer)


def test_an_8bit_model_trains(calls):
    model = models.llama(four_bit=False)
    for name, old in list(model.named_modules()):
        if type(old) is nn.Linear and name.endswith("_proj"):
            new = models.bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=False, has_fp16_weights=False
            )
            new.load_state_dict(old.state_dict())
            model.get_submodule(name.rpartition(".")[0]).register_module(
                name.rpartition(".")[2], new.to("cpu")
            )
    model.is_loaded_in_8bit = True
    model = models.lora(model.requires_grad_(False))
    assert models.linears(peftkern.patch(model)) == {"lora_add": 14}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(8):
        curve.append(models.run(model)["loss"].item())
        optimizer.step()
    assert calls["add"] == 14 * 8 and curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_cuda_autocast_promotes_the_output_as_stock_does(kind, calls):
    """Some of PEFT's layers ask for CUDA's switch and then add the branch uncast; both switches on act on CPU
    tensors as on CUDA."""
    layer, x, before = layer_of(kind), input_of(torch.float16), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock = layer(x)
            peftkern.patch(layer)
            patched = layer(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert calls["add"] == 1 and stock.dtype == patched.dtype
    torch.testing.assert_close(patched, stock, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["conv1d", "8bit"])
def test_each_sample_runs_through_its_adapter(kind, calls):
    """PEFT's `adapter_names` in one call, and `mixed_adapters` around it, training included."""
    layer, x, names = (
        layer_of(kind, lora_bias=True),
        input_of(torch.float32),
        ["second", "__base__", "default"],
    )
    layer.update_layer(
        "second", 3, lora_alpha=6, **models.arguments(models.config(fan_in_fan_out=kind == "conv1d"))
    )
    models.randomize(layer)
    nn.init.normal_(layer.lora_B["default"].bias)
    for part in (layer.lora_A, layer.lora_B):
        part.requires_grad_(True)
    stock = copy.deepcopy(layer.eval())
    peftkern.patch(layer)
    with torch.set_grad_enabled(
        kind == "conv1d"
    ):  # stock writes into the 8-bit base's output, which has no gradient then
        expected = stock(x, adapter_names=names)
    torch.testing.assert_close(layer(x, adapter_names=names), expected, rtol=1e-4, atol=1e-4)
    with mixed_adapters(layer, names):
        y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert calls["add"] == 4
    y.sum().backward()
    assert len(models.grads(layer)) == 5  # A and B of both, the bias of one
    if kind == "conv1d":
        expected.sum().backward()
        torch.testing.assert_close(models.grads(layer), models.grads(stock), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[:2])


def test_a_view_of_a_trainable_flat_parameter_is_fused_where_no_gradient_is_recorded(calls):
    """FSDP shows frozen weights as views of a parameter that trains as a whole; without grad they are weights
    like any other."""
    layer, x = (
        Linear(nn.Linear(64, 48), "default", config=models.config(), r=4, lora_alpha=8),
        input_of(torch.float32),
    )
    layer.base_layer.requires_grad_(False)
    models.randomize(layer)
    expected = layer(x)
    peftkern.patch(layer)
    weight = layer.base_layer.weight
    del layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(torch.cat([weight.flatten(), torch.zeros(5)]))[
        : weight.numel()
    ].view(weight.shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert calls == {"lora": 1}
    y = layer(x)
    assert calls == {"lora": 1} and y.requires_grad
    torch.testing.assert_close(y, expected)
