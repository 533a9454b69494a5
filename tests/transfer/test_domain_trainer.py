"""DANN and MMD in the Trainer: features, target rows by the step, accumulation, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.alignment import FeatureTap, MMDAlignment, backbone, rows_of_step  # noqa: E402
from peftkern.transfer.dann import DANNLoss  # noqa: E402
from peftkern.transfer.domain_trainer import DomainAdaptationMixin  # noqa: E402
from peftkern.transfer.features import pool_mean  # noqa: E402


class AdaptingTrainer(DomainAdaptationMixin, transformers.Trainer):
    pass


def classifier(*, dropout: float = 0.1) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def rows(count: int, seed: int, *, first: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        ids = torch.randint(first, first + 20, (length,), generator=generator).tolist()
        ids, mask = ids + [0] * (8 - length), [1] * length + [0] * (8 - length)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": int(ids[0] % 2)})
    return made


def trainer(
    folder: Path, alignment: Any, *, steps: int = 6, model: nn.Module | None = None, **options: Any
) -> AdaptingTrainer:
    settings = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    arguments = transformers.TrainingArguments(**(settings | options))
    made = AdaptingTrainer(
        model=model or classifier(),
        args=arguments,
        train_dataset=rows(24, 0),
        data_collator=transformers.default_data_collator,
    )
    if alignment is not None:
        made.align(alignment, rows(20, 1, first=21))
    return made


@pytest.mark.parametrize("make", [lambda: DANNLoss(16, hidden=8), MMDAlignment])
def test_a_run_resumed_after_a_kill_is_the_unbroken_one(tmp_path: Path, make: Any) -> None:
    whole = trainer(tmp_path / "whole", make())
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = trainer(tmp_path / "again", make(), model=classifier())
    again.train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in ((again.model, whole.model), (again._alignment, whole._alignment)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), (
                name,
                (value - ours.state_dict()[name]).abs().max(),
            )
    logged = [
        [row for row in run.state.log_history if row.get("step", 0) > 3 and "loss" in row]
        for run in (whole, again)
    ]
    names = (
        ("loss", "mmd2")
        if isinstance(whole._alignment, MMDAlignment)
        else ("loss", "domain_loss", "discriminator_accuracy")
    )
    assert len(logged[0]) == 3
    for name in names:
        assert [row[name] for row in logged[0]] == [row[name] for row in logged[1]]


def test_loss_is_the_task_s_plus_the_alignment_s_of_unpadded_means(tmp_path: Path) -> None:
    alignment = DANNLoss(16, hidden=8)
    made = trainer(tmp_path, alignment, model=classifier(dropout=0.0))
    made.create_optimizer()
    made.state.max_steps, made.state.global_step, made.current_gradient_accumulation_steps = 10, 4, 1
    batch = transformers.default_data_collator(rows(4, 5))
    made.model.train()
    loss = made.compute_loss(made.model, dict(batch))
    index = rows_of_step(20, 4, 4)
    target = transformers.default_data_collator([rows(20, 1, first=21)[i] for i in index])

    def features(batch: dict[str, Any]) -> torch.Tensor:
        hidden = made.model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return torch.stack(
            [row[mask == 1][1:].mean(0) for row, mask in zip(hidden, batch["attention_mask"], strict=True)]
        )

    wanted = made.model(**batch).loss + alignment(features(batch), features(target), progress=0.4)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert made.model.bert.embeddings.word_embeddings.weight.grad.norm() > 0
    assert all(p.grad is not None for p in alignment.parameters())
    assert abs(made.compute_loss(made.model.eval(), dict(batch)).item() - loss.item()) > 0.1


@pytest.mark.parametrize("known_items", [False, True])
def test_accumulated_batches_share_the_alignment_s_weight(tmp_path: Path, known_items: bool) -> None:
    made = trainer(
        tmp_path, DANNLoss(16), model=classifier(dropout=0.0), gradient_accumulation_steps=2, steps=1
    )
    made.model_accepts_loss_kwargs = known_items
    made.train()
    logged = made.state.log_history[0]
    # transformers sums the batches' mean task losses where the number of items is known, and this model takes
    # no heed of it.
    task = (2 if known_items else 1) * 0.69
    assert made._micro_step == 1 and logged["loss"] == pytest.approx(task + logged["domain_loss"], abs=0.1)


def test_discriminator_has_a_rate_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, None)
    alignment = DANNLoss(16, hidden=8)
    made.align(alignment, rows(20, 1), learning_rate=0.5)
    group = made.create_optimizer().param_groups[-1]
    assert group["lr"] == 0.5 and {id(p) for p in group["params"]} == {id(p) for p in alignment.parameters()}
    with pytest.raises(ValueError, match="the optimizer exists already"):
        made.align(alignment, rows(20, 1))


def test_a_checkpoint_without_the_alignment_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "plain", None, steps=3).train()
    made = trainer(tmp_path / "again", MMDAlignment())
    with pytest.raises((InputError, ValueError), match="alignment.pt|parameter group"):
        made.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


def test_without_alignment_nothing_changes(tmp_path: Path) -> None:
    plain = transformers.Trainer(
        model=classifier(),
        args=trainer(tmp_path / "a", None).args,
        train_dataset=rows(24, 0),
        data_collator=transformers.default_data_collator,
    )
    plain.train()
    ours = trainer(tmp_path / "b", None)
    ours.train()
    for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_empty_targets_are_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, None)
    with pytest.raises(InputError, match=r"the target has 1 row\(s\), expected at least 2"):
        made.align(MMDAlignment(), rows(1, 0))


def test_probe_after_training(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="sklearn is not installed")
    made = trainer(tmp_path, MMDAlignment(), steps=2)
    made.train()
    found = made.domain_probe(rows(20, 0))
    assert found.rows == 20 and "held-out accuracy" in found.verdict


@pytest.mark.parametrize("reentrant", [False, True])
def test_features_have_their_gradient_under_checkpointing(reentrant: bool) -> None:
    model = classifier(dropout=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    grads = []
    for checkpointing in (True, False):
        if not checkpointing:
            model.gradient_checkpointing_disable()
        model.train().zero_grad()
        batch = transformers.default_data_collator(rows(4, 0))
        with FeatureTap(backbone(model)) as tap:
            model(**batch)
            tap.features(batch["attention_mask"]).square().sum().backward()
        grads.append(model.bert.encoder.layer[0].attention.self.query.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_a_tap_names_what_it_cannot_use() -> None:
    model, batch = classifier(), transformers.default_data_collator(rows(2, 0))
    with FeatureTap(model.dropout, pool=pool_mean) as tap:
        assert tap._hidden is None
        with pytest.raises(ValueError, match="Dropout was not called"):
            tap.features()
    model.requires_grad_(False)
    with FeatureTap(backbone(model)) as tap:
        model(**batch)
        with pytest.raises(ValueError, match="no gradient"):
            tap.features()
    with pytest.raises(ValueError, match="is no model of transformers"):
        backbone(nn.Linear(2, 2))


def test_rows_of_a_step_are_a_pure_function_of_it() -> None:
    drawn = [rows_of_step(10, 3, step, seed=1) for step in range(10)]
    # Three rounds of ten rows, each row once a round.
    flat = [row for rows in drawn for row in rows]
    for start in (0, 10, 20):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20] and rows_of_step(10, 3, 7, seed=1) == drawn[7] != rows_of_step(
        10, 3, 7, seed=2
    )
    assert sorted(rows_of_step(2, 5, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="count, size, step: got 0"):
        rows_of_step(0, 3, 0)


def test_mmd_as_an_alignment_rises_with_the_progress() -> None:
    from peftkern.transfer.dann import reversal_weight

    source, target = torch.randn(10, 3), torch.randn(8, 3) + 1
    ramped, plain = MMDAlignment(strength=2.0), MMDAlignment(strength=2.0, ramp=False)
    value = plain(source, target, progress=0.3)
    assert value.item() == pytest.approx(2 * plain.metrics["mmd2"].item())
    assert ramped(source, target, progress=0.3).item() == pytest.approx(
        reversal_weight(0.3) * value.item(), rel=1e-6
    )
    with pytest.raises(ValueError, match="strength: got 0"):
        MMDAlignment(strength=0)
