"""Adapters that AdapterHub's library saved (`model.save_adapter`), onto the places found here.

Its files name the module that holds an adapter, in its own classes:
"encoder.layer.0.attention.output.adapters.NAME.adapter_up.weight",
"model.layers.0.output_adapters.adapters.NAME...". The layer is told by the path up to its number, and
within a layer the names come in the alphabetical order of attention, cross-attention and MLP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .config import PLACES, BottleneckConfig
from .places import Place

__all__ = ["WEIGHTS", "adapterhub_tensors"]

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_KEY = re.compile(
    r"(?P<holder>.+?)\.adapters\.(?P<name>[^.]+)\.(?P<part>adapter_down\.\d+\.\w+|adapter_up\.\w+|scaling)"
)
_PARTS = {"weight": ("down", "up"), "bias": ("down_bias", "up_bias")}


def adapterhub_tensors(
    folder: Path, config: BottleneckConfig, places: Sequence[tuple[Place, str]]
) -> dict[str, Tensor]:
    """The tensors of a folder by the names of `bottleneck_parameters`, for the chosen places and the paths
    of the modules they act on.

    Raises: FileNotFoundError without weights; ValueError where they do not fit the model, or where the
    library computes something
    else than this package does: its parallel adapter reads the stream before the norm of a pre-norm layer.
    """
    if config.reads == "input" and not all(place.normed for place, _ in places):
        raise ValueError(
            f"{folder}: AdapterHub's parallel adapter reads the stream before the norm of a pre-norm layer,"
            " the one here what the sublayer reads, after it: the weights mean another function. Train it"
            " anew"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in _weights(folder).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder}: holds {key}, which is no part of a bottleneck adapter")
        found.setdefault(match["holder"], {})[_own_name(match["part"])] = value
    layers: dict[str, list[str]] = {}
    for holder in sorted(found, key=_natural):
        layers.setdefault(_layer(holder), []).append(holder)
    tensors: dict[str, Tensor] = {}
    for layer, holders in layers.items():
        here = sorted(
            (pair for pair in places if _same_layer(_layer(pair[1]), layer)),
            key=lambda pair: PLACES.index(pair[0].kind),
        )
        if len(here) != len(holders):
            raise ValueError(
                f"{folder}: has {len(holders)} adapters in {layer}, the model has {len(here)} places for them"
                " there"
            )
        for (_, path), holder in zip(here, holders, strict=True):
            tensors |= {f"{path}.bottleneck.{part}": value for part, value in found[holder].items()}
    return tensors


def _weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder}: has neither {' nor '.join(WEIGHTS)}; give a folder that save_adapter wrote"
        )
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is of many types
        raise ValueError(
            f"{file}: cannot be read safely ({type(error).__name__}); copy the adapter again"
        ) from None


def _own_name(part: str) -> str:
    """Of "adapter_down.0.weight", "adapter_up.bias" or "scaling"."""
    if part == "scaling":
        return "learned_scaling"
    down, up = _PARTS[part.rpartition(".")[2]]
    return down if part.startswith("adapter_down") else up


def _natural(path: str) -> list[tuple[int, str]]:
    """Numbers by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _layer(path: str) -> str:
    """A path up to its first number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _same_layer(ours: str, theirs: str) -> bool:
    """A model may stand inside another ("bert.encoder.layer.0" is "encoder.layer.0")."""
    return f".{ours}".endswith(f".{theirs}") or f".{theirs}".endswith(f".{ours}")
