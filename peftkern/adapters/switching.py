"""Many adapters of one base, any of them active at once: their tensors take the place of one slot's in the
model, without a copy.

PEFT keeps every adapter as modules in every layer and walks over all of them when it switches; a switch here
touches the slot alone, so that it costs the same with three adapters as with a thousand. What
`peftkern.patch` has put on the model stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching import mixed_adapters
from .arithmetic.lora import LoraModule, LoraWeights
from .arithmetic.lora_files import read_adapter

__all__ = ["AdapterBank"]

_BASE = "__base__"


class _Content(NamedTuple):
    """What one layer's slot holds: a [r, K], b [N, r], b's bias, DoRA's magnitude, and the scaling."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    scaling: float


class _Slot:
    """One layer's place for an adapter: its parameters stay, their data changes."""

    def __init__(self, layer: Any, name: str, adapter: str) -> None:
        self.layer, self.name, self.adapter = layer, name, adapter
        self.embedding = adapter in layer.lora_embedding_A
        parts = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if self.embedding
            else (
                layer.lora_A,
                layer.lora_B,
            )
        )
        self.a, self.b = (part[adapter] if self.embedding else part[adapter].weight for part in parts)
        self.bias = None if self.embedding else layer.lora_B[adapter].bias
        magnitudes = layer.lora_magnitude_vector
        self.magnitude = magnitudes[adapter].weight if adapter in magnitudes else None

    def content(self) -> _Content:
        """What it holds now."""
        held = (self.a, self.b, self.bias, self.magnitude)
        return _Content(
            *(None if part is None else part.data for part in held),
            self.layer.scaling[self.adapter],
        )

    def put(self, content: _Content) -> None:
        """Let it hold something else."""
        self.a.data, self.b.data = content.a, content.b
        if self.bias is not None:
            self.bias.data = content.bias
        if self.magnitude is not None:
            self.magnitude.data = content.magnitude
        self.layer.scaling[self.adapter] = content.scaling
        self.layer.r[self.adapter] = content.a.shape[0]

    def of_module(self, module: LoraModule, adapter: str) -> _Content:
        """A module's tensors on the slot's device and in its dtype: its own where these are the same.
        ValueError where it does not fit."""
        own = LoraModule(self.a.data, self.b.data, 1.0, kind="embedding" if self.embedding else "linear")
        if module.shape != own.shape:
            shapes = (
                f"A {tuple(module.a.shape)} and B {tuple(module.b.shape)}, the model {tuple(self.a.shape)}"
                f" and {tuple(self.b.shape)}"
            )
            raise ValueError(f"adapter {adapter}: it does not fit the model at {self.name}: it has {shapes}")
        for part, mine, what in (
            (module.bias, self.bias, "lora_bias"),
            (module.magnitude, self.magnitude, "DoRA"),
        ):
            if part is not None and mine is None:
                raise ValueError(
                    f"adapter {adapter}: it has {what} at {self.name}, which the slot has not; make the slot"
                    " of that kind"
                )
        if module.magnitude is None and self.magnitude is not None:
            raise ValueError(
                f"adapter {adapter}: it is no DoRA at {self.name}, which the slot is; keep it in a bank of"
                " its own"
            )
        tensors = [
            None if part is None else part.to(self.a.device, self.a.dtype)
            for part in (module.a, module.b, module.bias)
        ]
        bias = (
            torch.zeros_like(self.bias.data) if self.bias is not None and tensors[2] is None else tensors[2]
        )
        magnitude = (
            None
            if module.magnitude is None
            else module.magnitude.to(self.magnitude.data).reshape(
                self.magnitude.shape,
            )
        )
        return _Content(tensors[0], tensors[1], bias, magnitude, module.scaling)

    def nothing(self) -> _Content:
        """A branch of rank 1 that adds exactly nothing."""
        bias = None if self.bias is None else torch.zeros_like(self.bias.data)
        return _Content(
            torch.zeros_like(self.a.data[:1]),
            torch.zeros_like(self.b.data[:, :1]),
            bias,
            None,
            0.0,
        )


class AdapterBank:
    """Adapters of one base by name, of which the model's slot holds one at a time. For inference: gradients
    belong to the slot.

    Adapters may differ in rank, scaling and in the modules that they adapt, within those that the slot
    adapts. Files are read through the page cache: what a thousand adapters take of memory is what of them has
    been used. `use` changes pointers, two a layer; a patched model goes on with the kernels that it has.

    >>> bank = AdapterBank(model)                       # doctest: +SKIP
    >>> for folder in folders: bank.add(folder.name, folder)   # doctest: +SKIP
    >>> bank.use("customer-17"); model.generate(...)    # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, slot: str = "default") -> None:
        """A bank for a PeftModel, whose LoRA adapter `slot` lends its place to the others; ValueError without
        such an adapter."""
        from peft.tuners.lora import LoraLayer

        self.model, self.slot = model, slot
        named = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and slot in module.scaling
        ]
        if not named:
            raise ValueError(f"slot: the model has no LoRA adapter {slot!r}")
        self._slots = [_Slot(layer, name.removeprefix("base_model.model."), slot) for name, layer in named]
        self._nothing: dict[str, _Content] = {}
        self._contents: dict[str, list[_Content]] = {}
        self._own = [place.content() for place in self._slots]
        self.current: str | None = None

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order they were added."""
        return list(self._contents)

    def __len__(self) -> int:
        return len(self._contents)

    def __contains__(self, name: object) -> bool:
        return name in self._contents

    def add(self, name: str, adapter: str | Path | LoraWeights) -> None:
        """Take an adapter in: a folder that PEFT saved, or one in memory. The model is not changed.

        Raises: ValueError where the name is taken, or the adapter is no LoRA, replaces modules, or does not
            fit the slot.
        """
        if name in self._contents or name == _BASE:
            raise ValueError(f"name: {name!r} is taken; choose another")
        weights = adapter if isinstance(adapter, LoraWeights) else read_adapter(adapter, name)
        if weights.obstacle:
            raise ValueError(f"adapter {name}: {weights.obstacle}")
        if weights.trained:
            raise ValueError(
                f"adapter {name}: it replaces {next(iter(weights.trained))} in the base, which the slot"
                " cannot"
            )
        beyond = weights.modules.keys() - {place.name for place in self._slots}
        if beyond:
            more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            raise ValueError(
                f"adapter {name}: it adapts {min(beyond)}{more}, where the slot {self.slot!r} has no LoRA;"
                " give it all target_modules"
            )
        modules = weights.modules
        self._contents[name] = [
            place.of_module(modules[place.name], name) if place.name in modules else self._empty(place)
            for place in self._slots
        ]

    def _empty(self, place: _Slot) -> _Content:
        if place.magnitude is not None:
            raise ValueError(
                f"adapter: it does not adapt {place.name}, where the slot is DoRA; keep it in a bank of"
                " its own"
            )
        return self._nothing.setdefault(place.name, place.nothing())

    def remove(self, name: str) -> None:
        """Forget an adapter; the slot's own takes its place where it is in use."""
        self._known(name)
        if self.current == name:
            self.use(None)
        del self._contents[name]

    def use(self, name: str | None) -> None:
        """Let the slot hold this adapter from the next call on; None: what it held when the bank was made.

        Raises: ValueError where the name is unknown, or the slot is merged into the base.
        """
        contents = self._own if name is None else self._known(name)
        if any(place.layer.merged_adapters for place in self._slots):
            raise ValueError("the model is merged: call unmerge_adapter() before another adapter is used")
        for place, content in zip(self._slots, contents, strict=True):
            place.put(content)
        self.current = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within it the slot holds this adapter."""
        before = self.current
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    @contextlib.contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[None]:
        """Within it each sample of a batch runs through the adapter of the bank that is named for it
        ("__base__": none), see `peftkern.mixed_adapters`. The layers get the adapters of this batch, and lose
        them at its end; nothing is copied.
        """
        distinct = [name for name in dict.fromkeys(names) if name != _BASE]
        contents = {name: self._known(name) for name in distinct}
        if any(place.magnitude is not None or place.bias is not None for place in self._slots):
            raise ValueError(
                "mixed: DoRA and lora_bias cannot be mixed from a bank; load them with PEFT, or use one after"
                " the other"
            )
        labels = {name: f"__bank_{number}" for number, name in enumerate(distinct)} | {_BASE: _BASE}
        with contextlib.ExitStack() as stack:
            for name in distinct:
                for place, content in zip(self._slots, contents[name], strict=True):
                    stack.callback(_take_out, place, labels[name])
                    _put_in(place, labels[name], content)
            stack.enter_context(mixed_adapters(self.model, [labels[name] for name in names]))
            yield

    def _known(self, name: str) -> list[_Content]:
        if name not in self._contents:
            raise ValueError(f"name: {name!r} is not in the bank of {len(self)} adapters; add it first")
        return self._contents[name]


def _put_in(place: _Slot, label: str, content: _Content) -> None:
    layer = place.layer
    if place.embedding:
        parts = ((layer.lora_embedding_A, content.a), (layer.lora_embedding_B, content.b))
        for table, tensor in parts:
            table[label] = nn.Parameter(tensor, requires_grad=False)
    elif isinstance(layer.lora_A[place.adapter], nn.Linear):
        layer.lora_A._modules[label], layer.lora_B._modules[label] = _linear(content.a), _linear(content.b)
    else:
        raise ValueError(f"mixed: {place.name} is a convolution; use one adapter after the other")
    layer.lora_dropout._modules[label] = nn.Identity()
    layer.scaling[label] = content.scaling


def _linear(weight: Tensor) -> nn.Linear:
    """A linear of this very weight."""
    with torch.device("meta"):
        linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _take_out(place: _Slot, label: str) -> None:
    layer = place.layer
    for table in (
        layer.lora_A,
        layer.lora_B,
        layer.lora_dropout,
        layer.lora_embedding_A,
        layer.lora_embedding_B,
        layer.scaling,
    ):
        if label in table:
            del table[label]
