"""The longest batch of a run, once before training: memory that does not suffice tells at once, not after
hours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .trainer import RecipeTrainer

__all__ = ["rehearse"]


def rehearse(trainer: RecipeTrainer) -> int:
    """Forward and backward of the longest rows, as many as a batch has; nothing of it stays: no gradient, no
    random number drawn, no token counted. Returns the tokens of the batch.
    """
    rows = trainer.train_dataset
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batch = [rows[index] for index in longest[: trainer.args.per_device_train_batch_size]]
    names = (
        "input_ids",
        "labels",
        "completion_mask",
        "assistant_masks",
        "attention_mask",
        "position_ids",
        "seq_lengths",
    )
    inputs = trainer.data_collator([{key: row[key] for key in names if key in row} for row in batch])
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    trainer.model.train()
    with torch.random.fork_rng(devices=devices):
        try:
            inputs = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
        finally:
            trainer.model.zero_grad(set_to_none=True)
    return inputs["input_ids"].numel()
