"""Which lambda: the losses of many mixtures of adapters in one batched pass, the base's weights read once for
all of them."""

from __future__ import annotations

import contextlib
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Sweep", "losses_by_adapter", "scaled_adapters", "sweep"]

_LOGIT_BYTES = 512 << 20  # of the logits of one pass in fp32: more rows go into several passes
_CONFIDENCE = 1.96  # standard errors of a 95 % interval


@dataclass(frozen=True)
class Sweep:
    """The losses of an adapter's task vector times each lambda, on the target's and perhaps a control's
    windows.

    values: the lambdas. losses: by set, [lambdas, windows], mean nats a token of each window. best: the
    lambda of the least target loss among those whose control loss is within the budget. budget: how far the
    control loss may rise above lambda = 0, as a part of it.
    """

    values: tuple[float, ...]
    losses: Mapping[str, Tensor]
    target: str
    control: str | None
    budget: float
    maximize: bool = False
    best: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "best", self.values[self._best()])

    def _best(self) -> int:
        target = self.mean(self.target) * (-1.0 if self.maximize else 1.0)
        allowed = self.within_budget()
        if not any(allowed):  # the nearest to no change at all
            return min(range(len(self.values)), key=lambda i: abs(self.values[i]))
        return min((i for i, ok in enumerate(allowed) if ok), key=lambda i: target[i].item())

    def mean(self, name: str) -> Tensor:
        """Mean nats a token of a set, [lambdas], each window alike."""
        return self.losses[name].double().mean(1)

    def change(self, name: str) -> tuple[Tensor, Tensor]:
        """How far each lambda's loss is from that of the lambda nearest to 0, window by window: mean and
        standard error, [lambdas]."""
        losses = self.losses[name].double()
        paired = losses - losses[self._none()]
        spread = (
            paired.std(1)
            if paired.shape[1] > 1
            else torch.full(
                (len(paired),),
                math.nan,
                dtype=torch.float64,
            )
        )
        return paired.mean(1), spread / math.sqrt(paired.shape[1])

    def _none(self) -> int:
        return min(range(len(self.values)), key=lambda i: abs(self.values[i]))

    def within_budget(self) -> list[bool]:
        """For each lambda, whether the control loss is at most (1 + budget) of that at lambda = 0."""
        if self.control is None:
            return [True] * len(self.values)
        losses = self.mean(self.control)
        return (losses <= losses[self._none()] * (1.0 + self.budget)).tolist()

    @property
    def verdict(self) -> str:
        """The outcome in words, with 95 % intervals over the windows."""
        index = self.values.index(self.best)
        change, error = (part[index].item() for part in self.change(self.target))
        words = f"lambda {self.best:g}: {self.target} {change:+.3f} ± {_CONFIDENCE * error:.3f} nats a token"
        if self.control is not None:
            change, error = (part[index].item() for part in self.change(self.control))
            words += (
                f", {self.control} {change:+.3f} ± {_CONFIDENCE * error:.3f} (at most {self.budget:.0%} more"
                " is allowed)"
            )
        if index in (0, len(self.values) - 1) and len(self.values) > 1 and self.best != 0.0:
            words += "; the best lies at the end of the range: sweep further"
        return words

    def draw(self, axes: Any) -> None:
        """The curves of both losses, with 95 % intervals of their change, on a matplotlib axes."""
        for name, colour in zip((self.target, self.control), ("tab:blue", "tab:orange"), strict=True):
            if name is None:
                continue
            mean, error = self.mean(name), self.change(name)[1]
            axes.errorbar(
                self.values,
                mean,
                yerr=_CONFIDENCE * error,
                marker="o",
                color=colour,
                capsize=3,
                label=name,
            )
        axes.axvline(self.best, color="grey", linestyle=":", label=f"best, {self.best:g}")
        axes.set(
            xlabel="lambda, times the task vector",
            ylabel="loss, nats a token",
            title=self.verdict.split(":")[0] + " is best",
        )
        axes.legend()

    def write_csv(self, path: str | Path) -> None:
        """One line a lambda: each set's mean loss, its change from lambda = 0 and that change's standard
        error."""
        names = [name for name in (self.target, self.control) if name is not None]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(
                [
                    "lambda",
                    *(f"{name} {what}" for name in names for what in ("nats", "change", "change s.e.")),
                ]
            )
            for i, value in enumerate(self.values):
                columns = [part[i].item() for name in names for part in (self.mean(name), *self.change(name))]
                writer.writerow([f"{value:g}", *(f"{column:.5f}" for column in columns)])


@contextlib.contextmanager
def scaled_adapters(model: nn.Module, adapter: str, values: Sequence[float]) -> Iterator[list[str]]:
    """Within it a PEFT model has the adapter times each value under a name of its own; yields the names. No
    weight is copied.

    The names share the adapter's tensors and have other scalings; they are for `peftkern.mixed_adapters`.
    Raises: ValueError where the adapter is unknown, or is not linear in its scaling (DoRA, modules_to_save).
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        module for module in model.modules() if isinstance(module, LoraLayer) and adapter in module.scaling
    ]
    if not layers:
        raise ValueError(f"adapter: the model has no LoRA adapter {adapter!r}")
    if any(adapter in layer.lora_variant for layer in layers):
        raise ValueError(
            f"adapter: {adapter!r} is DoRA or another variant, which is not linear in its scaling; combine it"
            " first"
        )
    held = [
        module
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters
    ]
    if held:
        raise ValueError(f"adapter: {adapter!r} replaces modules of the base, which no scaling reaches")
    names = [f"{adapter}_times_{i}" for i in range(len(values))]
    with contextlib.ExitStack() as stack:
        for name, value in zip(names, values, strict=True):
            for layer in layers:
                stack.callback(_drop, layer, name)
                _alias(layer, adapter, name, value)
        yield names


_TABLES = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")
_PARTS = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B")


def _alias(layer: Any, adapter: str, name: str, value: float) -> None:
    for table in _TABLES:
        values = getattr(layer, table, None)
        if isinstance(values, dict) and adapter in values:
            values[name] = values[adapter]
    layer.scaling[name] = layer.scaling[adapter] * value
    for part in _PARTS:
        modules = getattr(layer, part)
        if adapter in modules:
            modules[name] = modules[adapter]


def _drop(layer: Any, name: str) -> None:
    for part in (*_TABLES, *_PARTS, "scaling"):
        entries = getattr(layer, part, None)
        if entries is not None and name in entries:
            del entries[name]


def losses_by_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    ids: Tensor,
    *,
    rows: int | None = None,
) -> Tensor:
    """Mean next-token loss of every window under every adapter, in nats: [adapters, windows], fp32 on the
    CPU.

    A batch holds each of some windows once for every adapter, adapter by adapter, so that the base's weights
    are read (and 4-bit ones decoded) once for all adapters and each adapter's rows are one low-rank product.

    Args:
        model: a patched PEFT causal LM; it runs in evaluation mode.
        adapters: names of its adapters, or of `scaled_adapters`; "__base__" for none.
        ids: [windows, length] int64, all of one length.
        rows: the most rows of a batch; default: as many as have 512 MiB of logits in fp32.
    Raises: ValueError as `mixed_adapters`, and for ids of another shape.
    """
    from ...patching import mixed_adapters

    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(
            f"ids: got shape {tuple(ids.shape)}, expected [windows, length] with a length of 2 or more",
        )
    words = model.get_output_embeddings().weight.shape[0] if hasattr(model, "get_output_embeddings") else 1
    rows = rows or max(1, _LOGIT_BYTES // (4 * words * ids.shape[1]))
    result = torch.empty(len(adapters), len(ids))
    training = model.training
    model.eval()
    try:
        for start, names in _batches(adapters, rows):
            together = max(1, rows // len(names))
            for window in range(0, len(ids), together):
                part = ids[window : window + together].to(next(model.parameters()).device)
                labels = [name for name in names for _ in range(len(part))]
                with torch.no_grad(), mixed_adapters(model, labels):
                    logits = model(input_ids=part.repeat(len(names), 1), use_cache=False).logits
                losses = torch.stack(
                    [_loss(row, own) for row, own in zip(logits, part.repeat(len(names), 1), strict=True)],
                )
                result[start : start + len(names), window : window + len(part)] = losses.view(
                    len(names), len(part)
                ).cpu()
    finally:
        model.train(training)
    return result


def _batches(adapters: Sequence[str], rows: int) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(0, len(adapters), rows):
        yield start, adapters[start : start + rows]


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """One row at a time: its fp32 copy is as large as its logits."""
    return F.cross_entropy(logits[:-1].float(), ids[1:])


def sweep(
    model: nn.Module,
    adapter: str | Mapping[float, str],
    windows: Mapping[str, Tensor],
    *,
    values: Sequence[float] = tuple(i / 10 for i in range(11)),
    target: str | None = None,
    control: str | None = None,
    budget: float = 0.05,
    maximize: bool = False,
    rows: int | None = None,
    progress: bool = True,
) -> Sweep:
    """The losses of lambda * adapter for every lambda, in batched passes that hold all lambdas at once;
    nothing is merged or reloaded.

    Args:
        model: a patched PEFT causal LM with the adapter, a sum of several by `combine` and `add_to_model`,
            say.
        adapter: its name; or, where lambda does not scale the whole, the adapter's name for each lambda
            (`values` is then not used).
        windows: validation windows by set, [windows, length] of token ids.
        values: the lambdas.
        target: the set whose loss decides; default the first.
        control: the set whose loss must not rise, relative to the lambda nearest to 0, by more than `budget`.
        budget: 0.05 is Task Arithmetic's bound for negation.
        maximize: the target loss is to rise (negation: forget the target, keep the control).
        rows: of a batch, see `losses_by_adapter`.
        progress: show a bar on stderr.
    Returns: Sweep, with the best lambda, its intervals, and a plot.
    Raises: ValueError naming the argument.
    Source: Editing Models with Task Arithmetic (Ilharco et al., 2023).
    """
    from tqdm import tqdm

    names = list(windows)
    target = names[0] if target is None and names else target
    for role, name in (("target", target), ("control", control)):
        if name not in windows and not (role == "control" and name is None):
            raise ValueError(
                f"{role}: got {name!r}, expected one of"
                f" {', '.join(map(repr, names)) or 'no set at all: windows is empty'}"
            )
    if not isinstance(adapter, str):
        values = tuple(adapter)
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values: got {tuple(values)}, expected finite numbers")
    found: dict[str, Tensor] = {}
    scaled = scaled_adapters(model, adapter, values) if isinstance(adapter, str) else None
    with scaled or contextlib.nullcontext(
        list(adapter.values() if isinstance(adapter, Mapping) else ())
    ) as aliases:
        for name in tqdm(
            [n for n in (target, control) if n is not None],
            disable=not progress,
            file=sys.stderr,
            desc="sweep",
        ):
            found[name] = losses_by_adapter(model, aliases, windows[name], rows=rows)
    return Sweep(tuple(values), found, str(target), control, budget, maximize)
