"""Depths, parameter groups and schedules against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peftkern.transfer.depth import layer_stacks, parameter_depths
from peftkern.transfer.rates import Rates, check_groups, parameter_kind, rates_table
from peftkern.transfer.schedules import SCHEDULES, schedule, slanted

from .models import bert, llama, lora, transformers


def rate_of(groups: list[dict], parameter: nn.Parameter) -> float:
    rates = [group["lr"] for group in groups if any(p is parameter for p in group["params"])]
    assert len(rates) == 1
    return rates[0]


# ---- depth


def test_depths_of_a_llama() -> None:
    depths = parameter_depths(llama(layers=4))
    assert depths["model.embed_tokens.weight"] == 0
    assert [depths[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert depths["model.norm.weight"] == depths["lm_head.weight"] == 5


def test_a_tied_head_is_there_once_and_at_the_bottom() -> None:
    model = llama(tied=True)
    depths = parameter_depths(model)
    assert "lm_head.weight" not in depths and depths["model.embed_tokens.weight"] == 0
    groups = Rates(layer_ratio=100).groups(model, lr=1.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert rate_of(groups, model.lm_head.weight) == pytest.approx(0.01)


def test_depths_of_an_encoder_and_of_an_encoder_decoder() -> None:
    depths = parameter_depths(bert())
    assert (
        depths["bert.embeddings.LayerNorm.weight"]
        == depths["bert.embeddings.position_embeddings.weight"]
        == 0
    )
    assert depths["bert.encoder.layer.2.output.dense.bias"] == 3
    assert depths["bert.pooler.dense.weight"] == depths["classifier.weight"] == 4
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=4
    )
    depths = parameter_depths(transformers.T5ForConditionalGeneration(config))
    assert depths["shared.weight"] == 0 and depths["encoder.block.1.layer.0.SelfAttention.q.weight"] == 2
    assert depths["encoder.final_layer_norm.weight"] == 2
    assert (
        depths["decoder.block.0.layer.0.SelfAttention.q.weight"] == 3
        and depths["decoder.final_layer_norm.weight"] == 6
    )


def test_the_norm_that_opt_registers_first_is_at_the_top() -> None:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=8,
    )
    depths = parameter_depths(transformers.OPTForCausalLM(config))
    assert depths["model.decoder.final_layer_norm.weight"] == depths["model.decoder.project_out.weight"] == 3
    assert depths["model.decoder.embed_positions.weight"] == depths["model.decoder.project_in.weight"] == 0


def test_depths_of_adapters_and_of_plain_modules() -> None:
    depths = parameter_depths(lora(llama(), modules_to_save=["lm_head"]))
    assert depths["base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight"] == 3
    assert depths["base_model.model.lm_head.modules_to_save.default.weight"] == 5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
            self.head = nn.Linear(2, 1)

    assert parameter_depths(Net()) == {
        "body.0.weight": 1,
        "body.0.bias": 1,
        "body.2.weight": 3,
        "body.2.bias": 3,
        "head.weight": 4,
        "head.bias": 4,
    }


def test_a_model_without_layers_and_a_wrong_name_are_errors() -> None:
    with pytest.raises(ValueError, match="Linear has no nn.ModuleList"):
        layer_stacks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'blocks' ends no name"):
        parameter_depths(llama(), layers="blocks")
    assert layer_stacks(llama(), "layers")[0].path == "model.layers"


# ---- groups


def test_rates_spread_geometrically_over_the_total_ratio() -> None:
    model = lora(llama(layers=4))
    groups = Rates(layer_ratio=2.6**3).groups(model, lr=0.5)
    assert [group["depth"] for group in groups] == [4, 3, 2, 1]
    assert [group["lr"] for group in groups] == pytest.approx([0.5, 0.5 / 2.6, 0.5 / 2.6**2, 0.5 / 2.6**3])
    assert [group["lr"] for group in Rates(layer_ratio=100).groups(lora(llama(layers=1)), lr=0.5)] == [0.5]


def test_lora_plus_multiplies_what_it_names() -> None:
    model = lora(llama(layers=2), lora_bias=True, use_dora=False)
    for also, fast in ((("B",), {"B"}), (("B", "bias"), {"B", "bias"})):
        groups = Rates(layer_ratio=10, lora_plus=16, lora_plus_on=also).groups(model, lr=1.0)
        depths = parameter_depths(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = 10.0 ** (depths[name] - 2) * (16 if parameter_kind(name, parameter) in fast else 1)
                assert rate_of(groups, parameter) == pytest.approx(expected)


def test_the_groups_of_pefts_lora_plus() -> None:
    """With every vector multiplied, as PEFT does it."""
    from peft.optimizers import create_loraplus_optimizer

    model = lora(llama(layers=2), use_dora=True)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    ).param_groups
    ours = Rates(lora_plus=16, lora_plus_on=("B", "magnitude", "bias")).groups(
        model, lr=1e-3, weight_decay=0.1
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert rate_of(ours, parameter) == rate_of(theirs, parameter)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = llama()
    groups = Rates(layer_ratio=17.6).groups(model, lr=1.0, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    first = groups[0]["params"].pop()
    with pytest.raises(ValueError, match="1 is in no group"):
        check_groups(groups, model)
    groups[0]["params"] += [first, first]
    with pytest.raises(ValueError, match="1 is in several groups"):
        check_groups(groups, model)
    first.requires_grad_(False)
    groups[0]["params"].pop()
    with pytest.raises(ValueError, match="but not trainable parameters"):
        check_groups(groups, model)


def test_groups_are_the_same_in_another_process() -> None:
    """Their order and their parameters' come from the model alone, so a stored optimizer state fits."""
    one, two = (Rates(layer_ratio=5, lora_plus=2).groups(lora(llama()), lr=1.0) for _ in range(2))
    shapes = [
        [(group["name"], [tuple(p.shape) for p in group["params"]]) for group in groups]
        for groups in (one, two)
    ]
    assert shapes[0] == shapes[1]
    assert "depth  kind" in rates_table(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_ratio": 0.01}, "layer_ratio: got 0.01"),
        ({"layer_ratio": math.inf}, "layer_ratio: got inf"),
        ({"lora_plus": 0.0}, "lora_plus: got 0"),
        ({"lora_plus_on": ("A",)}, "lora_plus_on: got"),
    ],
)
def test_wrong_rates(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rates(**options)


def test_nothing_to_train_or_to_multiply() -> None:
    model = llama()
    with pytest.raises(ValueError, match="nothing to multiply"):
        Rates(lora_plus=16).groups(model, lr=1.0)
    with pytest.raises(ValueError, match="depths: has no depth for model.embed_tokens.weight"):
        Rates(layer_ratio=2).groups(model, lr=1.0, depths={})
    with pytest.raises(ValueError, match="no parameter of LlamaForCausalLM is trainable"):
        Rates().groups(model.requires_grad_(False), lr=1.0)


# ---- schedules


def test_slanted_triangular_as_in_the_paper() -> None:
    """Equation 3 of Howard and Ruder (2018), where total * cut_frac is whole."""
    total, cut_frac, ratio = 200, 0.1, 32
    cut = math.floor(total * cut_frac)
    for step in range(total):
        p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_frac - 1))
        assert slanted(step, total) == pytest.approx((1 + p * (ratio - 1)) / ratio, abs=1e-12)


def test_slanted_triangular_stays_positive_where_the_paper_s_does_not() -> None:
    values = [slanted(step, 15) for step in range(16)]
    assert min(values) == values[0] == values[-1] == 1 / 32 and max(values) == values[1] == 1.0
    assert values[1:] == sorted(values[1:], reverse=True)
    assert slanted(0, 5) == 1.0  # too short to rise


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.33])
def test_schedules_equal_those_of_transformers(name: str, warmup: float) -> None:
    total, rates = 37, []
    for ours in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        if ours:
            scheduler = LambdaLR(optimizer, schedule(name, total, warmup=warmup))
        else:
            steps = {"num_warmup_steps": math.ceil(total * warmup), "num_training_steps": total}
            scheduler = transformers.get_scheduler(name, optimizer, **steps)
        rates.append([])
        for _ in range(total):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], abs=1e-15)


def test_a_scheduler_stores_nothing_of_the_schedule() -> None:
    """So that an extended run follows the schedule of its new length."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    stored = LambdaLR(optimizer, schedule("slanted", 10)).state_dict()
    longer = LambdaLR(optimizer, schedule("slanted", 1000))
    longer.load_state_dict(stored)
    assert longer.lr_lambdas[0](999) == slanted(999, 1000)


def test_wrong_schedules() -> None:
    with pytest.raises(ValueError, match="name: got 'triangle', expected one of slanted"):
        schedule("triangle", 10)
    with pytest.raises(ValueError, match="total: got 0"):
        schedule("cosine", 0)
    with pytest.raises(ValueError, match="warmup: got 1"):
        schedule("slanted", 10, warmup=1.0)
    with pytest.raises(ValueError, match="ratio: got 0.5"):
        schedule("slanted", 10, ratio=0.5)
    assert set(SCHEDULES) == {"slanted", "linear", "cosine", "constant_with_warmup"}


def test_plain_pytorch_trains_by_groups_and_schedule() -> None:
    model = lora(llama())
    optimizer = torch.optim.AdamW(Rates(layer_ratio=17.6, lora_plus=16).groups(model, lr=1e-3))
    scheduler = LambdaLR(optimizer, schedule("slanted", 10))
    base = [group["initial_lr"] for group in optimizer.param_groups]
    for step in range(3):
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [rate * slanted(step + 1, 10) for rate in base]
        )
