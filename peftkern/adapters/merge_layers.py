"""One layer merged in each of the forms, and what lets a model run as it was before."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..merging import (
    Branch,
    feedback_4bit,
    folded_bias,
    measure,
    merge_dense,
    requantize_4bit,
    rounding_residual,
    stochastic_4bit,
)
from ..merging.slabs import Rows
from ..patching.detect import is_lora
from ..patching.merged import Unmerged, base_weight, branches_of, put_weight, restore_state, unmerged
from .merge_report import MergedLayer

__all__ = [
    "Residual",
    "Task",
    "adapter_bytes",
    "as_before",
    "base_alone",
    "lora_layers",
    "merge_layer",
    "only_adapters",
    "stored_bytes",
]

Residual = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A layer to merge.

    name, layer     in the model, unmerged
    adapters        in the order they run
    original        rows of the weight that a 4-bit base was quantized from; None where not given, or the
    base is dense onto_original   merge into that one
    """

    name: str
    layer: nn.Module
    adapters: tuple[str, ...]
    original: Rows | None
    onto_original: bool

    @property
    def weight(self) -> NF4Weight | Tensor:
        """The unmerged weight, [N, K]."""
        return base_weight(Unmerged.of(self.layer), self.layer)


def merge_layer(
    task: Task,
    form: str,
    *,
    dtype: torch.dtype | None = None,
    moments: Tensor | None = None,
    rank: int = 8,
    seed: int = 0,
) -> tuple[MergedLayer, Residual | None]:
    """Merge one layer in place; what was done, and the residual's up and down where the form has one.

    dtype: of a dense linear in the place of a 4-bit one; moments: of the layer's input, for "feedback".
    """
    layer, weight = task.layer, task.weight
    origin, branches = Unmerged.of(layer), branches_of(layer, task.adapters)
    residual = None
    if isinstance(weight, Tensor):
        stored, merged = _dense_in_place(layer, origin, weight, branches)
    elif form == "dense":
        rows = task.original if task.onto_original else None
        stored = merged = merge_dense(weight, branches, dtype=dtype, base=rows)
    else:
        seed = _seed(seed, task.name)
        stored = merged = _four_bit(task, form, weight, branches, moments, seed)
        if form == "residual":
            rows = task.original if task.onto_original else None
            rank = min(rank, *weight.shape)
            residual = rounding_residual(weight, branches, merged, rank, seed=seed, base=rows)
    if isinstance(stored, Tensor) and not bool(torch.isfinite(stored).all()):
        raise ValueError(f"{task.name}: merged, it is beyond the range of {stored.dtype}; use another dtype")
    bias = None
    if any(branch.bias is not None for branch in branches):
        bias = folded_bias(weight, branches, origin.bias.data)
    measures = measure(
        weight,
        branches,
        merged,
        original=task.original,
        onto_original=task.onto_original,
        residual=residual,
    )
    size = stored_bytes(merged) + (0 if residual is None else sum(4 * side.numel() for side in residual))
    put_weight(layer, origin, stored, bias)
    if form != "residual":
        layer.merged_adapters.extend(task.adapters)
    note = "dense base" if isinstance(weight, Tensor) and form != "dense" else ""
    shape = tuple(weight.shape)
    return MergedLayer(task.name, shape, _described(weight), task.adapters, measures, size, note), residual


def _dense_in_place(
    layer: nn.Module,
    origin: Unmerged,
    weight: Tensor,
    branches: Sequence[Branch],
) -> tuple[Tensor, Tensor]:
    """The merged weight as the module keeps it, and as [N, K]."""
    stored = torch.empty_like(origin.weight.data)
    merged = stored.t() if getattr(layer, "fan_in_fan_out", False) else stored
    merge_dense(weight, branches, out=merged)
    return stored, merged


def _four_bit(
    task: Task,
    form: str,
    weight: NF4Weight,
    branches: Sequence[Branch],
    moments: Tensor | None,
    seed: int,
) -> NF4Weight:
    rows = task.original if task.onto_original else None
    if form == "stochastic":
        generator = torch.Generator(weight.device).manual_seed(seed)
        return stochastic_4bit(weight, branches, generator, base=rows)
    if form == "feedback":
        return feedback_4bit(weight, branches, moments, base=rows)
    return requantize_4bit(weight, branches, base=rows)


def _seed(seed: int, name: str) -> int:
    """Of one layer: the same whichever layers are merged beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _described(weight: NF4Weight | Tensor) -> str:
    if isinstance(weight, NF4Weight):
        return f"{weight.quant_type}{', nested' if weight.nested else ''}"
    return str(weight.dtype).removeprefix("torch.")


def stored_bytes(weight: NF4Weight | Tensor) -> int:
    """Of a weight as it is held."""
    return weight.nbytes if isinstance(weight, NF4Weight) else weight.numel() * weight.element_size()


def adapter_bytes(task: Task) -> int:
    """Of the adapters that a task merges, as they are held."""
    total = 0
    for branch in branches_of(task.layer, task.adapters):
        sides = (branch.up, branch.down, branch.magnitude, branch.bias)
        total += sum(side.numel() * branch.down.element_size() for side in sides if side is not None)
    return total


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if is_lora(module)}


@contextlib.contextmanager
def only_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it the LoRA layers run these adapters, in this order."""
    layers = list(lora_layers(model).values())
    before = [dict(layer.__dict__) for layer in layers]
    for layer in layers:
        layer.__dict__["_active_adapter"] = list(names)
    try:
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            layer.__dict__.pop("_active_adapter", None)
            layer.__dict__.update(
                {"_active_adapter": held["_active_adapter"]} if "_active_adapter" in held else {}
            )


@contextlib.contextmanager
def as_before(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it nothing is merged, and these adapters run; a swap of references, no arithmetic."""
    held: list[tuple[nn.Module, Unmerged, Unmerged, list[str]]] = []
    for layer in lora_layers(model).values():
        origin = unmerged(layer)
        if origin is not None:
            held.append((layer, origin, Unmerged.of(layer), list(layer.merged_adapters)))
            origin.put_back(layer)
            restore_state(layer, None, [])
    try:
        with only_adapters(model, names):
            yield
    finally:
        for layer, origin, now, merged in held:
            now.put_back(layer)
            restore_state(layer, origin, merged)


@contextlib.contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within it no adapter runs."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    layers: list[Any] = [layer for layer in lora_layers(model).values() if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
