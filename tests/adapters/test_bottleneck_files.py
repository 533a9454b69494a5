"""Bottleneck adapters on disk, as a PeftModel, and in the Hugging Face Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern.adapters.bottleneck import (
    BottleneckModel,
    add_bottleneck,
    bottleneck_parameters,
    get_bottleneck_model,
    load_bottleneck,
    save_bottleneck,
)
from peftkern.adapters.bottleneck.layer import BottleneckLayer

from .. import stock
from ..patching import models, zoo
from ..patching.models import IDS, llama
from .adapterhub import cases
from .test_bottleneck_places import CONFIGS, build, randomize

transformers, peft = models.transformers, models.peft


@pytest.fixture(autouse=True)
def stock_bitsandbytes():
    with stock.right():
        yield


def trained(kind: str = "houlsby") -> BottleneckModel:
    model = get_bottleneck_model(llama(torch.float32), CONFIGS[kind], task_type="CAUSAL_LM")
    randomize(model.get_base_model())
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, name: str, kind: str) -> None:
    model = build(name)
    add_bottleneck(model, CONFIGS[kind])
    randomize(model)
    save_bottleneck(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other = build(name)
    peftkern.patch(other, dense=True)
    state = torch.get_rng_state()
    load_bottleneck(other, tmp_path, name="b")
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: value.tolist() for key, value in bottleneck_parameters(other, "b").items()} == {
        key: value.tolist() for key, value in bottleneck_parameters(model).items()
    }
    peftkern.unpatch(other)
    assert torch.equal(zoo.output(other), zoo.output(model))
    assert not any(p.requires_grad for p in other.parameters())


def test_the_files_are_in_pefts_manner(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == (
        "BOTTLENECK",
        "CAUSAL_LM",
        True,
    )
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.mlp.bottleneck.down" in keys
    assert len(keys) == 4 * 4  # two places in two layers; two matrices, two biases


def test_a_peft_model_in_every_way_that_trainers_ask(tmp_path: Path) -> None:
    model = trained()
    assert isinstance(model, peft.PeftModel) and model.get_base_model() is model.base_model
    assert model.active_adapters == ["default"] and model.peft_config["default"].peft_type == "BOTTLENECK"
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in bottleneck_parameters(model.base_model).values()) < total
    adapted, base = logits(model), logits(llama(torch.float32))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    model.save_pretrained(tmp_path)
    again = BottleneckModel.from_pretrained(llama(torch.float32), tmp_path)
    assert torch.equal(logits(again), adapted) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    further = BottleneckModel.from_pretrained(llama(torch.float32), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in bottleneck_parameters(further.base_model).values())
    assert torch.equal(logits(model.unload()), base)


def test_several_adapters_have_folders_of_their_own(tmp_path: Path) -> None:
    model = trained()
    first = logits(model)
    model.add_adapter("second", CONFIGS["parallel"])
    assert model.active_adapters == ["default"]
    model.set_adapter("second")
    with torch.no_grad():
        for parameter in bottleneck_parameters(model.base_model, "second").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    again = BottleneckModel.from_pretrained(llama(torch.float32), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    assert torch.equal(logits(again), second)
    again.delete_adapter("default")
    assert torch.equal(logits(again), second)
    with pytest.raises(ValueError, match="'second' is the active adapter; unload"):
        again.delete_adapter("second")


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_is_refused(method: str) -> None:
    with pytest.raises(
        NotImplementedError, match="cannot be merged into the base: its activation makes it no linear map"
    ):
        getattr(trained(), method)()


def test_a_state_dict_can_be_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = trained("parallel")
    state = {
        key: value.clone() * 2 if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=state)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in bottleneck_parameters(model.base_model).items():
        assert torch.equal(saved[f"base_model.model.{key}"], value * 2)


def _write(folder: Path, **changes: Any) -> Path:
    save_bottleneck(_small(), folder)
    values = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def _small() -> nn.Module:
    model = build("llama")
    add_bottleneck(model, CONFIGS["houlsby"])
    return model


def _other_base(folder: Path) -> None:
    save_bottleneck(build_bert(), folder)


def build_bert() -> nn.Module:
    model = build("bert")
    add_bottleneck(model, CONFIGS["houlsby"])
    return model


def _other_width(folder: Path) -> None:
    _write(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: value[..., :-1].contiguous() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )


@pytest.mark.parametrize(
    ("prepare", "kind", "message"),
    [
        (lambda folder: None, FileNotFoundError, "has no adapter_config.json; give a folder"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), ValueError, "is no JSON"),
        (
            lambda folder: _write(folder, peft_type="LORA"),
            ValueError,
            "holds an adapter of the kind 'LORA', expected 'BOTTLENECK'",
        ),
        (
            lambda folder: (_write(folder) / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "adapter_model.safetensors: is missing",
        ),
        (
            lambda folder: (_write(folder) / "adapter_model.safetensors").write_bytes(b"x" * 99),
            ValueError,
            "is damaged",
        ),
        (_other_base, ValueError, "was saved from another model: it lacks model.layers.0"),
        (_other_width, ValueError, "was saved from another model: .* is "),
    ],
)
def test_what_cannot_be_loaded_is_told_and_leaves_the_model_as_it_was(
    tmp_path: Path, prepare: Any, kind: type, message: str
) -> None:
    prepare(tmp_path)
    model = build("llama")
    before = [(path, id(module)) for path, module in model.named_modules()]
    with pytest.raises(kind, match=message):
        load_bottleneck(model, tmp_path)
    assert [(path, id(module)) for path, module in model.named_modules()] == before


def _trainer(folder: Path, **options: Any) -> Any:
    model = get_bottleneck_model(llama(torch.float32), CONFIGS["parallel"], task_type="CAUSAL_LM")
    model.base_model.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    model.base_model.is_quantized = True  # as transformers marks a model that it has loaded in 4 bit
    peftkern.patch(model)
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(1, 96, (12, 10), generator=torch.Generator().manual_seed(0))
    ]
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    } | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_saves_adapters_alone_and_resumes_to_the_same_bits(
    tmp_path: Path, checkpointing: bool
) -> None:
    whole = _trainer(tmp_path / "whole", gradient_checkpointing=checkpointing)
    whole.train()
    assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    broken = _trainer(tmp_path / "broken", gradient_checkpointing=checkpointing)
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = (bottleneck_parameters(trainer.model.base_model) for trainer in (broken, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    losses = [
        [row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, broken)
    ]
    assert losses[0] == losses[1]
    evaluated = [row["eval_loss"] for row in whole.state.log_history if "eval_loss" in row]
    assert evaluated[-1] < evaluated[0]


@pytest.mark.parametrize(("name", "config"), cases.CASES)
def test_adapterhubs_adapters_compute_what_its_library_computes(
    tmp_path: Path, name: str, config: str
) -> None:
    """Recorded with adapters 1.3.0 in fp64."""
    folder, model = cases.SOURCE / f"{name}-{config}", cases.build(name)
    if config == "par_bn" and name != "bert":
        with pytest.raises(
            ValueError,
            match="AdapterHub's parallel adapter reads the stream before the norm of a pre-norm layer",
        ):
            load_bottleneck(model, folder)
        return
    load_bottleneck(model, folder)
    expected = load_file(folder / "output.safetensors")["output"]
    got = cases.output(model)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)  # 4.4e-16 on a Zen 5
    assert (got - cases.output(cases.build(name))).abs().max() > 0.01
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    torch.save(load_file(folder / "adapter.safetensors"), tmp_path / "pytorch_adapter.bin")
    load_bottleneck(model, tmp_path, name="as pickled")
    assert torch.equal(cases.output(model), got)


def test_adapterhubs_adapter_of_another_model_is_told(tmp_path: Path) -> None:
    model = cases.build("llama")
    with pytest.raises(
        ValueError, match="has 2 adapters in encoder.layer.0, the model has 0 places for them there"
    ):
        load_bottleneck(model, cases.SOURCE / "bert-double_seq_bn")
    with pytest.raises(FileNotFoundError, match="has neither adapter.safetensors nor pytorch_adapter.bin"):
        (tmp_path / "adapter_config.json").write_text(
            (cases.SOURCE / "bert-seq_bn" / "adapter_config.json").read_text()
        )
        load_bottleneck(model, tmp_path)
    assert not any(isinstance(module, BottleneckLayer) for module in model.modules())
