"""The guard in a plain loop and in the Hugging Face Trainer: before clipping, once a step, and bit-equal
after a resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.transfer.forgetting import (
    DeltaPenalty,
    ForgettingGuard,
    Replay,
    collect_fisher,
    lora_factors,
    measure_forgetting,
)
from peftkern.transfer.forgetting.trainer import ForgettingMixin

from ...cases import nightly
from . import tiny

CLIP = 0.05  # far below the gradients' norm, so that what comes after the clipping would show


class Guarded(ForgettingMixin, tiny.transformers.Trainer):
    """What a user writes."""


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Examples of one length, without padding."""
    ids = torch.randint(1, tiny.VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def source() -> list[dict[str, Tensor]]:
    return [{key: value[None] for key, value in row.items()} for row in rows(6, 8)]


def trainer(
    folder: Path,
    model: nn.Module,
    guard: ForgettingGuard | None,
    *,
    replay: Replay | None = None,
    **options: Any,
) -> Guarded:
    plain = dict(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        optim="sgd",
    )
    arguments = tiny.transformers.TrainingArguments(**plain | options)
    made = Guarded(model=model, args=arguments, train_dataset=rows(40, 7))
    made.guard_with(guard, replay=replay, replay_rows=source() if replay else ())
    return made


def guarded(model: nn.Module, folder: Path | None = None, **options: Any) -> ForgettingGuard:
    made = dict(source=source(), target=tiny.one_by_one(tiny.batches()), planned=8, every=2, folder=folder)
    return ForgettingGuard(model, fisher=collect_fisher(model, source()), **made | options)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", nightly([1, 2], quick=[2]))
def test_penalties_and_replay_are_in_the_loss_before_it_is_clipped(tmp_path: Path, accumulation: int) -> None:
    options = {"ewc": 5.0, "l2_sp": 0.7}
    model = tiny.lora(tiny.base(torch.float64))
    replay = Replay(rows=6, ratio=0.25, slots=2 * accumulation, weight=2.0)
    made = trainer(
        tmp_path,
        model,
        guarded(model, **options),
        replay=replay,
        max_steps=3,
        gradient_accumulation_steps=accumulation,
    )
    made.train()

    twin = tiny.lora(tiny.base(torch.float64))
    penalty, distance = DeltaPenalty(twin, collect_fisher(twin, source())), DeltaPenalty(twin)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    batches = list(made.get_train_dataloader())
    order = iter(_order(made, accumulation))
    for step in range(3):
        group = [next(order) for _ in range(accumulation)]
        loss = sum(twin(**batch).loss for batch in group) / accumulation
        loss = loss + sum(twin(**source()[row]).loss for row in replay.rows_of(step)) * 2.0 / (
            2 * accumulation
        )
        (loss + 5.0 * penalty.value() + 0.7 * distance.value()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 20
    expected = factors(twin)
    for name, value in factors(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def _order(made: Guarded, accumulation: int) -> list[dict[str, Tensor]]:
    """The batches in the order in which the trainer took them: its sampler is seeded by its arguments."""
    torch.manual_seed(0)
    tiny.transformers.set_seed(made.args.seed)
    taken: list[dict[str, Tensor]] = []
    again = Guarded(model=tiny.lora(tiny.base(torch.float64)), args=made.args, train_dataset=rows(40, 7))
    again.training_step = lambda model, inputs, *rest: (taken.append(inputs), torch.tensor(0.0))[1]
    again.train()
    assert len(taken) == 3 * accumulation
    return taken


@pytest.mark.parametrize("budget", nightly([None, 1e-7], quick=[1e-7]))
def test_a_resumed_run_is_bit_equal_to_the_unbroken_one(tmp_path: Path, budget: float | None) -> None:
    torch.set_num_threads(1)
    replay = Replay(rows=6, ratio=0.5, slots=2)
    options = {"optim": "adamw_torch", "learning_rate": 0.003}
    whole = tiny.lora(tiny.base(torch.float32), moved=False)
    guard = guarded(whole, tmp_path / "pareto", ewc=3.0, l2_sp=0.1, budget=budget, level=1e-12)
    first = trainer(tmp_path / "run", whole, guard, replay=replay, **options)
    first.train()
    logs = [log for log in first.state.log_history if "forgetting" in log]
    assert (
        len(logs) == 8
        and logs[-1]["forgetting"] > 0
        and [("source_rise" in log) for log in logs] == [False, True] * 4
    )
    assert budget is None or logs[-1]["forgetting_weight"] > 3.0

    again = tiny.lora(tiny.base(torch.float32), moved=False)
    twin = guarded(again, tmp_path / "again", ewc=3.0, l2_sp=0.1, budget=budget, level=1e-12)
    second = trainer(tmp_path / "run", again, twin, replay=replay, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected = factors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in factors(again).items())
    assert twin.state_dict() == guard.state_dict()
    for before, after in zip(
        logs, (log for log in second.state.log_history if "forgetting" in log), strict=True
    ):
        assert before == after


def test_training_ends_once_the_budget_is_spent_and_the_front_keeps_adapters(tmp_path: Path) -> None:
    model = tiny.lora(tiny.base(torch.float32), moved=False)
    guard = guarded(model, tmp_path / "pareto", budget=1e-6, level=0.999)
    made = trainer(tmp_path / "run", model, guard, learning_rate=5.0, max_grad_norm=1.0)
    made.train()
    assert guard.stopped and made.state.global_step < 8
    assert (tmp_path / "run" / f"checkpoint-{made.state.global_step}").is_dir()
    kept = sorted((tmp_path / "pareto").iterdir())
    assert [guard.front.path(point.step) for point in guard.front.front] == kept
    assert all((path / "adapter_model.safetensors").is_file() for path in kept)


def test_a_checkpoint_without_the_guard_s_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, tiny.lora(tiny.base(torch.float32)), None).train()
    model = tiny.lora(tiny.base(torch.float32))
    made = trainer(tmp_path, model, guarded(model))
    with pytest.raises(ValueError, match="saved without a guard"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_plain_loop_holds_the_forecast_near_the_budget() -> None:
    model = tiny.lora(tiny.base(torch.float32), moved=False)
    free, held = (
        _final_forecast(model, None),
        _final_forecast(tiny.lora(tiny.base(torch.float32), moved=False), 0.002),
    )
    assert free > 0.004 and held < 0.003


def _final_forecast(model: nn.Module, budget: float | None) -> float:
    guard = guarded(model, budget=budget, planned=80, every=80)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    batch = {key: torch.stack([row[key] for row in rows(4, 7)]) for key in ("input_ids", "labels")}
    guard.start()
    for step in range(1, 61):
        model(**batch).loss.backward()
        guard.add_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        guard.end_of_step(step)
    assert guard.rise().nats == pytest.approx(measure_forgetting(model, source()).nats)
    return guard.penalty.value().item()


def test_a_budget_s_first_measurement_does_not_wait_for_its_turn() -> None:
    model = tiny.lora(tiny.base(torch.float32))
    guard = guarded(model, budget=0.01, planned=80, every=80)
    guard.start()
    guard.add_gradients()
    forecast = guard.penalty.value().item()
    assert 20 * forecast > 0.01 > forecast
    assert not guard.end_of_step(1) and len(guard.calibration.points) == 1
    guard.end_of_step(2)
    assert len(guard.calibration.points) == 1 and guard.evaluations == 2
    later = guarded(model, budget=100.0, planned=80, every=80)
    later.start()
    later.add_gradients()
    later.end_of_step(1)
    assert later.calibration.points == []


def test_options_that_need_a_fisher_say_so() -> None:
    model = tiny.lora(tiny.base(torch.float32))
    for options in ({"ewc": 1.0}, {"budget": 0.1}):
        with pytest.raises(ValueError, match="need the Fisher information"):
            ForgettingGuard(model, source=source(), planned=4, **options)
    with pytest.raises(ValueError, match="expected 0 or more"):
        ForgettingGuard(model, source=source(), planned=4, l2_sp=-1.0)
    assert ForgettingGuard(model, source=source(), planned=4).metrics() == {}
    assert len(lora_factors(model)) == 14
    with pytest.raises(ValueError, match="the plan is for 5"):
        Guarded.guard_with(object(), None, replay=Replay(rows=5, ratio=0.5, slots=1), replay_rows=source())
