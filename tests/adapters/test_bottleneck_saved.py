"""Modules that are trained whole beside a bottleneck adapter: `modules_to_save`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkern
from peftkern.adapters.bottleneck import (
    BottleneckModel,
    add_bottleneck,
    bottleneck_disabled,
    bottleneck_parameters,
    get_bottleneck_model,
    load_bottleneck,
    remove_bottleneck,
    save_bottleneck,
    set_bottleneck,
)

from ..patching import models
from ..patching.models import IDS

transformers, peft = models.transformers, models.peft
CONFIG = "seq_bn[size=4,original_ln_before=False,modules_to_save=['score']]"


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS % 128).logits


def train(model: nn.Module, steps: int = 3) -> None:
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.05)
    for _ in range(steps):
        labels = torch.arange(len(IDS)) % 3
        optimizer.zero_grad()
        model(input_ids=IDS % 128, labels=labels).loss.backward()
        optimizer.step()


def test_a_classifiers_head_trains_is_saved_and_comes_back(tmp_path: Path) -> None:
    config = "seq_bn[size=4,original_ln_before=False,init=mam_adapter]"
    model, base = get_bottleneck_model(classifier(), config, task_type="SEQ_CLS"), classifier()
    assert torch.equal(logits(base), logits(model))
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("modules_to_save.default" in name for name in names)
    assert all("modules_to_save.default" in name or "bottlenecks.default" in name for name in names)
    train(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    head = saved["base_model.model.score.weight"]
    assert not torch.equal(head, base.score.weight)
    again = BottleneckModel.from_pretrained(classifier(), tmp_path)
    assert again.peft_config["default"].modules_to_save == ["score"]
    assert torch.equal(logits(again), logits(model.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(model.unload().score.weight, base.score.weight)


def test_a_state_dict_of_the_trainer_is_saved_by_the_same_names(tmp_path: Path) -> None:
    model = get_bottleneck_model(classifier(), CONFIG)
    train(model, 1)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    own, state = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "state"))
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_gradients_of_the_head_are_the_bases() -> None:
    base = classifier()
    adapted = copy.deepcopy(base)
    add_bottleneck(adapted, CONFIG.replace("size=4", "size=4,init=mam_adapter"))  # B = 0: the base
    for model in (base, adapted):
        model(input_ids=IDS % 128, labels=torch.arange(len(IDS)) % 3).loss.backward()
    grads = {name: value.grad for name, value in bottleneck_parameters(adapted).items()}
    assert torch.equal(grads["score.weight"], base.score.weight.grad)
    assert adapted.score.original_module.weight.grad is None


def test_each_adapter_has_its_own_head() -> None:
    model = classifier()
    before = logits(model)
    add_bottleneck(model, CONFIG, name="a")
    train(model)
    add_bottleneck(model, CONFIG, name="b")
    train(model)
    add_bottleneck(model, "seq_bn[size=4,original_ln_before=False,init=mam_adapter]", name="headless")
    assert torch.equal(logits(model), before)  # its head is the base's
    of = {}
    for name in ("a", "b"):
        set_bottleneck(model, name)
        of[name] = logits(model)
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trainable and all(f".{name}." in key for key in trainable)
    assert not torch.equal(of["a"], of["b"])
    with pytest.raises(ValueError, match="both have their own 'score'"):
        set_bottleneck(model, ["a", "b"])
    assert torch.equal(logits(model), of["b"])  # nothing was changed
    set_bottleneck(model, ["b", "headless"])
    assert model.score.active_adapters == ["b"]
    remove_bottleneck(model, "b")
    remove_bottleneck(model)
    assert type(model.score) is nn.Linear
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_turned_off_and_on_nothing_else_changes() -> None:
    model = classifier()
    before = logits(model)
    add_bottleneck(model, CONFIG)
    train(model, 1)
    set_bottleneck(model, "default", trainable=False)
    adapted = logits(model)
    with bottleneck_disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_patched_it_computes_the_same() -> None:
    model = classifier()
    add_bottleneck(model, CONFIG)
    train(model, 1)
    expected = logits(model)
    peftkern.patch(model, dense=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    peftkern.unpatch(model)
    assert torch.equal(logits(model), expected)


def test_beside_lora_with_a_head_of_its_own() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    model = peft.get_peft_model(classifier(), config)
    head = model.base_model.model.score.modules_to_save["default"]
    with pytest.raises(ValueError, match="trained whole by another adapter"):
        add_bottleneck(model.base_model.model, CONFIG)
    add_bottleneck(model.base_model.model, "seq_bn[size=4,original_ln_before=False]", name="default")
    assert model.base_model.model.score.active_adapters == ["default"]
    assert model.base_model.model.score.modules_to_save["default"] is head


def test_buffers_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = classifier()
        torch.manual_seed(1)
        model.score = nn.Sequential(nn.Linear(32, 3))
        model.score.register_buffer("seen", torch.zeros(2))
        return model

    model = build()
    add_bottleneck(model, CONFIG)
    model.score.modules_to_save["default"].seen += 7
    save_bottleneck(model, tmp_path)
    other = build()
    load_bottleneck(other, tmp_path)
    assert torch.equal(other.score.modules_to_save["default"].seen, torch.full((2,), 7.0))
    assert torch.equal(other.score.original_module.seen, torch.zeros(2))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("['scores']", "no module 'scores'"),
        ("['layers.0']", "holds the adapter's place"),
        ("['act_fn']", "has no parameters"),
        ("['']", "expected names of modules"),
    ],
)
def test_names_that_cannot_be_are_told(names: str, message: str) -> None:
    model = classifier()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_bottleneck(model, CONFIG.replace("['score']", names))
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
