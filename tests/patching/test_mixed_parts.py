"""Batches of mixed adapters where more than the linears belongs to an adapter: every part follows its sample,
in evaluation and in training, or an error names the module before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.patching.forwards import find

from . import models

IDS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(5))
NAMES = ["default", "second", "default", "__base__"]
PARTS = ("lora_", "modules_to_save", "trainable_tokens_delta")


def adapted(kind: str = "LlamaForCausalLM", **options) -> nn.Module:
    """Two adapters of the same config, every part of each with numbers of its own."""
    transformers = models.transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=3,
        classifier_dropout=0.0,
    )
    model = models.peft.get_peft_model(
        getattr(transformers, kind)(config), models.peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)
    )
    model.add_adapter("second", models.peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif any(part in name for part in PARTS):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in PARTS))


def outputs_alone(model: nn.Module) -> Tensor:
    """Each sample by itself on the stock model, with its adapter alone active."""
    rows = []
    for ids, name in zip(IDS, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(input_ids=ids[None], use_cache=False).logits)
            trainable(model)  # what PEFT has changed
            continue
        model.set_adapter(name)
        trainable(model)
        rows.append(model(input_ids=ids[None], use_cache=False).logits)
    return torch.cat(rows)


def outputs_mixed(model: nn.Module) -> Tensor:
    with peftkern.mixed_adapters(model, NAMES):
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    trainable(model)
    forward(model).square().mean().backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }


Q_V = ["q_proj", "v_proj"]
CASES = {
    "head of a classifier": (
        "LlamaForSequenceClassification",
        dict(task_type="SEQ_CLS", target_modules=Q_V),
        (),
    ),
    "head of a tagger": ("LlamaForTokenClassification", dict(task_type="TOKEN_CLS", target_modules=Q_V), ()),
    "norm in modules_to_save": ("LlamaForCausalLM", dict(target_modules=Q_V, modules_to_save=["norm"]), ()),
    "lm_head in modules_to_save": (
        "LlamaForCausalLM",
        dict(target_modules=Q_V, modules_to_save=["lm_head"]),
        (),
    ),
    "embedding and lm_head": (
        "LlamaForCausalLM",
        dict(target_modules=Q_V, modules_to_save=["embed_tokens", "lm_head"]),
        (),
    ),
    "LoRA on the embedding": ("LlamaForCausalLM", dict(target_modules=["q_proj", "embed_tokens"]), ()),
    "trainable tokens": (
        "LlamaForCausalLM",
        dict(target_modules=["q_proj"], trainable_token_indices=list(range(3, 50))),
        (),
    ),
    "an excluded layer": ("LlamaForCausalLM", dict(target_modules=["q_proj", "o_proj"]), ["o_proj"]),
    "an excluded sibling": ("LlamaForCausalLM", dict(target_modules="all-linear"), ["k_proj", "up_proj"]),
    "DoRA": ("LlamaForCausalLM", dict(target_modules="all-linear", use_dora=True), ()),
    "DoRA on the embedding": (
        "LlamaForCausalLM",
        dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
        (),
    ),
    "LoRA on lm_head": ("LlamaForCausalLM", dict(target_modules=["q_proj", "lm_head"]), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_every_part_follows_its_sample(case):
    kind, options, exclude = CASES[case]
    stock = adapted(kind, **options)
    model = copy.deepcopy(stock)
    peftkern.patch(model, exclude=exclude)
    before = [module for module in model.modules() if find(module) is not None]
    with torch.no_grad():
        expected = outputs_alone(stock)
        torch.testing.assert_close(outputs_mixed(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2) and not torch.allclose(
        expected[2], expected[3], atol=1e-2
    )
    stock.train(), model.train()
    wanted, got = gradients(stock, outputs_alone), gradients(model, outputs_mixed)
    assert got.keys() == wanted.keys() and {".default" in name for name in got} == {True, False}
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=2e-3, atol=2e-4 * grad.abs().max().item(), msg=name)
    assert [module for module in model.modules() if find(module) is not None] == before, (
        "it ends with the block"
    )
    for module in model.modules():
        assert "_peftkern_adapter_names" not in module.__dict__


def test_the_active_adapter_is_as_it_was():
    model = adapted("LlamaForSequenceClassification", task_type="SEQ_CLS", target_modules=Q_V)
    peftkern.patch(model)
    model.set_adapter("second")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        outputs_mixed(model)
        with (
            pytest.raises(ValueError, match="got 4 names for a batch of 3 samples"),
            peftkern.mixed_adapters(model, NAMES),
        ):
            model(input_ids=IDS[:3])
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert model.base_model.model.score.active_adapters == ["second"]


def test_disabled_adapters_stay_disabled():
    model = adapted("LlamaForSequenceClassification", task_type="SEQ_CLS", target_modules=Q_V)
    peftkern.patch(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(outputs_mixed(model), model(input_ids=IDS).logits)


def test_recomputation_within_the_block():
    options = dict(target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"])
    model = adapted(**options).train()
    peftkern.patch(model)
    trainable(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with peftkern.mixed_adapters(model, NAMES):
            model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_fused_loss_mixes_too():
    """A head that belongs to the adapters makes logits; their loss is the stock one."""
    for options in (
        dict(modules_to_save=["lm_head"], target_modules=Q_V),
        dict(target_modules=["q_proj", "lm_head"]),
    ):
        stock = adapted(task_type="CAUSAL_LM", **options).train()
        model = copy.deepcopy(stock)
        peftkern.patch(model, fused_loss=True)
        with torch.no_grad():
            logits = outputs_alone(stock)
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        with peftkern.mixed_adapters(model, NAMES):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)


class Convolutions(nn.Module):
    """A convolution and a linear, both of adapters, on [samples, channels, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x))


def test_convolutions_follow_their_sample():
    torch.manual_seed(0)
    stock = models.peft.get_peft_model(
        Convolutions(), models.peft.LoraConfig(r=2, target_modules=["conv", "linear"])
    )
    stock.add_adapter("second", models.peft.LoraConfig(r=2, target_modules=["conv", "linear"]))
    models.randomize(stock)
    model, x, expected = copy.deepcopy(stock), torch.randn(4, 8, 10), []
    peftkern.patch(model)
    with torch.no_grad():
        for name, row in zip(NAMES, x, strict=True):
            stock.base_model.set_adapter("default" if name == "__base__" else name)
            base = stock.base_model
            base.disable_adapter_layers() if name == "__base__" else base.enable_adapter_layers()
            expected.append(stock(row[None]))
        with peftkern.mixed_adapters(model, NAMES):
            torch.testing.assert_close(model(x), torch.cat(expected), rtol=1e-4, atol=1e-4)


class Routed(nn.Module):
    """Tokens to one of two experts, which see no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.proj = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.proj(x).flatten(0, 1)
        return torch.where(flat[:, :1] > 0, self.experts[0](flat), self.experts[1](flat)).view(x.shape)


def two(model: nn.Module, **options) -> nn.Module:
    model = models.peft.get_peft_model(model, models.peft.LoraConfig(r=2, **options))
    model.add_adapter("second", models.peft.LoraConfig(r=2, **options))
    return model


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.proj = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.attention(x, x, x)[0]


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.proj(x).mean(1))


REFUSED = {
    "experts": (
        Routed,
        dict(target_modules=["0", "1", "proj"]),
        r"experts\.0 \(and 1 more\) cannot mix .* router",
    ),
    "attention": (
        Attending,
        dict(target_modules=["attention", "proj"]),
        "attention cannot mix .* MultiheadAttention",
    ),
    "batch norm": (
        Normalized,
        dict(target_modules=["proj"], modules_to_save=["head"]),
        "head cannot mix .* normalizes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mixed_is_named_before_anything_runs(case):
    make, options, message = REFUSED[case]
    model = two(make(), **options).train()
    peftkern.patch(model)
    with pytest.raises(ValueError, match=message):
        peftkern.mixed_adapters(model, ["default", "second"]).__enter__()
    with torch.no_grad():
        model(torch.randn(2, 3, 8))  # nothing is left behind


def test_merged_adapters_are_named():
    model = two(nn.ModuleDict({"proj": nn.Linear(8, 8)}), target_modules=["proj"])
    peftkern.patch(model)
    model.merge_adapter()
    with pytest.raises(
        ValueError,
        match="proj cannot mix adapters: 'default' is merged into its weight; call unmerge_adapter",
    ):
        peftkern.mixed_adapters(model, ["default", "second"]).__enter__()
