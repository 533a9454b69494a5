"""Whether a model keeps examples apart that share a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import InputError

if TYPE_CHECKING:
    from .trainer import RecipeTrainer

__all__ = ["require_separation"]

_TOKENS = 8
# Relative change of an example's logits when its neighbour changes. Where attention is masked it is 0, or the
# rounding of experts
# whose batches change; a mean over twice as many tokens, which alibi without a mask is, changes them by
# tenths.
_TOLERANCE = 0.01


def require_separation(trainer: RecipeTrainer) -> None:
    """Raise InputError unless an example's logits stay the same whatever stands before it in its window.

    Layers that mix positions without looking at position_ids (alibi, recurrence, convolutions) would train on
    a mixture of examples.
    """
    first, second = _two_examples(trainer)
    changed = (
        first[1:] + first[:1]
        if len(set(first)) > 1
        else [(token + 1) % trainer.model.config.vocab_size for token in first]
    )
    try:
        one, other = (_logits(trainer, before, second) for before in (first, changed))
    except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--packing: this model cannot keep the examples of a window apart ({error}): use --no-packing"
        ) from error
    difference = ((one - other).norm() / one.norm().clamp(min=1e-30)).item()
    if not difference <= _TOLERANCE:
        raise InputError(
            "--packing: this model does not keep the examples of a window apart (the logits of one change by "
            f"{difference:.1%} with the one before it): use --no-packing"
        )


def _two_examples(trainer: RecipeTrainer) -> tuple[list[int], list[int]]:
    rows = trainer.train_dataset
    ids = [*rows[0]["input_ids"], *rows[len(rows) - 1]["input_ids"]][: 2 * _TOKENS]
    middle = len(ids) // 2
    return ids[:middle], ids[middle:]


def _logits(trainer: RecipeTrainer, before: list[int], example: list[int]) -> torch.Tensor:
    """Logits of `example` in one window behind `before`."""
    window = {
        "input_ids": before + example,
        "labels": before + example,
        "seq_lengths": [len(before), len(example)],
    }
    batch = trainer.data_collator([window])
    del batch["labels"]
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        logits = trainer.model(**trainer._prepare_inputs(batch), use_cache=False).logits
    return logits[0, len(before) :].float()
