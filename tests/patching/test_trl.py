"""TRL's SFTTrainer, which puts a fused head of its own on the model, over a patched one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import peftkern

from . import models

pytestmark = pytest.mark.any_isa

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")


def trainer(model: nn.Module, folder: Path) -> trl.SFTTrainer:
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models

    words = tokenizer_models.WordLevel({"word": 0, "<pad>": 1}, unk_token="word")
    tokenizer = models.transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="word"
    )
    rows = datasets.Dataset.from_dict({"input_ids": [models.IDS[0].tolist()] * 8})
    options = dict(per_device_train_batch_size=2, max_steps=3, logging_steps=1, learning_rate=1e-3, seed=0)
    fixed = dict(
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **options, **fixed),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def rounded(model: nn.Module) -> nn.Module:
    """With adapters in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def losses(trained: trl.SFTTrainer) -> list[float]:
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_patched_before_or_after_the_trainer_was_made_trains_alike(when: str, calls, tmp_path):
    expected = losses(trainer(models.lora(models.llama()), tmp_path / "stock"))
    model = models.lora(models.llama())
    if when == "before":
        peftkern.patch(model, fused_loss=True)
    ours = trainer(model, tmp_path / "ours")
    if when == "after":
        report = peftkern.patch(model, fused_loss=True)
        (row,) = [row for row in report.rows if row.kind == "loss"]
        assert "its forward was replaced" in row.reason, "TRL's head stays, and the report says so"
    got = losses(ours)
    assert calls["lora"] == 3 * 14 and len(got) == 3
    for ours_, stock, before in zip(got[1:], expected[1:], expected, strict=False):
        assert abs(ours_ - stock) <= 0.01 * abs(stock - before), (
            "what the kernels change is lost in what a step changes"
        )
    # TRL turns the adapters of a 4-bit model into bf16, and stock multiplies in bf16 where ours sums in fp32.
    exact = float(models.run(models.in_fp64(rounded(models.lora(models.llama()))), models.IDS[:1])["loss"])
    assert abs(got[0] - exact) <= max(abs(expected[0] - exact), 2**-23 * exact)
