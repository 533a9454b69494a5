"""What a model predicts and what was true: the likelihood whose curvature the Fisher information is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "EMPIRICAL",
    "LABELS",
    "TRUE",
    "Predictions",
    "causal_lm",
    "classifier",
    "labels_of",
    "step_generator",
]

# Whose labels the gradients are taken at: drawn from the model itself, or the data's.
TRUE, EMPIRICAL = "true", "empirical"
LABELS = (TRUE, EMPIRICAL)
_IGNORED = -100

# (model, batch) -> (logits [M, C] of every prediction in the batch, the data's labels [M] or None)
Predictions = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, "Tensor | None"]]


def causal_lm(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The next-token predictions of a language model of transformers: logits [M, vocabulary], labels [M].

    batch: what its forward takes, input_ids [E, T] among it; labels [E, T], -100 where nothing is predicted,
        else every token that attention_mask does not leave out.
    """
    labels = batch.get("labels")
    if labels is None:
        mask = batch.get("attention_mask")
        labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, _IGNORED)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    wanted = (labels[:, 1:] != _IGNORED).to(logits.device)
    return logits[wanted], labels[:, 1:].to(logits.device)[wanted]


def classifier(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """One prediction an example, of a classifier of transformers: logits [E, C], labels [E] or None."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    labels = batch.get("labels")
    return logits, None if labels is None else labels.to(logits.device)


def labels_of(logits: Tensor, labels: Tensor | None, kind: str, generator: torch.Generator) -> Tensor:
    """The labels [M] to take gradients at: one draw each from softmax(logits) for "true", the data's for
    "empirical"."""
    if kind == TRUE:
        return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
    if labels is None:
        raise ValueError(
            "labels='empirical' needs labels in the batches; without any use labels='true', which draws them"
            " from the model"
        )
    return labels.long()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood summed over predictions, in fp32 (fp64 for fp64)."""
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
    )


def step_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator that depends on `numbers` alone, whatever was drawn before."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
