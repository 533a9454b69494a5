"""Rates, schedules and unfreezing in the Hugging Face Trainer: a mixin for any Trainer, and a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .rates import Rates
from .unfreezing import GradualUnfreezing

__all__ = ["RatesMixin", "UnfreezingCallback"]


class RatesMixin:
    """For a Trainer's class, before it: `class MyTrainer(RatesMixin, Trainer)`, then set `rates` or
    `make_schedule` on the trainer.

    rates          the parameter groups; None: the Trainer's own. Its weight decay skips what the Trainer's
    skips. make_schedule  gives the schedule, a function of the step, for the number of updates; None: what
    `lr_scheduler_type` says.

    Without the mixin the same is `Trainer(..., optimizers=(optimizer, LambdaLR(optimizer, schedule("slanted",
    steps))))`, with an optimizer of `Rates(...).groups(model, lr=...)`.
    """

    rates: Rates | None = None
    make_schedule: Callable[[int], Callable[[int], float]] | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, over the groups of `rates`."""
        if self.rates is None or self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        model = self.model if model is None else model
        decays = set(self.get_decay_parameter_names(model))
        lr, weight_decay = self.args.learning_rate, self.args.weight_decay
        groups = self.rates.groups(model, lr=lr, weight_decay=weight_decay, decays=decays)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if options.keys() & {"params", "model", "optimizer_dict"}:
            raise ValueError(
                f"optim: {self.args.optim} makes parameter groups of its own: choose one such as adamw_torch",
            )
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `make_schedule`, the same for all groups, each times its own rate."""
        if self.make_schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            self.make_schedule(num_training_steps),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


class UnfreezingCallback(TrainerCallback):
    """Applies a GradualUnfreezing at the beginning of each update, by the trainer's global step, which a
    resumed run continues."""

    def __init__(self, unfreezing: GradualUnfreezing) -> None:
        self.unfreezing = unfreezing

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.unfreezing.apply(state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.unfreezing.remove()
