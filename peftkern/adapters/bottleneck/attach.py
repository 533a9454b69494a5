"""Bottleneck adapters on a model: added, switched, turned off and taken away, in place. The base is frozen,
in 4 bit or dense."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import saved
from .config import BottleneckConfig
from .layer import Bottleneck, BottleneckLayer, Handover, InputTap, Source
from .places import Place, find_places

__all__ = [
    "Attached",
    "adapted_at",
    "add_bottleneck",
    "attached",
    "bottleneck_disabled",
    "bottleneck_parameters",
    "bottlenecks",
    "chosen_places",
    "place_key",
    "remove_bottleneck",
    "set_bottleneck",
]

_SLOT = "_peftkern_bottlenecks"  # of the model


@dataclass
class Attached:
    """What is on a model: its places, each adapter's configuration, which are active, whether all are off,
    and the parameters that were trainable before the base was frozen."""

    places: tuple[Place, ...]
    configs: dict[str, BottleneckConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    off: bool = False
    thawed: list[nn.Parameter] = field(default_factory=list)


def add_bottleneck(
    model: nn.Module,
    config: BottleneckConfig | str = "double_seq_bn",
    *,
    name: str = "default",
    example_inputs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Place, ...]:
    """Put a new adapter on the model, make it the active one, and freeze the base.

    The places are found by how activations flow in one forward pass on a tiny input, with the linears stood
    in for: no list of families. Modules are put around others (`base_layer`), none is modified;
    `peftkern.patch` may come before or after.
    A bottleneck is not linear: it cannot be merged into the base.

    Args:
        model: any module whose layers add what they compute onto their input.
        config: a BottleneckConfig, or AdapterHub's name of one ("seq_bn[reduction_factor=8]").
        name: of the adapter; without dots.
        example_inputs: keyword arguments of a small forward pass; needed where the model is none of
            transformers' with token ids or images.
        dtype: of the adapter's parameters. Default: fp32, or fp64 on an fp64 base.
    Returns: the places that got one, in the order in which they run.
    Raises: ValueError where the name is taken, nothing is added to a stream, or the configuration fits no
    place or not all.

    >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> class Residual(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.mlp = layer
    ...     def forward(self, x):
    ...         return x + self.mlp(x)
    >>> places = add_bottleneck(
    ...     Residual(), "seq_bn[original_ln_before=False]", example_inputs={"x": torch.ones(1, 8)}
    ... )
    >>> [place.output for place in places]
    ['mlp']
    """
    config = BottleneckConfig.parse(config) if isinstance(config, str) else config
    held = attached(model)
    if held is not None and name in held.configs:
        raise ValueError(
            f"name: there is an adapter {name!r} already; remove_bottleneck(model, {name!r}) takes it away"
        )
    if not name or "." in name:
        raise ValueError(f"name: got {name!r}, expected a name without dots")
    places = held.places if held is not None else find_places(model, example_inputs)
    chosen = _chosen(places, config)
    adapted = [adapted_at(place, config) for place in chosen] + [path for path, _, _ in bottlenecks(model)]
    whole = saved.find(model, config.modules_to_save, adapted)
    held = held or Attached(places, thawed=[p for p in model.parameters() if p.requires_grad])
    for place in chosen:
        _install(model, place, config, name, dtype)
    saved.wrap(model, whole, name)
    held.configs[name] = config
    model.__dict__[_SLOT] = held
    for parameter in held.thawed:
        parameter.requires_grad_(False)
    set_bottleneck(model, name)
    return chosen


def attached(model: nn.Module) -> Attached | None:
    """What is on the model; None where nothing is."""
    return model.__dict__.get(_SLOT)


def set_bottleneck(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Let these adapters run, their branches summed, and train where `trainable`; the others neither run
    nor train."""
    held = _required(model)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in wanted if name not in held.configs]
    if unknown:
        raise ValueError(
            f"names: there is no adapter {', '.join(map(repr, unknown))}; there are"
            f" {', '.join(map(repr, held.configs))}"
        )
    saved.activate(model, wanted, off=held.off, trainable=trainable)
    held.active = wanted
    for _, name, adapter in bottlenecks(model):
        adapter.requires_grad_(trainable and name in wanted)
    _refresh(model, held)


@contextlib.contextmanager
def bottleneck_disabled(model: nn.Module) -> Iterator[None]:
    """Within it the base answers alone."""
    held = _required(model)
    before = held.off
    held.off = True
    _refresh(model, held)
    try:
        yield
    finally:
        held.off = before
        _refresh(model, held)


def remove_bottleneck(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter away, or all of them; with the last one every module stands where it stood, and
    trains as it did."""
    held = _required(model)
    if name is not None and name not in held.configs:
        raise ValueError(
            f"name: there is no adapter {name!r}; there are {', '.join(map(repr, held.configs))}"
        )
    for one in [name] if name is not None else list(held.configs):
        del held.configs[one]
        saved.take_away(model, one)
        for module in list(model.modules()):
            if isinstance(module, BottleneckLayer):
                module.bottlenecks.pop(one) if one in module.bottlenecks else None
            elif isinstance(module, InputTap):
                module.taps.pop(one, None)
    held.active = tuple(one for one in held.active if one in held.configs)
    _take_out(model)
    _refresh(model, held)
    if not held.configs:
        for parameter in held.thawed:
            parameter.requires_grad_(True)
        del model.__dict__[_SLOT]


def bottlenecks(model: nn.Module) -> Iterator[tuple[str, str, Bottleneck]]:
    """(path without the modules put around others, name of the adapter, the adapter at that place), in the
    model's order."""
    for path, module in model.named_modules():
        if isinstance(module, BottleneckLayer):
            for name, adapter in module.bottlenecks.items():
                yield place_key(path), name, adapter


def place_key(path: str) -> str:
    """A module's path as it was before anything was put around modules."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def bottleneck_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter, by "path.bottleneck.parameter", and of its `modules_to_save`, by
    "path.parameter"."""
    if name not in _required(model).configs:
        raise ValueError(
            f"name: there is no adapter {name!r}; there are {', '.join(map(repr, attached(model).configs))}"
        )
    return {
        f"{path}.bottleneck.{key}": value
        for path, one, adapter in bottlenecks(model)
        if one == name
        for key, value in adapter.named_parameters()
    } | {
        f"{path}.{key}": value
        for path, copy in saved.trained_copies(model, name)
        for key, value in copy.named_parameters()
    }


def chosen_places(model: nn.Module, config: BottleneckConfig) -> tuple[Place, ...]:
    """The places of a model with adapters that a configuration means."""
    return _chosen(_required(model).places, config)


def adapted_at(place: Place, config: BottleneckConfig) -> str:
    """The path of the module on which the adapter stands."""
    return {"output": place.output, "sum": place.sum, "input": place.input and place.input.added_at}[
        config.reads
    ]


def _required(model: nn.Module) -> Attached:
    held = attached(model)
    if held is None:
        raise ValueError("model: has no bottleneck adapter; add_bottleneck or load_bottleneck puts one on it")
    return held


def _chosen(places: tuple[Place, ...], config: BottleneckConfig) -> tuple[Place, ...]:
    """The places that the configuration means; ValueError where it means none, or one that it cannot have."""
    layers = {place.layer for place in places}
    beyond = [layer for layer in config.leave_out if layer not in layers]
    if beyond:
        raise ValueError(f"leave_out: got {beyond}, the layers are 0 to {max(layers)}")
    chosen = tuple(
        place for place in places if place.kind in config.places and place.layer not in config.leave_out
    )
    if not chosen:
        kinds = ", ".join(sorted({place.kind for place in places}))
        raise ValueError(
            f"config: leaves no place for an adapter; the model's sublayers are {kinds} in {len(layers)}"
            " layers"
        )
    seen: dict[str, Place] = {}
    for place in chosen:
        if (config.reads == "input" and place.input is None) or (config.reads == "sum" and place.sum is None):
            what = (
                "what this sublayer reads"
                if config.reads == "input"
                else "the stream after this sublayer's residual addition"
            )
            raise ValueError(
                f"reads: got {config.reads!r}, but no module is given {what} ({place.kind} of"
                f" {place.output}); use 'output'"
            )
        seen.setdefault(adapted_at(place, config), place)  # sublayers side by side share their sum
    return tuple(seen.values())


def _install(
    model: nn.Module, place: Place, config: BottleneckConfig, name: str, dtype: torch.dtype | None
) -> None:
    path, source = adapted_at(place, config), Source("output")
    if config.reads == "sum" and place.normed:
        source = Source("norm")
    elif config.reads == "input":
        reader = place.input
        source = Source("argument", reader.name, reader.index)
        if reader.path != reader.added_at:
            source = Source("handover", reader.name, reader.index, Handover())
            _around(model, reader.path, InputTap).taps[name] = source
    layer = _around(model, path, BottleneckLayer)
    device, base = _device_and_dtype(model, path)
    wanted = dtype or torch.promote_types(base, torch.float32)
    layer.bottlenecks[name] = Bottleneck(
        config, place.layer, place.width, source, device=device, dtype=wanted
    ).train(layer.training)


def _around(model: nn.Module, path: str, kind: type) -> Any:
    """The module of `kind` around the one that stood at `path`, put there where there is none."""
    parent, part, current = _locate(model, path)
    around = current
    while isinstance(around, (BottleneckLayer, InputTap)):
        if type(around) is kind:
            return around
        around = around.base_layer
    new = kind(current)
    parent._modules[part] = new
    return new


def _locate(model: nn.Module, path: str) -> tuple[nn.Module, str, nn.Module]:
    """The parent of what stands at a path, its name there, and what stands there, which may be around the
    module meant."""
    parent, current, part = model, model, ""
    for part in path.split("."):
        while isinstance(current, (BottleneckLayer, InputTap)):
            current = current.base_layer
        parent = current
        if part not in parent._modules:
            raise ValueError(
                f"model: has no module {path!r}; its structure has changed since the adapter's places were"
                " found"
            )
        current = parent._modules[part]
    return parent, part, current


def _device_and_dtype(model: nn.Module, path: str) -> tuple[torch.device, torch.dtype]:
    """Of the nearest floating parameter around the path; packed weights say where, but not in which dtype,
    the model computes."""
    parts, device = path.split("."), None
    for depth in range(len(parts), -1, -1):
        try:
            around = model if not depth else _locate(model, ".".join(parts[:depth]))[2]
        except ValueError:
            continue
        for parameter in around.parameters():
            device = device or parameter.device
            if parameter.is_floating_point():
                return device, parameter.dtype
    return device or torch.device("cpu"), torch.float32


def _take_out(model: nn.Module) -> None:
    """Put every module back that nothing acts on any more."""
    for parent in list(model.modules()):
        for part, child in list(parent._modules.items()):
            while (isinstance(child, BottleneckLayer) and not child.bottlenecks) or (
                isinstance(child, InputTap) and not child.taps
            ):
                child = child.base_layer
            parent._modules[part] = child


def _refresh(model: nn.Module, held: Attached) -> None:
    """Tell every layer which adapters are active."""
    saved.activate(model, held.active, off=held.off, trainable=None)
    for module in model.modules():
        if isinstance(module, BottleneckLayer):
            module.active = tuple(name for name in held.active if name in module.bottlenecks)
            module.enable_adapters(not held.off)
        elif isinstance(module, InputTap):
            module.active = () if held.off else tuple(name for name in held.active if name in module.taps)
