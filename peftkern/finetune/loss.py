"""What the recipe trains on, the model's own loss, and what its perplexities are made of, the likelihood that
the logits give.

TRL's fused head makes the loss anew from a few names in the model's configuration, so that it misses what a
model does to its logits under other names, what it adds to its loss, and an adapter on the head. Here the
model's own forward makes it: without logits where a probe of that forward shows that nothing else happens
(`patching.loss`), else as the model does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patching.forwards import find
from ..patching.loss import Loss, LossForward
from ..patching.methods import of_module
from ..patching.survey import survey

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_on_head_hidden", "install_model_loss", "summed_nll", "token_nll", "watched_losses"]


def install_model_loss(model: nn.Module) -> str | None:
    """Let the model make its loss without the logits; the reason where it cannot, and keeps its stock
    loss."""
    findings = survey(model, [Loss()])
    if not findings:
        return "it is no language model of transformers"
    ((rewrite, finding),) = findings
    rewrite.install(finding)
    return finding.row.reason


def summed_nll(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The negative log-likelihood, summed over the next-token labels, that the logits of a model give in the
    mode it is in.

    `inputs` holds labels [batch, length], -100 where there is nothing to predict. A router's loss or whatever
    else the model adds to its loss in training is no part of it.
    """
    held = _loss_forward(model)
    fused = None if held is None else held.negative_log_likelihood(**inputs, use_cache=False)
    if fused is not None:
        return fused
    labels = inputs["labels"]
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
    # One row at a time: their fp32 copies are as large as the logits.
    rows = zip(logits, labels.to(logits.device), strict=True)
    return torch.stack(
        [F.cross_entropy(row[:-1].float(), label[1:].long(), reduction="sum") for row, label in rows]
    ).sum()


def token_nll(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The negative log-likelihood of each next-token label: [batch, length - 1] fp32, 0 where the label is
    -100. Without gradients.

    As `summed_nll`, which is its sum.
    """
    held = _loss_forward(model)
    fused = None if held is None else held.token_losses(**inputs, use_cache=False)
    if fused is not None:
        return fused[:, :-1]
    labels = inputs["labels"]
    with torch.no_grad():
        logits = model(
            **{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False
        ).logits
    rows = zip(logits, labels.to(logits.device), strict=True)
    return torch.stack(
        [F.cross_entropy(row[:-1].float(), label[1:].long(), reduction="none") for row, label in rows]
    )


@contextlib.contextmanager
def watched_losses(model: nn.Module, watcher: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `watcher` gets the loss of each label and the labels whenever the model makes its loss without
    logits, as `LossForward.watcher` says; nothing where it makes them."""
    held = _loss_forward(model)
    if held is None:
        yield
        return
    held.watcher, before = watcher, held.watcher
    try:
        yield
    finally:
        held.watcher = before


def _loss_forward(model: nn.Module) -> LossForward | None:
    """Ours on the model, or inside the wrapper that TRL put around it."""
    held = find(model)
    forward = of_module(model) if held is None else held[1]
    return forward if isinstance(forward, LossForward) else None


@contextlib.contextmanager
def adapter_on_head_hidden(model: PeftModel) -> Iterator[None]:
    """While TRL's trainer is made: it refuses an adapter on the head, which its own fused head would leave
    out. That head is not used."""
    head = model.get_output_embeddings()
    if not hasattr(head, "base_layer"):
        yield
        return
    model.__dict__["get_output_embeddings"] = lambda: head.base_layer
    try:
        yield
    finally:
        del model.__dict__["get_output_embeddings"]
