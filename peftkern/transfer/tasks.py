"""What the arms of a comparison are trained and scored on: batches as a pure function of seed and step, and
held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import InputError
from .calibration import brier_score, expected_calibration_error

__all__ = ["Score", "Task", "classification", "language_modelling"]

Batch = tuple[Mapping[str, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Held-out loss in nats (a token, for a language model); the others are None for a language model."""

    loss: float
    accuracy: float | None = None
    ece: float | None = None
    brier: float | None = None


@dataclass(frozen=True)
class Task:
    """Inputs and labels of a training set, a validation set for the learning rate, and a test set that
    decides nothing.

    `train`, `validation` and `test` are (inputs, labels): inputs a mapping of tensors [n, ...], labels [n] of
    classes, or [n, S] of tokens, -100 where there is none. `logits` takes them from the model's output.
    """

    train: Batch
    validation: Batch
    test: Batch
    batch_size: int
    shifted: bool = False
    logits: Callable[[Any], Tensor] = lambda output: output if isinstance(output, Tensor) else output.logits

    def batch(self, seed: int, step: int, device: torch.device) -> Batch:
        """The batch of a step: each pass over the data is a permutation of its own, of the seed and its
        number alone.
        """
        n = len(self.train[1])
        start = step * self.batch_size
        places = torch.arange(start, start + self.batch_size)
        orders = {number: _order(n, seed, number) for number in (places // n).unique().tolist()}
        rows = torch.stack([orders[place // n][place % n] for place in places.tolist()])
        return _rows(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch."""
        logits, labels = self._predicted(model, batch)
        return cross_entropy(logits.float(), labels)

    def score(self, model: nn.Module, part: Batch) -> Score:
        """Loss, accuracy and calibration on a held-out set; the model is in evaluation mode meanwhile."""
        device, training = next(model.parameters()).device, model.training
        model.eval()
        total, count, all_logits, all_labels = 0.0, 0, [], []
        with torch.no_grad():
            for rows in torch.arange(len(part[1])).split(4 * self.batch_size):
                logits, labels = self._predicted(model, _rows(part, rows, device))
                total += float(cross_entropy(logits.float(), labels, reduction="sum"))
                count += int((labels != -100).sum())
                if not self.shifted:
                    all_logits.append(logits.double().cpu())
                    all_labels.append(labels.cpu())
        model.train(training)
        if self.shifted:
            return Score(total / count)
        probabilities, labels = torch.cat(all_logits).softmax(1).numpy(), torch.cat(all_labels).numpy()
        right = float((probabilities.argmax(1) == labels).mean())
        return Score(
            total / count,
            right,
            expected_calibration_error(probabilities, labels),
            brier_score(probabilities, labels),
        )

    def _predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = self.logits(model(**batch[0])), batch[1]
        if self.shifted:
            return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return logits, labels


def _order(n: int, seed: int, number: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + number))


def _rows(part: Batch, rows: Tensor, device: torch.device) -> Batch:
    return {name: value[rows].to(device) for name, value in part[0].items()}, part[1][rows].to(device)


def classification(
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    groups: Sequence[Any] | None = None,
    batch_size: int = 16,
    held_out: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> Task:
    """A task of inputs [n, ...] and class labels [n]: `held_out` of the documents are the test set, a tenth
    validation, the rest training.

    Raises InputError for one class, or where a part would be empty or lack a class.
    """
    n = len(labels)
    if len(labels.unique()) < 2:
        raise InputError(f"all {n} labels are of one class: a task needs at least two")
    parts = _divided(
        list(range(n)) if groups is None else list(groups),
        (1 - held_out - 0.1, 0.1, held_out),
        seed,
    )
    for name, rows in zip(("training", "validation", "test"), parts, strict=True):
        if not len(rows):
            raise InputError(f"the {name} part of {n} rows is empty: give more rows, or more documents")
    missing = set(labels.tolist()) - set(labels[parts[0]].tolist())
    if missing:
        raise InputError(
            f"no training row is of class {missing.pop()}: give more rows of it, or leave it out"
        )
    made = [({name: value[rows] for name, value in inputs.items()}, labels[rows]) for rows in parts]
    return Task(made[0], made[1], made[2], batch_size, **options)


def language_modelling(
    windows: Tensor,
    *,
    groups: Sequence[Any],
    batch_size: int = 4,
    held_out: float = 0.3,
    seed: int = 0,
) -> Task:
    """A causal language model's task of token windows [n, S], which `groups` says the document of; divided as
    in `classification`.
    """
    parts = _divided(list(groups), (1 - held_out - 0.1, 0.1, held_out), seed)
    if min(map(len, parts)) == 0:
        raise InputError(
            f"{len(windows)} windows of {len(set(groups))} documents do not fill three parts: give more"
            " documents"
        )
    made = [({"input_ids": windows[rows]}, windows[rows]) for rows in parts]
    return Task(made[0], made[1], made[2], batch_size, shifted=True)


def _divided(groups: list[Any], shares: tuple[float, ...], seed: int) -> list[Tensor]:
    """The rows of each part; a document is in one part alone."""
    names = list(dict.fromkeys(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    ends, total = [], 0.0
    for share in shares:
        total += share
        ends.append(round(total * len(names)))
    part = {
        names[index]: next(p for p, end in enumerate(ends) if place < end)
        for place, index in enumerate(
            order,
        )
    }
    return [
        torch.tensor(
            [row for row, name in enumerate(groups) if part[name] == p],
            dtype=torch.long,
        )
        for p in range(len(shares))
    ]
