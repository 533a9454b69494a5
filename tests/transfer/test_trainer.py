"""Rates, schedules and unfreezing in the Hugging Face Trainer: by the mixin, the callback, or its own
`optimizers=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from peftkern.transfer.rates import Rates
from peftkern.transfer.schedules import schedule, slanted
from peftkern.transfer.trainer import RatesMixin, UnfreezingCallback
from peftkern.transfer.unfreezing import GradualUnfreezing, UnfreezingPlan

from .models import bert, tokens, transformers

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'peftkern[finetune]'")
STEPS = 8


class Trainer(RatesMixin, transformers.Trainer):
    """Any Trainer with the mixin before it."""


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": index % 3} for index, ids in enumerate(tokens(32))]


def arguments(folder: Path, **changes: Any) -> Any:
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(**(options | changes))


def make(folder: Path, **changes: Any) -> Trainer:
    model = bert(layers=2)
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows())
    trainer.rates, trainer.make_schedule = Rates(layer_ratio=17.6), lambda steps: schedule("slanted", steps)
    trainer.add_callback(UnfreezingCallback(GradualUnfreezing(model, UnfreezingPlan.every(2, range(4)))))
    return trainer


def test_groups_rates_and_decay(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [group["depth"] for group in groups] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert groups[0]["initial_lr"] == 1e-2 and groups[-1]["initial_lr"] == pytest.approx(1e-2 / 17.6)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = set(trainer.get_decay_parameter_names(trainer.model))
    assert decayed == {id(p) for name, p in trainer.model.named_parameters() if name in names}
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([1e-2 * slanted(step, STEPS) for step in range(STEPS)])
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, step: int) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_trainer_s_own_optimizers(tmp_path: Path) -> None:
    """Without the mixin: the same weights."""
    mixed = make(tmp_path / "mixed", weight_decay=0.0)
    mixed.train()
    model = bert(layers=2)
    # The Trainer takes the fused AdamW, whose last bits are others than the plain one's; and AdamW makes a
    # whole step of a gradient that is rounding alone (attention's key biases).
    optimizer = torch.optim.AdamW(
        Rates(layer_ratio=17.6).groups(model, lr=1e-2),
        weight_decay=0.0,
        fused=mixed.optimizer.defaults["fused"],
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path / "own", weight_decay=0.0),
        train_dataset=rows(),
        optimizers=(optimizer, LambdaLR(optimizer, schedule("slanted", STEPS))),
        callbacks=[UnfreezingCallback(GradualUnfreezing(model, UnfreezingPlan.every(2, range(4))))],
    )
    trainer.train()
    for (name, ours), theirs in zip(mixed.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_without_rates_the_mixin_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=rows())
    trainer.create_optimizer_and_scheduler(STEPS)
    assert len(trainer.optimizer.param_groups) == 2
    assert "depth" not in trainer.optimizer.param_groups[0]
