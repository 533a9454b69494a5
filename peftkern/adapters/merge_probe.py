"""What a model gives on probe texts before and after a merge, and the inputs its layers see."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .merge_report import Probe

__all__ = ["Reference", "input_moments", "probe_rows"]

_LOGITS_LIMIT = 1 << 30  # bytes of the adapter's logits that are kept; others are computed again each time


def probe_rows(probe: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Sequences of token ids, int64 [T], without padding, from a tensor [B, T] or a list of tensors."""
    rows = [row.reshape(-1) for row in probe]
    if not rows or any(row.dtype not in (torch.int64, torch.int32) or row.numel() < 2 for row in rows):
        raise ValueError("probe: expected token ids, int64 [B, T] or a list of [T], each at least two tokens")
    return rows


class Reference:
    """What base and adapter give on the probe, to compare merges with.

    model: gives `.logits` of the next token; base: within it the base answers alone; rows: see `probe_rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: list[Tensor],
        base: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.rows = model, rows
        self.nll, self.base_nll, self._logits = [], [], []
        kept = 0
        with _evaluating(model):
            for row in rows:
                logits = _logits(model, row)
                self.nll.append(_nll(logits, row))
                kept += logits.numel() * 4
                if kept <= _LOGITS_LIMIT:
                    self._logits.append(logits)
                with base():
                    self.base_nll.append(_nll(_logits(model, row), row))

    def compare(self, before: Callable[[], AbstractContextManager[Any]]) -> Probe:
        """The merged model, as it is now, against the adapter; within `before()` it is as it was."""
        merged, divergence = [], []
        with _evaluating(self.model):
            for index, row in enumerate(self.rows):
                logits = _logits(self.model, row)
                merged.append(_nll(logits, row))
                divergence.append(_kl(self._adapter_logits(index, before), logits))
        tokens = [row.numel() - 1 for row in self.rows]
        difference = [(a - b) for a, b in zip(merged, self.nll, strict=True)]
        measured = (self.base_nll, self.nll, merged, divergence)
        base, adapter, now, kl = (_mean(values, tokens) for values in measured)
        errors = _standard_error(difference, tokens), _standard_error(divergence, tokens)
        return Probe(sum(tokens), len(tokens), base, adapter, now, errors[0], kl, errors[1])

    def _adapter_logits(self, index: int, before: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        if index < len(self._logits):
            return self._logits[index]
        with before():
            return _logits(self.model, self.rows[index])


def input_moments(model: nn.Module, layers: Sequence[nn.Module], rows: list[Tensor]) -> list[Tensor]:
    """Sum of x x^T over the probe's tokens for the input x of each layer, fp32 [K, K]."""
    found: list[Tensor | None] = [None] * len(layers)

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            with torch.autocast(x.device.type, enabled=False):
                product = x.t() @ x
            found[index] = product if found[index] is None else found[index].add_(product)

        return hook

    with _evaluating(model), contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(watch(index)).remove)
        for row in rows:
            _logits(model, row)
    return [
        torch.zeros(layer.in_features, layer.in_features) if moments is None else moments
        for layer, moments in zip(layers, found, strict=True)
    ]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _logits(model: nn.Module, row: Tensor) -> Tensor:
    """fp32 [T, V]."""
    device = next(model.parameters()).device
    output = model(input_ids=row[None].to(device), use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[1] != row.numel():
        raise ValueError(f"probe: {type(model).__name__} gives no logits of the next token; leave it out")
    return logits[0].float()


def _nll(logits: Tensor, row: Tensor) -> float:
    """Mean over the sequence's tokens but the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1], row[1:].to(logits.device).long()).item()


def _kl(of: Tensor, to: Tensor) -> float:
    """KL(of || to), mean over the positions that predict a token of the sequence, in nats."""
    log_p, log_q = of[:-1].log_softmax(-1), to[:-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().mean().item()


def _mean(values: Sequence[float], tokens: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)


def _standard_error(values: Sequence[float], tokens: Sequence[int]) -> float:
    """Of the mean weighted by tokens, from the spread over sequences; infinite with one sequence."""
    count = len(values)
    if count < 2:
        return math.inf
    mean, total = _mean(values, tokens), sum(tokens)
    squares = sum((n / total * (value - mean)) ** 2 for value, n in zip(values, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1))
