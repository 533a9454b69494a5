"""What DANN and MMD need of any transformer: its pooled features with their gradient, and target rows by the
step.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .dann import reversal_weight
from .features import pool_mean
from .mmd import MMDLoss

__all__ = [
    "Alignment",
    "FeatureTap",
    "MMDAlignment",
    "backbone",
    "divides_loss",
    "rows_of_step",
    "step_seed",
    "unlabelled",
]

# A module that, called with source features [m, D], target features [n, D] and progress=..., gives a scalar
# loss, and whose `metrics` then say what it saw: `dann.DANNLoss` and `MMDAlignment`.
Alignment = nn.Module
_LABELS = ("label", "labels", "label_ids")
Pool = Callable[[Tensor, Tensor | None], Tensor]


class MMDAlignment(nn.Module):
    """MMD^2 as an alignment, see `mmd.MMDLoss`: `strength` times it, and with `ramp` times DANN's weight of
    the progress.

    Features of a network that has learnt nothing yet are aligned best by not learning: hence the ramp.
    """

    def __init__(self, *, strength: float = 1.0, ramp: bool = True) -> None:
        super().__init__()
        if not 0 < strength < math.inf:
            raise ValueError(f"strength: got {strength}, expected above 0 and finite")
        self.strength, self.ramp = strength, ramp
        self.mmd = MMDLoss()
        self.metrics: dict[str, float | Tensor] = {}

    def forward(self, source: Tensor, target: Tensor, *, progress: float = 1.0) -> Tensor:
        """A scalar, of features [m, D] and [n, D]; the first call fixes the kernels."""
        value = self.mmd(source, target)
        weight = self.strength * (reversal_weight(progress) if self.ramp else 1.0)
        self.metrics = {"mmd2": value.detach(), "alignment_weight": weight}
        return weight * value


def backbone(model: nn.Module) -> nn.Module:
    """The module whose output has the last hidden states: of a transformers' model with a head its base, of a
    PEFT model the same.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(base, "base_model", base)
    if not isinstance(inner, nn.Module) or not hasattr(base, "config"):
        kind = type(model).__name__
        raise ValueError(f"model: {kind} is no model of transformers: name the module with the features")
    return inner


class FeatureTap:
    """Records the pooled output of one module, with its gradient, while it is entered.

    The module gives [B, S, D], [B, D], a tuple whose first is one of these, or an output with
    `last_hidden_state`. Take one that runs outside of gradient checkpointing, such as `backbone(model)`, not
    a layer that is recomputed.

    >>> with FeatureTap(backbone(model)) as tap:  # doctest: +SKIP
    ...     loss = model(**source).loss
    ...     of_source = tap.features(source.get("attention_mask"))
    ...     model(**target)
    ...     of_target = tap.features(target.get("attention_mask"))
    """

    def __init__(self, module: nn.Module, *, pool: Pool = pool_mean) -> None:
        self.module, self.pool = module, pool
        self._hidden: Tensor | None = None
        self._handle: Any = None

    def __enter__(self) -> FeatureTap:
        self._handle = self.module.register_forward_hook(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._hidden = None

    def _record(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            hidden = output if isinstance(output, Tensor) else output[0]
        self._hidden = hidden

    def features(self, mask: Tensor | None = None) -> Tensor:
        """[B, D] of the module's last call, padding (mask 0) left out; the call is then forgotten."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            kind = type(self.module).__name__
            raise ValueError(f"module: {kind} was not called: name one that the forward pass runs")
        if torch.is_grad_enabled() and not hidden.requires_grad:
            raise ValueError("module: its output has no gradient (is it frozen, or checkpointed?)")
        return hidden if hidden.dim() == 2 else self.pool(hidden, mask)


def step_seed(*numbers: int) -> int:
    """A seed below 2^63 that is a pure function of these numbers, and unlike for unlike ones."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def rows_of_step(count: int, size: int, step: int, *, seed: int = 0) -> list[int]:
    """The `size` rows of `count` that step 0, 1, ... draws: every row once a round, each round in an order of
    its own.

    A pure function of its arguments: a run that is resumed at a step draws what the unbroken one drew.
    """
    if count < 1 or size < 1 or step < 0:
        raise ValueError(f"count, size, step: got {count}, {size} and {step}, expected at least 1, 1 and 0")
    places = range(step * size, (step + 1) * size)
    return [_order(count, place // count, seed)[place % count] for place in places]


@functools.lru_cache(maxsize=4)
def _order(count: int, turn: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(step_seed(seed, turn, count))
    return torch.randperm(count, generator=generator).tolist()


def divides_loss(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether a transformers' Trainer divides what its compute_loss gives by the batches of a step."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        known = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = known or trainer.compute_loss_func is not None
    return not scaled


def unlabelled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without labels, which adaptation must not see."""
    if not rows:
        raise InputError("the target has no rows: give unlabelled ones to align with")
    return [{name: value for name, value in row.items() if name not in _LABELS} for row in rows]
