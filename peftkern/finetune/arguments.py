"""A run's options in the words of transformers' trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import FinetuneConfig
from .model import compute_dtype

__all__ = ["shared_arguments"]


def shared_arguments(config: FinetuneConfig, folder: Path) -> dict[str, Any]:
    """What every trainer of transformers is told of a run, by the names of `TrainingArguments`."""
    dtype = compute_dtype(config.dtype)
    return dict(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accumulation,
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs or 1.0,
        learning_rate=config.lr,
        # The slanted triangle is no schedule of transformers: `install_rates` puts it in the place of this
        # one.
        lr_scheduler_type="constant" if config.schedule == "slanted" else config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
