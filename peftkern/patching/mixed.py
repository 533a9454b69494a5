"""Batches whose samples belong to different adapters: which name each sample has, the rows that makes, and
each adapter by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["BASE", "SLOT", "current", "label", "names", "own_adapters", "run", "stretches"]

BASE = "__base__"  # PEFT's name for "no adapter"
ONE_TENSOR = "it has to map one tensor of samples to another; run each adapter's samples by themselves"
SLOT = "_peftkern_adapter_names"


class _Choice(NamedTuple):
    """The adapter of each sample, and what an error calls the layer."""

    names: list[str]
    label: str


def current(layer: nn.Module) -> list[str] | None:
    """The samples' adapters that the layer's next call mixes; None outside of that."""
    choice = layer.__dict__.get(SLOT)
    return None if choice is None else choice.names


def label(layer: nn.Module) -> str:
    """What an error calls the layer."""
    choice = layer.__dict__.get(SLOT)
    return type(layer).__name__ if choice is None else choice.label


@contextlib.contextmanager
def names(layer: nn.Module, chosen: Sequence[str] | None, called: str | None = None) -> Iterator[None]:
    """Let one layer mix adapters, or with None run its active ones."""
    before = layer.__dict__.pop(SLOT, None)
    if chosen is not None:
        layer.__dict__[SLOT] = _Choice(list(chosen), called or type(layer).__name__)
    try:
        yield
    finally:
        layer.__dict__.pop(SLOT, None)
        if before is not None:
            layer.__dict__[SLOT] = before


def stretches(layer: nn.Module, chosen: Sequence[str], x: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Rows of the flattened x of each run of equal names; x [samples, ..., K]."""
    _check(layer, chosen, x)
    rows = x.numel() // max(x.shape[0] * x.shape[-1], 1)
    found: list[tuple[str, tuple[int, int]]] = []
    for i, name in enumerate(chosen):
        if found and found[-1][0] == name:
            found[-1] = (name, (found[-1][1][0], (i + 1) * rows))
        else:
            found.append((name, (i * rows, (i + 1) * rows)))
    return found


def _check(layer: nn.Module, chosen: Sequence[str], x: Tensor) -> None:
    if x.dim() == 0 or x.shape[0] != len(chosen):
        count = x.shape[0] if x.dim() else 0
        raise ValueError(
            f"adapter_names: got {len(chosen)} names for a batch of {count} samples, {tuple(x.shape)}, "
            f"in {label(layer)}"
        )


def own_adapters(module: nn.Module) -> set[str]:
    """The names of the adapters that one of PEFT's modules has parts of."""
    if "_adapters" in module.__dict__:
        return set(module.__dict__["_adapters"])
    parts = (getattr(module, name, {}) for name in getattr(type(module), "adapter_layer_names", ("lora_A",)))
    return {name for part in parts if hasattr(part, "keys") for name in part}


def run(module: nn.Module, chosen: Sequence[str], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """What `call` gives for each sample of x [samples, ...] while the adapter that is named for it is the
    module's only one."""
    _check(module, chosen, x)
    order = sorted(
        range(len(chosen)), key=lambda i: chosen.index(chosen[i])
    )  # each adapter's samples together, in the order of their first ones
    together = order == list(range(len(chosen)))
    index = torch.tensor(order, device=x.device)
    rows, outputs, start = x if together else x.index_select(0, index), [], 0
    for name in dict.fromkeys(chosen):
        stop = start + chosen.count(name)
        with _alone(module, name):
            outputs.append(call(rows[start:stop]))
        start = stop
    if any(not isinstance(y, Tensor) or y.dim() == 0 for y in outputs) or sum(map(len, outputs)) != len(
        chosen
    ):
        raise ValueError(
            f"{label(module)}: what it gives is no tensor with a row for each sample; {ONE_TENSOR}"
        )
    y = torch.cat(outputs)
    return y if together else y.index_select(0, torch.argsort(index))


@contextlib.contextmanager
def _alone(module: nn.Module, name: str) -> Iterator[None]:
    """The module as if this adapter were the only active one; its base where it has no part of it."""
    parts = [part for part in (module, module._modules.get("token_adapter")) if part is not None]
    before = [dict(part.__dict__) for part in parts]
    for part in parts:
        part.__dict__.update(_active_adapter=[name], _disable_adapters=name not in own_adapters(module))
    try:
        with names(module, None):
            yield
    finally:
        for part, state in zip(parts, before, strict=True):
            for key in ("_active_adapter", "_disable_adapters"):
                part.__dict__.pop(key)
                part.__dict__.update({key: state[key]} if key in state else {})
