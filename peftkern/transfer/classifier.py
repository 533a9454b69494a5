"""The training of `peftkern adapt`: LoRA and a classifier in transformers' Trainer, with the alignment's
mixin.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from ..errors import InputError
from .adapt_config import AdaptConfig, AdaptReport
from .alignment import MMDAlignment
from .dann import DANNLoss, annealed_rate
from .domain_trainer import DomainAdaptationMixin
from .validators import information_maximization, label_shift, soft_neighborhood_density

__all__ = ["AdaptingTrainer", "train"]

Rows = Sequence[tuple[str, str]]


class AdaptingTrainer(DomainAdaptationMixin, Trainer):
    """A Trainer that aligns, with the rate of Ganin et al.: (1 + 10 progress)^-0.75."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate falls with the part of training that is done, a pure function of the step."""
        if self.lr_scheduler is None:

            def rate(step: int) -> float:
                return annealed_rate(min(1.0, step / num_training_steps))

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def train(
    config: AdaptConfig,
    source: Rows,
    target: Rows,
    test: Rows,
    labels: Sequence[str],
) -> tuple[Any, Any, AdaptReport]:
    """The model with its adapter, its tokenizer, and what is known of it."""
    torch.manual_seed(config.seed)
    model, tokenizer = _model(config, labels)
    order = np.random.default_rng(config.seed).permutation(len(source))
    held_out = max(2 * len(labels), round(config.eval_fraction * len(source)))
    if len(source) - held_out < config.batch_size:
        raise InputError(f"--data has {len(source)} rows, too few to hold out {held_out} and train")
    parts = ([source[i] for i in part] for part in (order[held_out:], order[:held_out]))
    training, scored = (_tokens(part, tokenizer, labels, config) for part in parts)
    unlabelled = _tokens([(text, labels[0]) for text, _ in target], tokenizer, labels, config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdaptingTrainer(
            model=model,
            args=_arguments(config, folder),
            train_dataset=training,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        if config.method != "none":
            trainer.align(_alignment(config, model), unlabelled, seed=config.seed)
        trainer.train()
        return (
            model,
            tokenizer,
            _report(trainer, scored, unlabelled, _tokens(test, tokenizer, labels, config)),
        )


def _model(config: AdaptConfig, labels: Sequence[str]) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model

    names = dict(enumerate(labels))
    options = {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: i for i, label in names.items()},
    }
    try:
        model = AutoModelForSequenceClassification.from_pretrained(config.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {config.model} cannot be loaded as a classifier: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    sizes = {"r": config.r, "lora_alpha": 2 * config.r}
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **sizes)
    model = get_peft_model(model, adapter)
    if config.patch:
        import peftkern

        try:
            print(peftkern.patch(model).summary, file=sys.stderr)
        except ValueError as error:
            print(f"Nothing of this model was patched, it runs as it is: {error}", file=sys.stderr)
    return model, tokenizer


def _tokens(rows: Rows, tokenizer: Any, labels: Sequence[str], config: AdaptConfig) -> list[dict[str, Any]]:
    if not rows:
        return []
    found = tokenizer([text for text, _ in rows], truncation=True, max_length=config.seq_length)
    index = {label: i for i, label in enumerate(labels)}
    names = [name for name in ("input_ids", "attention_mask") if name in found]
    own = [index[label] for _, label in rows]
    return [{name: found[name][i] for name in names} | {"labels": label} for i, label in enumerate(own)]


def _arguments(config: AdaptConfig, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        learning_rate=config.lr,
        seed=config.seed,
        save_strategy="no",
        logging_steps=max(1, config.steps // 10),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _alignment(config: AdaptConfig, model: Any) -> DANNLoss | MMDAlignment:
    if config.method == "mmd":
        return MMDAlignment(strength=config.strength)
    return DANNLoss(model.config.hidden_size, strength=config.strength, seed=config.seed)


def _report(trainer: AdaptingTrainer, scored: Any, target: Any, test: Any) -> AdaptReport:
    from .dann import domain_probe

    of_source, source_features = _outputs(trainer, scored)
    of_target, target_features = _outputs(trainer, target[:2000])
    expected = torch.tensor([row["labels"] for row in scored])
    if not (torch.isfinite(of_source).all() and torch.isfinite(of_target).all()):
        raise InputError("the run diverged: its outputs are NaN or infinite; give a lower --lr or --strength")
    accuracy = None
    if test:
        accuracy = _accuracy(_outputs(trainer, test)[0], torch.tensor([row["labels"] for row in test]))
    return AdaptReport(
        source_accuracy=_accuracy(of_source, expected),
        majority=float(expected.bincount().max()) / len(expected),
        rows=len(expected),
        target_accuracy=accuracy,
        information=information_maximization(of_target),
        density=soft_neighborhood_density(of_target),
        shift=label_shift(of_source, expected.tolist(), of_target, warn=False),
        probe=domain_probe(source_features, target_features),
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def _outputs(trainer: AdaptingTrainer, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, np.ndarray]:
    """Logits [n, classes] and pooled features [n, D] in evaluation mode."""
    from .alignment import FeatureTap, backbone

    model, size = trainer.model.eval(), trainer.args.per_device_eval_batch_size
    logits, features = [], []
    with FeatureTap(backbone(model)) as tap:
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(dict(trainer.data_collator(list(rows[start : start + size]))))
            batch.pop("labels", None)
            logits.append(model(**batch).logits.float().cpu())
            features.append(tap.features(batch.get("attention_mask")).float().cpu())
    return torch.cat(logits), torch.cat(features).numpy()
