"""Bottleneck adapters on disk, in PEFT's manner: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import atomic_files
from . import saved
from .adapterhub import adapterhub_tensors
from .attach import (
    adapted_at,
    add_bottleneck,
    attached,
    bottleneck_parameters,
    chosen_places,
    remove_bottleneck,
    set_bottleneck,
)
from .config import PEFT_TYPE, BottleneckConfig

__all__ = ["CONFIG", "WEIGHTS", "load_bottleneck", "read_config", "save_bottleneck"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_bottleneck(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    **noted: Any,
) -> None:
    """Write an adapter, each file whole or not at all.

    Args:
        state: tensors to save in place of the model's own, by the names of `bottleneck_parameters` and of
            the buffers of `modules_to_save`.
        noted: further entries of adapter_config.json, such as task_type.
    Raises: ValueError where there is no such adapter, OSError where the folder cannot be written.
    """
    from safetensors.torch import save_file

    from ... import __version__

    parameters = _state(model, name) if state is None else state
    tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in parameters.items()}
    known = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
    }
    values = known | {"peftkern_version": __version__} | noted | attached(model).configs[name].to_dict()
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"folder: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> tuple[BottleneckConfig, dict[str, Any]]:
    """The configuration in a folder, this package's or AdapterHub's, and the file's other entries.

    Raises: FileNotFoundError without adapter_config.json; ValueError where it is no JSON, or of another
    kind of adapter.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: has no {CONFIG}; give a folder that save_bottleneck or save_pretrained wrote"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error}); copy the adapter again") from None
    if isinstance(values, dict) and isinstance(values.get("config"), dict) and "peft_type" not in values:
        return BottleneckConfig.from_adapterhub(values["config"]), values
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_TYPE:
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise ValueError(
            f"{file}: holds an adapter of the kind {kind!r}, expected {PEFT_TYPE!r}; load others with peft"
        )
    own = {field.name for field in dataclasses.fields(BottleneckConfig)}
    return BottleneckConfig(**{key: value for key, value in values.items() if key in own}), values


def load_bottleneck(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> None:
    """Put a saved adapter on the model and make it active; one of that name that is there already takes the
    saved values.

    The folder is one of `save_bottleneck`, or one that AdapterHub's library wrote (`model.save_adapter`).

    Raises: FileNotFoundError, ValueError where the folder holds no bottleneck adapter, or one of another
    base; the model is left as it was.
    """
    folder = Path(folder)
    config, values = read_config(folder)
    foreign = "peft_type" not in values
    tensors = {} if foreign else _read(folder / WEIGHTS)
    held = attached(model)
    if held is not None and name in held.configs:
        if held.configs[name] != config:
            raise ValueError(
                f"name: the adapter {name!r} on the model has another configuration than {folder}; load it"
                " under another name"
            )
        _fill(model, name, _foreign(model, name, folder) if foreign else tensors, folder)
        return
    before = held.active if held is not None else ()
    random = torch.get_rng_state()  # what add_bottleneck draws is not used
    add_bottleneck(model, config, name=name, example_inputs=example_inputs)
    torch.set_rng_state(random)
    try:
        _fill(model, name, _foreign(model, name, folder) if foreign else tensors, folder)
    except (ValueError, FileNotFoundError):
        remove_bottleneck(model, name)
        if before:
            set_bottleneck(model, before)
        raise
    set_bottleneck(model, name, trainable=trainable)


def _foreign(model: nn.Module, name: str, folder: Path) -> dict[str, Tensor]:
    """What AdapterHub's library saved, for the places where the adapter is."""
    config = attached(model).configs[name]
    return adapterhub_tensors(
        folder, config, [(place, adapted_at(place, config)) for place in chosen_places(model, config)]
    )


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: is missing; give a folder that save_bottleneck or save_pretrained wrote"
        )
    try:
        return {key.removeprefix(_PREFIX): value for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file}: is damaged ({error}); copy the adapter again") from None


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What is saved of an adapter: its parameters, and parameters and buffers of its `modules_to_save`."""
    return bottleneck_parameters(model, name) | saved.saved_state(model, name)


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """The saved values into the adapter's parameters, all or none."""
    parameters = _state(model, name)
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
        raise ValueError(
            f"{folder}: was saved from another model: it {what} ({len(missing)} missing, {len(unknown)}"
            " unknown tensors)"
        )
    for key, parameter in parameters.items():
        if parameter.shape != tensors[key].shape:
            shapes = f"{list(tensors[key].shape)}, expected {list(parameter.shape)}"
            raise ValueError(f"{folder}: was saved from another model: {key} is {shapes}")
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key].to(parameter.device, parameter.dtype))
