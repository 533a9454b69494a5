"""A LoRA adapter read from a folder that PEFT saved, or from a state, and written for PEFT to load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import atomic_directory, write_json
from .lora import LoraModule, LoraWeights

__all__ = ["assemble", "check_output", "read_adapter", "state_of", "write_adapter"]

_CONFIG, _WEIGHTS, _RECORD = "adapter_config.json", "adapter_model.safetensors", "arithmetic.json"
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def read_adapter(folder: str | Path, name: str | None = None) -> LoraWeights:
    """The LoRA adapter in a folder that PEFT saved.

    Raises: ValueError where there is none, it is damaged, or it is of another kind than LoRA.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        there = "it has no" if folder.is_dir() else "there is no such folder, hence no"
        raise ValueError(
            f"adapter {folder}: {there} {_CONFIG}; give a folder that PEFT saved, or the --output of a run",
        )
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"adapter {folder}: its {_CONFIG} is damaged ({error})") from None
    if kind != "LORA":
        raise ValueError(
            f"adapter {folder}: it is of kind {kind}; only LoRA adapters can be added, scaled and merged here"
        )
    return assemble(name or folder.name, config, _load(folder), f"adapter {folder}")


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"adapter {folder}: it has no {_WEIGHTS} (an older .bin file has to be saved anew by PEFT)",
        )
    try:
        return load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter {folder}: its {_WEIGHTS} is damaged ({error})") from None


def assemble(name: str, config: dict[str, Any], state: Mapping[str, Tensor], place: str) -> LoraWeights:
    """The adapter of a configuration and tensors that PEFT names; `place` is for messages.

    Raises: ValueError where they hold no LoRA, or do not belong together.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    replaced = {}
    for key, tensor in state.items():
        module, part = _split(key)
        if part is None:
            replaced[key] = tensor.detach()
        else:
            parts.setdefault(module, {})[part] = tensor.detach()
    if not parts:
        raise ValueError(f"{place}: it holds no LoRA weights (lora_A, lora_B)")
    return LoraWeights(
        name,
        config,
        {module: _module(module, own, config, place) for module, own in parts.items()},
        replaced,
    )


def _split(key: str) -> tuple[str, str | None]:
    """The module of a key of PEFT's state, and which of LoRA's tensors it is:
    "base_model.model.x.lora_A.weight" -> "x", "lora_A"."""
    stem = key.removesuffix(".weight")
    for part in _PARTS:
        if stem.endswith(f".{part}"):
            return stem.removesuffix(f".{part}").removeprefix(_PREFIX), part
    if key.endswith(".lora_B.bias"):
        return key.removesuffix(".lora_B.bias").removeprefix(_PREFIX), "bias"
    return key, None


def _module(name: str, parts: dict[str, Tensor], config: dict[str, Any], place: str) -> LoraModule:
    kind = "embedding" if "lora_embedding_A" in parts else "linear"
    stem = "lora_embedding_" if kind == "embedding" else "lora_"
    a, b = parts.get(f"{stem}A"), parts.get(f"{stem}B")
    if a is None or b is None:
        raise ValueError(f"{place}: {name} has only one of A and B; the file is incomplete")
    if a.dim() < 2 or b.dim() < 2:
        raise ValueError(
            f"{place}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, saved from a sharded model that"
            " was not gathered"
        )
    magnitude = parts.get("lora_magnitude_vector")
    return LoraModule(a, b, _scaling(name, config, place, a.shape[0]), parts.get("bias"), magnitude, kind)


def _scaling(name: str, config: dict[str, Any], place: str, rank: int) -> float:
    """PEFT's own reading of r, lora_alpha, their patterns and use_rslora, checked against the rank that the
    file has."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks, name), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
    if r != rank:
        raise ValueError(
            f"{place}: {name} has rank {rank} in the file, {r} in {_CONFIG}; the two do not belong together",
        )
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def state_of(adapter: LoraWeights) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT names them in a file."""
    state = dict(adapter.replaced)
    for name, module in adapter.modules.items():
        embedding = module.kind == "embedding"
        stem, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        state |= {f"{_PREFIX}{name}.{stem}A{end}": module.a, f"{_PREFIX}{name}.{stem}B{end}": module.b}
        if module.bias is not None:
            state[f"{_PREFIX}{name}.lora_B.bias"] = module.bias
        if module.magnitude is not None:
            state[f"{_PREFIX}{name}.lora_magnitude_vector"] = module.magnitude
    return state


def write_adapter(
    adapter: LoraWeights,
    folder: str | Path,
    *,
    overwrite: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write an adapter as PEFT would, whole or not at all, with arithmetic.json beside it where it was
    computed.

    `beside` writes more files into the folder that it is given, before the whole appears.

    Raises: ValueError where the folder exists and is not empty, unless `overwrite` and it holds an adapter;
        OSError where it cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    check_output(folder, overwrite=overwrite)
    with atomic_directory(folder) as temporary:
        tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in state_of(adapter).items()}
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, adapter.config)
        if adapter.record:
            write_json(temporary / _RECORD, adapter.record)
        if beside is not None:
            beside(temporary)
    return folder


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError where an adapter must not be written to this folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: name a folder")
    if not overwrite:
        raise ValueError(
            f"--output {folder} exists and is not empty: name another folder, or give --overwrite",
        )
    if not (folder / _CONFIG).is_file() or not (folder / _RECORD).is_file():
        raise ValueError(
            f"--output {folder} is no earlier result of peftkern arithmetic: name another folder, or empty it"
        )
