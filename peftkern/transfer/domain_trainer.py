"""DANN and MMD in the Hugging Face Trainer: a mixin for any Trainer's class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .alignment import Alignment, FeatureTap, backbone, divides_loss, rows_of_step, unlabelled
from .features import pool_mean

if TYPE_CHECKING:
    import numpy as np

    from .dann import DomainProbe

__all__ = ["DomainAdaptationMixin"]

_STATE = "alignment.pt"


class DomainAdaptationMixin:
    """For a Trainer's class, before it: `class MyTrainer(DomainAdaptationMixin, Trainer)`, then call `align`
    on the trainer.

    In training the loss is the task's on the labelled source, plus the alignment's on the pooled features of
    source and target. The target rows of a step are a pure function of the step; the alignment's weights and
    kernels are in each checkpoint.
    """

    _alignment: Alignment | None = None
    _micro_step = 0
    _micro_of = -1

    def align(
        self,
        alignment: Alignment,
        target_dataset: Any,
        *,
        module: nn.Module | None = None,
        pool: Callable[[Tensor, Tensor | None], Tensor] = pool_mean,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        """Align with `target_dataset`, whose rows have the training rows' inputs; labels among them are
        dropped unread.

        Args:
            alignment: `dann.DANNLoss(hidden size)` or `alignment.MMDAlignment()`.
            module: whose output is pooled; default: the backbone, that is the last hidden states.
            learning_rate: of the alignment's own weights (the discriminator); default: the trainer's.
        Raises: InputError for an empty target, or on several devices; ValueError after the optimizer was
        made.
        """
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise InputError("domain adaptation runs on one device: gradients of its own are not summed")
        if self.optimizer is not None:
            raise ValueError("align: the optimizer exists already: call it before training")
        if len(target_dataset) < 2:
            raise InputError(f"the target has {len(target_dataset)} row(s), expected at least 2")
        if hasattr(target_dataset, "column_names"):
            target_dataset = self._remove_unused_columns(target_dataset, "target")
        self._alignment = alignment.to(self.args.device)
        self._target, self._target_seed, self._alignment_rate = target_dataset, seed, learning_rate
        self._tap = FeatureTap(backbone(self.model) if module is None else module, pool=pool)
        self._alignment_sums: dict[str, Tensor] = {}
        self._alignment_count = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As without the mixin, and a group of the alignment's own weights."""
        optimizer = super().create_optimizer(*args, **kwargs)
        own = [] if self._alignment is None else list(self._alignment.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if own and id(own[0]) not in known:
            rate = self.args.learning_rate if self._alignment_rate is None else self._alignment_rate
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's loss; in training also the alignment's."""
        if self._alignment is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        with self._tap as tap:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            source = tap.features(mask)
            batch = self._target_batch(len(source))
            model(**batch)
            target = tap.features(batch.get("attention_mask"))
        progress = min(1.0, self.state.global_step / max(1, self.state.max_steps))
        aligned = self._alignment(source, target, progress=progress)
        self._count(self._alignment.metrics)
        # The loss of a step is the sum over its batches, each already divided where the number of items was
        # known.
        if not divides_loss(self, num_items_in_batch):
            aligned = aligned / self.current_gradient_accumulation_steps
        loss = loss + aligned.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def _target_batch(self, size: int) -> dict[str, Any]:
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if step == self._micro_of else 0
        self._micro_of = step
        if self._micro_step == 0:
            self._alignment.zero_grad()  # the trainer sets only its model's gradients to zero
        draw = step * self.args.gradient_accumulation_steps + self._micro_step
        index = rows_of_step(len(self._target), size, draw, seed=self._target_seed)
        return self._prepare_inputs(dict(self.data_collator(unlabelled([self._target[i] for i in index]))))

    def _count(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
            self._alignment_sums[name] = self._alignment_sums.get(name, 0) + value
        self._alignment_count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the alignment's metrics, means since the last time."""
        if self._alignment is not None and "loss" in logs and self._alignment_count:
            count, sums = self._alignment_count, self._alignment_sums
            logs |= {name: float(value) / count for name, value in sums.items()}
            self._alignment_sums, self._alignment_count = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._alignment is not None:
            torch.save(self._alignment.state_dict(), Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._alignment is None:
            return
        path = Path(checkpoint) / _STATE
        if not path.exists():
            raise InputError(f"{checkpoint} has no {_STATE}: it is of a run without alignment; start anew")
        self._alignment.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def domain_features(self, dataset: Any, *, most_rows: int = 500) -> np.ndarray:
        """Pooled features [rows, D] of the first `most_rows` rows of a dataset, in evaluation mode."""
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, "features")
        training, size, features = self.model.training, self.args.per_device_eval_batch_size, []
        self.model.eval()
        try:
            with torch.no_grad(), self._tap as tap:
                count = min(most_rows, len(dataset))
                for start in range(0, count, size):
                    rows = unlabelled([dataset[i] for i in range(start, min(start + size, count))])
                    batch = self._prepare_inputs(dict(self.data_collator(rows)))
                    self.model(**batch)
                    features.append(tap.features(batch.get("attention_mask")).float().cpu())
        finally:
            self.model.train(training)
        return torch.cat(features).numpy()

    def domain_probe(self, source_dataset: Any, *, most_rows: int = 500) -> DomainProbe:
        """Whether fresh classifiers tell `source_dataset`'s features from the target's: what the
        discriminator alone cannot show.
        """
        from .dann import domain_probe

        pair = (self.domain_features(data, most_rows=most_rows) for data in (source_dataset, self._target))
        return domain_probe(*pair, most_rows=most_rows)
