"""--layer-rates, --lora-plus, --unfreeze, --first-layer and --schedule slanted at work in a run."""

from __future__ import annotations

import functools
import re
import sys
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import FinetuneConfig
    from .trainer import RecipeTrainer

__all__ = ["excluded_layers", "install_rates"]


def excluded_layers(base: PreTrainedModel, config: FinetuneConfig) -> str | None:
    """PEFT's `exclude_modules`, a pattern of everything in the layers below --first-layer; None for none."""
    if not config.first_layer:
        return None
    from ..transfer.depth import layer_stacks

    names = [name for stack in layer_stacks(base) for name in stack.names]
    if config.first_layer >= len(names):
        raise InputError(
            f"--first-layer {config.first_layer}: {config.model} has {len(names)} layers, 0 to"
            f" {len(names) - 1}: give a lower one"
        )
    return rf"({'|'.join(map(re.escape, names[: config.first_layer]))})\..*"


def install_rates(trainer: RecipeTrainer, config: FinetuneConfig) -> None:
    """Give the trainer the groups, the schedule, the cut and the unfreezing that the options ask for.

    Raises InputError where they do not fit the model or the length of the run.
    """
    from ..transfer.rates import Rates
    from ..transfer.schedules import schedule

    if config.layer_rates or config.lora_plus:
        trainer.rates = Rates(layer_ratio=config.layer_rates or 1.0, lora_plus=config.lora_plus or 1.0)
        _show(trainer, config)
    if config.schedule == "slanted":
        trainer.make_schedule = functools.partial(schedule, "slanted", warmup=config.warmup)
    if config.first_layer:
        _cut(trainer, config)
    if config.unfreeze is not None:
        _unfreeze(trainer, config)


def _show(trainer: RecipeTrainer, config: FinetuneConfig) -> None:
    rates = [
        group["lr"] for group in trainer.rates.groups(trainer.model, lr=config.lr) if group["kind"] == "base"
    ]
    times = f", B {config.lora_plus:g} times that" if config.lora_plus else ""
    print(
        f"Learning rates: {rates[0]:.3g} at the top, {rates[-1]:.3g} at the bottom{times}.",
        file=sys.stderr,
    )


def _cut(trainer: RecipeTrainer, config: FinetuneConfig) -> None:
    from ..transfer.depth import parameter_depths
    from ..transfer.first_layer import BackwardStop

    depths = parameter_depths(trainer.model)
    below = [
        n for n, p in trainer.model.named_parameters() if p.requires_grad and depths[n] <= config.first_layer
    ]
    if below:
        raise InputError(
            f"--first-layer {config.first_layer}: {below[0]} lies below it and is trained: change --targets",
        )
    trainer.backward_stop = BackwardStop(trainer.model, config.first_layer)


def _unfreeze(trainer: RecipeTrainer, config: FinetuneConfig) -> None:
    from ..transfer.depth import parameter_depths
    from ..transfer.trainer import UnfreezingCallback
    from ..transfer.unfreezing import GradualUnfreezing, UnfreezingPlan

    depths = parameter_depths(trainer.model)
    trained = sorted({depths[name] for name, p in trainer.model.named_parameters() if p.requires_grad})
    try:
        plan = UnfreezingPlan.parse(config.unfreeze, trained)
        unfreezing = GradualUnfreezing(trainer.model, plan, depths=depths)
    except ValueError as error:
        raise InputError(f"--unfreeze: {error}") from error
    planned = trainer.planned_steps()
    if plan.last_step >= planned:
        raise InputError(
            f"--unfreeze {config.unfreeze}: the last of {len(plan.stages)} stages "
            f"begins at step {plan.last_step}, but the run has "
            f"{planned} steps, so that some layers would never be trained: thaw "
            "faster, give more --steps, or a --first-layer"
        )
    trainer.add_callback(UnfreezingCallback(unfreezing))
