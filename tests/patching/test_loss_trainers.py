"""The fused loss under transformers' Trainer and generate, which ask a model's forward for its signature, and
under TRL's trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkern

from ..cases import each_choice
from . import models
from .test_loss import IDS, LABELS, lora, make

pytestmark = pytest.mark.any_isa

transformers = models.transformers
TEXT = torch.where(torch.arange(12) < torch.tensor([[5], [0]]), 0, IDS)  # left-padded
MASK = (TEXT != 0).long()


def pair(kind: str = "llama") -> tuple[nn.Module, nn.Module]:
    """A stock model and a patched copy, whose loss is fused."""
    stock = lora(
        make(kind),
        target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    ours = copy.deepcopy(stock)
    report = peftkern.patch(ours, fused_loss=True)
    assert report.counts["linear_cross_entropy"] == 1
    return stock, ours


def trained(model: nn.Module, folder: Path, **options) -> tuple[Tensor, Tensor]:
    """The loss of each logged step, and that of the evaluation."""
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids, labels in zip(IDS, LABELS, strict=True)
    ]
    arguments = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
    )
    fixed = dict(report_to="none", use_cpu=True, save_strategy="no", seed=1, disable_tqdm=True)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **arguments | options, **fixed),
        train_dataset=rows * 3,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"words": prediction.predictions.shape[-1]},
    )
    trainer.train()
    measured = trainer.evaluate()
    assert measured["eval_words"] == 96, "an evaluation gets its logits"
    return torch.tensor(
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ), torch.tensor(measured["eval_loss"])


@pytest.mark.parametrize("kind, smoothing", each_choice(["llama", "gpt2"], [0.0, 0.1]))
def test_trainer(kind: str, smoothing: float, tmp_path: Path, loss_calls: list) -> None:
    """With label smoothing the trainer keeps the labels and makes its loss from logits, which are then
    there."""
    stock, ours = pair(kind)
    expected = trained(stock, tmp_path, label_smoothing_factor=smoothing)
    got = trained(ours, tmp_path, label_smoothing_factor=smoothing)
    assert bool(loss_calls) == (smoothing == 0.0)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [True, False], ids=["a mask", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_from_left_padded_text(kind: str, mask: bool) -> None:
    given = {"attention_mask": MASK} if mask else {}
    stock, ours = (
        model.eval().generate(input_ids=TEXT, max_new_tokens=6, do_sample=False, pad_token_id=0, **given)
        for model in pair(kind)
    )
    assert torch.equal(ours, stock)


def fitted(folder: Path) -> tuple[nn.Module, int]:
    """A patched model that TRL has put its head on and trained, and how many forwards were patched before
    that."""
    pytest.importorskip("trl", reason="trl is not installed")
    from .test_trl import trainer

    model = models.lora(models.llama())
    peftkern.patch(model, fused_loss=True)
    patched = peftkern.unpatch(copy.deepcopy(model))
    trainer(model, folder).train()
    return model.train(), patched


def test_unpatch_takes_the_loss_out_of_the_head_that_trl_put_around_it(
    tmp_path: Path, loss_calls: list
) -> None:
    model, patched = fitted(tmp_path)
    assert model(input_ids=IDS, labels=LABELS).logits is None and loss_calls
    loss_calls.clear()
    assert peftkern.unpatch(model) == patched
    output = model(input_ids=IDS, labels=LABELS)
    stock = type(model.get_base_model()).forward(model.get_base_model(), input_ids=IDS, labels=LABELS)
    assert (
        torch.equal(output.logits, stock.logits) and torch.equal(output.loss, stock.loss) and not loss_calls
    )


def test_a_second_patch_over_trls_head_reports_what_runs(tmp_path: Path, loss_calls: list) -> None:
    model, _ = fitted(tmp_path)
    (row,) = [row for row in peftkern.patch(model, fused_loss=True).rows if row.kind == "loss"]
    assert "its forward was replaced" in row.reason
    loss_calls.clear()
    assert model(input_ids=IDS, labels=LABELS).logits is not None and not loss_calls
