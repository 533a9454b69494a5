"""PEFT's DoRA, patched: as accurate as stock against fp64, where it is served and where it is not."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern

from ..cases import each_choice
from . import models
from .test_values import compare


def make(dtype=torch.float32, *, four_bit=True, seed=0, bias=False, layers=2, **options):
    model = models.lora(
        models.llama(dtype, four_bit=four_bit, seed=seed, bias=bias, layers=layers), use_dora=True, **options
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@pytest.fixture
def counted(monkeypatch, calls):
    """A DoRA layer counts as a LoRA layer, in a group too; "groups": the calls for several."""
    single, together = peftkern.functional.dora_linear, peftkern.functional.dora_group

    def one(*args, **options):
        calls["lora"] += 1
        return single(*args, **options)

    def several(x, members, *args, **options):
        calls["lora"] += len(members)
        calls["groups"] += 1
        return together(x, members, *args, **options)

    monkeypatch.setattr(peftkern.functional, "dora_linear", one)
    monkeypatch.setattr(peftkern.functional, "dora_group", several)
    return calls


@pytest.mark.parametrize(
    "bias, base, dtype",
    each_choice(
        [True, False],
        ["nf4", "dense"],
        [torch.float32, torch.bfloat16],
        quick=[
            (False, "nf4", torch.float32),
            (False, "nf4", torch.bfloat16),
            (True, "dense", torch.bfloat16),
        ],
    ),
)
def test_as_accurate_as_stock(bias, base, dtype, counted):
    """Of 12 seeds: of 4, one tensor's error was 1.7 times stock's, which over 32 is 1.08 times."""
    compare(
        lambda seed: make(dtype, four_bit=base == "nf4", seed=seed, bias=bias),
        dtype,
        counted,
        seeds=range(12),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_an_untrained_adapter_changes_no_bit_of_a_dense_base(bias, counted):
    """As PEFT's own: magnitude over norm is 1 to the bit, and y is that of torch's linear."""
    base = torch.nn.Linear(1000, 500, bias=bias)
    model = models.peft.get_peft_model(
        torch.nn.ModuleDict({"linear": base}),
        models.peft.LoraConfig(target_modules=["linear"], use_dora=True),
    )
    peftkern.patch(model)
    x = torch.rand(10, 1000)
    assert torch.equal(model.base_model.model["linear"](x), base(x)) and counted["lora"] == 1


def test_dropout_takes_torchs_draws(counted):
    """One mask for the base product and the branch, as PEFT has it: with the same seed the same numbers."""
    model = make(lora_dropout=0.4).train()
    torch.manual_seed(5)
    stock = models.run(model)
    assert peftkern.patch(model).counts["dora_linear"] == 14
    torch.manual_seed(5)
    patched = models.run(model)
    for name, value in stock.items():
        torch.testing.assert_close(
            patched[name], value, rtol=1e-3, atol=2e-5 * value.abs().max().item(), msg=name
        )
    assert counted["lora"] == 14 and counted["groups"] == 0  # each base product has an input of its own


def test_siblings_are_one_call(counted):
    """q, k, v and gate, up of two layers; a sibling with an adapter of another kind runs beside them."""
    model = make().train()
    report = peftkern.patch(model)
    notes = {item.name.rpartition(".")[2]: item.note for item in report.fused if item.got == "dora_linear"}
    assert (
        notes["k_proj"] == "one call for q_proj, k_proj, v_proj"
        and notes["up_proj"] == "one call for gate_proj, up_proj"
    )
    assert all(
        item.note == "" for item in peftkern.patch(make(lora_dropout=0.1)).fused if item.got == "dora_linear"
    )
    model(input_ids=models.IDS)
    assert counted["lora"] == 14 and counted["groups"] == 4
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.update_layer("plain", r=4, lora_alpha=8, **models.arguments(models.config()))
    layer.set_adapter("plain")
    counted.clear()
    patched = models.run(model)
    assert counted["lora"] == 14 and counted["groups"] == 4  # q and v; k, as a vanilla adapter, beside them
    peftkern.unpatch(model)
    for name, value in models.run(model).items():
        torch.testing.assert_close(
            patched[name], value, rtol=1e-3, atol=2e-5 * value.abs().max().item(), msg=name
        )


def test_the_norm_follows_the_adapter_and_the_weight():
    model = make().eval()
    peftkern.patch(model)
    before = model(input_ids=models.IDS).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    twin = copy.deepcopy(model)
    peftkern.unpatch(twin)
    assert not torch.allclose(before, model(input_ids=models.IDS).logits, atol=1e-3)
    torch.testing.assert_close(
        model(input_ids=models.IDS).logits, twin(input_ids=models.IDS).logits, rtol=1e-4, atol=1e-4
    )


def test_disabled_merged_and_beside_another_adapter():
    model = make(four_bit=False).eval()
    model.add_adapter("plain", models.config())
    models.randomize(model)
    twin = copy.deepcopy(model)
    peftkern.patch(model)

    def same():
        torch.testing.assert_close(
            model(input_ids=models.IDS).logits, twin(input_ids=models.IDS).logits, rtol=1e-4, atol=1e-4
        )

    same()
    with model.disable_adapter(), twin.disable_adapter():
        same()
    for names in ("plain", ["default", "plain"]):
        model.base_model.set_adapter(names), twin.base_model.set_adapter(names)
        same()
    model.base_model.set_adapter("default"), twin.base_model.set_adapter("default")
    model.merge_adapter(), twin.merge_adapter()
    same()
    model.unmerge_adapter(), twin.unmerge_adapter()
    same()


@pytest.mark.any_isa
def test_compiles_into_one_graph():
    model = make(four_bit=False, layers=1)
    peftkern.patch(model)
    eager = models.run(model)
    compiled = models.run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    compiled = {name.removeprefix("_orig_mod."): value for name, value in compiled.items()}
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name
        )
