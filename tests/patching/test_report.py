"""What `patch` tells: every module by name, reasons for what falls back, errors where nothing can be done."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.patching.blocks import Norms
from peftkern.patching.detect import Linears
from peftkern.patching.forwards import find
from peftkern.patching.groups import Siblings
from peftkern.patching.layers import DecoderLayers
from peftkern.patching.loss import Loss
from peftkern.patching.merged import Merging
from peftkern.patching.mlp import GatedMLPs
from peftkern.patching.rotary import Rotary

from . import models
from .rewriting import surveyed
from .versions import COUNTED, exact

pytestmark = pytest.mark.any_isa


class Zoo(nn.Module):
    """One of each layer type PEFT's LoRA can wrap."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.plain = nn.Linear(8, 8)
        self.transposed = Conv1D(8, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.wide = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.wide(self.transposed(self.plain(self.embed(ids))))
        return x + self.conv(x[:, None]).mean(1)


def zoo(targets, **options):
    torch.manual_seed(0)
    model = models.peft.get_peft_model(
        Zoo(), models.peft.LoraConfig(**{"r": 2, "target_modules": targets} | options)
    )
    models.randomize(model)
    return model


BLOCKS = {"gated_mlp": 2, "rms_norm": 5, "rope": 2, "add_rms_norm": 2}  # of two Llama layers


def row(report, name):
    return next(item for item in report.rows if item.name.endswith(name))


@exact
def test_every_lora_layer_has_a_row():
    model = models.lora(models.llama())
    report = peftkern.patch(model)
    linears, blocks = report.rows[:14], report.rows[14:]
    assert [item.name for item in linears] == list(models.lora_layers(model))
    assert (
        report.counts == {"qlora_linear": 14, **BLOCKS}
        and report.fused == report.rows
        and report.fallbacks == ()
    )
    first = report.rows[0]
    assert (first.kind, first.base, first.shape, first.adapters) == (
        "lora",
        "nf4, nested",
        (64, 64),
        ("default",),
    )
    assert first.note == "one call for q_proj, k_proj, v_proj"
    assert [(item.kind, item.name.rpartition(".")[2]) for item in blocks[:3]] == [("mlp", "mlp")] * 2 + [
        ("norm", "input_layernorm")
    ]
    table = str(report).splitlines()
    assert len(table) == 1 + 25 + 1 and "down_proj" in table[14] and "gated_mlp" in table[15]
    assert table[-1].startswith(
        "peftkern: 25 of 25 modules patched (14 qlora_linear, 2 gated_mlp, 5 rms_norm, 2 rope, 2 "
        "add_rms_norm)"
    )
    with pytest.raises(AttributeError):
        report.rows = ()


def test_patching_twice_is_patching_once(calls):
    model = models.lora(models.llama())
    first = peftkern.patch(model)
    forward = models.first(model).forward
    assert peftkern.patch(model) == first
    assert models.first(model).forward is forward
    model(input_ids=models.IDS)
    assert calls == {"lora": 14}
    assert (
        peftkern.unpatch(model) == (28 + 11 if COUNTED else 14 + len(first.fused))
        and peftkern.unpatch(model) == 0
    )


def test_nothing_to_patch_names_the_fix():
    with pytest.raises(
        ValueError, match="no PEFT LoRA layer.*3 Linear.*get_peft_model.*load_in_4bit.*dense=True"
    ):
        peftkern.patch(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))


def test_all_falling_back_raises_with_the_reasons():
    model = zoo(["embed", "conv"])
    with pytest.raises(ValueError, match="none of its 2 LoRA layers.*Embedding.forward.*_ConvNd.forward"):
        peftkern.patch(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_unsupported_layers_fall_back_by_name_and_compute_as_before():
    model = zoo(["embed", "plain", "transposed", "conv", "wide"], rank_pattern={"wide": 257}).eval()
    ids = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    report = peftkern.patch(model)
    assert {item.name.rpartition(".")[2]: item.got for item in report.fused} == {
        "plain": "qlora_linear",
        "transposed": "lora_add",
    }
    assert "Conv1D" in row(report, "transposed").note
    reasons = {item.name.rpartition(".")[2]: item.reason for item in report.fallbacks}
    assert "Embedding.forward" in reasons["embed"] and "_ConvNd.forward" in reasons["conv"]
    assert "rank 257" in reasons["wide"] and "up to 256" in reasons["wide"]
    assert all(reason in report.summary for reason in reasons.values())
    torch.testing.assert_close(model(ids), before)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_dora_alone_is_fused_and_beside_another_adapter_falls_back(four_bit, calls):
    model = models.lora(models.llama(four_bit=four_bit), use_dora=True, target_modules=["o_proj"])
    report = peftkern.patch(model)
    assert (
        row(report, "0.self_attn.o_proj").got == "dora_linear" and models.linears(report)["dora_linear"] == 2
    )
    model.add_adapter("vanilla", models.config(target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "vanilla"])
    before = models.run(model)
    if four_bit:
        report = peftkern.patch(model)
        assert (
            row(report, "0.self_attn.o_proj").reason
            == "adapter 'default': DoraLinearVariant is not vanilla LoRA"
        )
        assert row(report, "0.self_attn.o_proj.base_layer").got == "linear_4bit"
    else:
        with pytest.raises(ValueError, match="2 x adapter 'default': DoraLinearVariant"):
            peftkern.patch(model)
    calls.clear()
    torch.testing.assert_close(models.run(model), before, rtol=1e-4, atol=1e-5)
    assert calls["lora"] == 0
    model.set_adapter("vanilla")
    assert row(peftkern.patch(model), "0.self_attn.o_proj").got == "qlora_linear"
    model(input_ids=models.IDS)
    assert calls["lora"] == 2


def test_bases_without_a_fused_form_get_the_branch_added_and_say_why(calls):
    model = models.lora(models.llama(), target_modules=["q_proj", "k_proj"])
    layers = list(models.lora_layers(model).values())
    fresh = models.bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")  # never moved, so not quantized
    layers[0].base_layer = fresh
    layers[1].base_layer.forward = lambda x: x[..., :32]
    layers[2].base_layer.register_forward_hook(lambda *_: None)
    layers[3].base_layer = nn.Linear(64, 32, bias=False)
    report = peftkern.patch(model)
    rows = [item for item in report.rows if item.kind == "lora"]
    assert {item.got for item in rows} == {"lora_add"} and all(item.reason is None for item in rows)
    notes = [item.note for item in rows]
    assert (
        "has no quant_state" in notes[0]
        and "replaced on the instance" in notes[1]
        and "hook is registered" in notes[2]
    )
    assert notes[3] == "on its stock base: its base weight is trainable"
    stock_bases = {
        item.name: item.reason for item in report.rows if item.kind == "linear" and item.got == "stock"
    }
    # the 4-bit ones are looked at as such
    assert len(stock_bases) == 3 and all(name.endswith("base_layer") for name in stock_bases)
    fresh.to("cpu")
    calls.clear()
    model(input_ids=models.IDS)
    assert calls["add"] == 4


def test_a_foreign_forward_on_the_class_falls_back():
    model = models.lora(models.llama(), target_modules=["o_proj"])

    class Theirs(type(models.first(model))):
        def forward(self, x):
            return super().forward(x) * 2

    models.first(model).__class__ = Theirs
    report = peftkern.patch(model)
    assert "Theirs.forward" in report.fallbacks[0].reason
    assert row(report, "1.self_attn.o_proj").got == "qlora_linear"


def test_a_meta_model_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    with pytest.raises(ValueError, match="meta device; load it first"):
        peftkern.patch(model, dense=True)


def test_exclude_by_name_or_part(calls):
    model = models.lora(models.llama())
    peftkern.patch(model)
    report = peftkern.patch(model, exclude=["layers.0", "down_proj"])
    assert models.linears(report)["qlora_linear"] == 6
    assert {item.reason for item in report.fallbacks} == {"excluded by 'layers.0'", "excluded by 'down_proj'"}
    model(input_ids=models.IDS)
    assert calls == {"lora": 6}


@pytest.mark.parametrize(
    "exclude, message", [(["q_pro"], "'q_pro' names no module"), ("q_proj", "got the string")]
)
def test_exclude_is_checked(exclude, message):
    with pytest.raises(ValueError, match=message):
        peftkern.patch(models.lora(models.llama()), exclude=exclude)


def test_bare_4bit_linears_without_peft(calls):
    model = models.llama()
    x = models.IDS
    before = model(input_ids=x).logits
    report = peftkern.patch(model)
    assert models.linears(report) == {"linear_4bit": 14}
    torch.testing.assert_close(model(input_ids=x).logits, before, rtol=1e-4, atol=1e-5)
    assert calls == {"linear": 14}


def test_a_model_that_transformers_loads_in_4_bit(tmp_path, calls):
    models.llama(four_bit=False).save_pretrained(tmp_path)
    config = models.transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = models.transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    model = models.lora(model)
    before = models.run(model)
    assert models.linears(peftkern.patch(model)) == {"qlora_linear": 14}
    torch.testing.assert_close(models.run(model), before, rtol=1e-3, atol=1e-5)
    assert calls["lora"] == 14


def test_a_quant_state_lost_by_sharding_is_found_on_the_module(calls):
    model = models.lora(models.llama())
    before = models.run(model)
    for layer in models.lora_layers(model).values():
        assert layer.base_layer.quant_state is not None
        layer.base_layer.weight.quant_state = None
    assert models.linears(peftkern.patch(model)) == {"qlora_linear": 14}
    torch.testing.assert_close(models.run(model), before, rtol=1e-3, atol=1e-5)
    assert calls["lora"] == 14


@pytest.mark.parametrize("kind", ["prefix", "ia3", "adalora"])
def test_other_tuners_on_4bit_bases(kind, calls):
    peft = models.peft
    torch.manual_seed(0)
    if kind == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    elif kind == "adalora":
        config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
    else:
        config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    model = peft.get_peft_model(models.llama(), config)

    def step():
        model.zero_grad()
        loss = model(input_ids=models.IDS, labels=models.IDS).loss
        loss.backward()
        return {"loss": loss.detach()} | models.grads(model)

    before = step()
    assert models.linears(peftkern.patch(model)) == {"linear_4bit": 14} | (
        {"stock": 2} if kind == "adalora" else {}
    )
    torch.testing.assert_close(step(), before, rtol=1e-4, atol=1e-6)
    assert calls["linear"] == 14 and len(before) > 1


def test_dense_patches_a_tied_head_that_stays_tied(calls):
    model = models.llama(four_bit=False, seed=3)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    before = model(input_ids=models.IDS).logits
    assert models.linears(peftkern.patch(model, dense=True)) == {"linear": 15}
    torch.testing.assert_close(model(input_ids=models.IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0)
    assert model(input_ids=models.IDS).logits.abs().max() == 0
    model.lm_head.weight.requires_grad_(True)  # no longer frozen: stock, with a gradient
    calls.clear()
    model(input_ids=models.IDS).logits.sum().backward()
    assert calls == {"linear": 14} and model.lm_head.weight.grad is not None


def test_dense_is_automatic_where_torch_has_no_fast_product(monkeypatch):
    from peftkern.patching import detect

    slow = nn.Sequential(
        nn.Linear(8, 8).bfloat16().requires_grad_(False),
        nn.Linear(8, 8).requires_grad_(False),
        nn.Linear(8, 8).bfloat16(),
    )
    monkeypatch.setattr(detect.backends, "available", lambda name: (True, "test"))
    for supported, expected in ((False, ["0"]), (True, [])):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported
        )
        assert [item.row.name for item in surveyed(slow, detect.Linears())] == expected


@exact
def test_blocks_can_be_left_alone():
    model = models.lora(models.llama())
    assert peftkern.patch(model, blocks=False).counts == {"qlora_linear": 14}
    assert peftkern.patch(model).counts == {"qlora_linear": 14, **BLOCKS}
    assert peftkern.patch(model, exclude=["layers.0", "norm"]).counts == {
        "qlora_linear": 7,
        "stock": 14,
        "gated_mlp": 1,
        "rms_norm": 2,
        "rope": 1,
        "add_rms_norm": 1,
    }


@pytest.mark.any_isa
def test_the_survey_changes_nothing_and_a_call_that_raises_no_forward():
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    with pytest.raises(ValueError, match="fused_loss: Sequential holds no causal language model"):
        peftkern.patch(model, dense=True, fused_loss=True)
    assert find(model[0]) is None
    model = models.lora(models.llama())
    before = [dict(module.__dict__) for module in model.modules()]
    rewrites = Linears(), Merging(), Siblings(), GatedMLPs(), Norms(), Rotary(), DecoderLayers(), Loss()
    findings = surveyed(model, *rewrites)
    assert {finding.row.kind for finding in findings if finding.row} >= {
        "lora",
        "mlp",
        "norm",
        "layer",
        "loss",
    }
    assert [dict(module.__dict__) for module in model.modules()] == before
