"""A guard in the Hugging Face Trainer: `class Guarded(ForgettingMixin, Trainer)`, then
`trainer.guard_with(guard)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from .guard import ForgettingGuard
from .replay import Replay

__all__ = ["ForgettingMixin"]

_STATE = "peftkern_forgetting"


class ForgettingMixin:
    """Put before the Trainer's class: penalties and replay join the gradients of each step before they are
    clipped.

    Callbacks cannot do this: the Trainer's `on_pre_optimizer_step` comes after the clipping. With gradient
    accumulation they are added once, with the last batch of a step; under fp16 they are scaled as the loss
    is. The logs get what the guard's `metrics()` gives, and the guard's state lies in every checkpoint's
    trainer_state.json. One process: not with DeepSpeed or FSDP, whose gradients are sharded.
    """

    guard: ForgettingGuard | None = None
    replay: Replay | None = None
    replay_rows: Sequence[Mapping[str, Any]] = ()

    def guard_with(
        self,
        guard: ForgettingGuard | None,
        *,
        replay: Replay | None = None,
        replay_rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Watch over the training to come; `replay_rows`, batches of one row with labels, are what `replay`
        draws from."""
        if replay is not None and replay.rows != len(replay_rows):
            raise ValueError(f"replay_rows: got {len(replay_rows)}, but the plan is for {replay.rows} rows")
        self.guard, self.replay, self.replay_rows = guard, replay, replay_rows
        if guard is not None:
            guard.autocast = self.accelerator.autocast
            self.add_callback(_GuardCallback(guard))

    def budget_spent(self, state: Mapping[str, Any]) -> bool:
        """Take the guard's state from what a checkpoint's trainer_state.json holds, without training on;
        whether it ended the training."""
        stored = (state.get("stateful_callbacks") or {}).get(_STATE)
        if self.guard is None or stored is None:
            return False
        self.guard.load_state_dict(stored)
        return self.guard.stopped

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; with the last batch of a step the gradients of replay and penalties are added."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            if self.replay is not None:
                self._replay(model)
            if self.guard is not None:
                scaler = self.accelerator.scaler
                self.guard.add_gradients(scaler.get_scale() if scaler is not None else 1.0)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the guard's numbers beside the loss."""
        if self.guard is not None and "loss" in logs:
            logs |= self.guard.metrics()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.guard is not None:
            self.state.stateful_callbacks[_STATE] = self.guard.state_dict()
        super()._save_checkpoint(*args, **kwargs)

    def _replay(self, model: Any) -> None:
        """Backward of the source rows that this step draws."""
        scaler, weight = self.accelerator.scaler, self.replay.weight / self.replay.slots
        for row in self.replay.rows_of(self.state.global_step):
            with self.compute_loss_context_manager():
                loss = weight * self.compute_loss(model, self._prepare_inputs(dict(self.replay_rows[row])))
            (scaler.scale(loss) if scaler is not None else loss).backward()


class _GuardCallback(TrainerCallback):
    """Measures after a step, and ends training where the budget is spent."""

    def __init__(self, guard: ForgettingGuard) -> None:
        self.guard = guard

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = (state.stateful_callbacks or {}).get(_STATE)
        if state.global_step and stored is None:
            raise ValueError(
                "the checkpoint was saved without a guard: what the model was before is not known; start the"
                " run again"
            )
        if stored is not None:
            self.guard.load_state_dict(stored)
        self.guard.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard.end_of_step(state.global_step):
            control.should_training_stop = control.should_save = True
