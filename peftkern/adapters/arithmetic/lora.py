"""A LoRA adapter as data: read from a folder that PEFT saved or from a model, written for PEFT to load."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import atomic_directory, write_json

__all__ = [
    "LoraModule",
    "LoraWeights",
    "assemble",
    "check_output",
    "plain_config",
    "read_adapter",
    "scaled",
    "state_of",
    "write_adapter",
    "zeros_like",
]

_CONFIG, _WEIGHTS, _RECORD = "adapter_config.json", "adapter_model.safetensors", "arithmetic.json"
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# What of a configuration says where LoRA is put, how large it is and how it was trained, and changes nothing
# of what A and B mean.
_UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
    ),
    *(
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
    ),
    *(
        "trainable_token_indices",
        "eva_config",
        "use_dora",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "lora_bias",
    ),
    "ensure_weight_tying",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "kaiming")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: W + scaling * b @ a. a [r, K], b [N, r]; an embedding's K is its vocabulary, a
    convolution's are 4-D and so on.

    bias [N]: of b, scaled as well (lora_bias). magnitude: DoRA's. kind: "linear" (Conv1D and convolutions
        too) or "embedding".
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    kind: str = "linear"

    @property
    def rank(self) -> int:
        """r, the number of a's rows."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """What two modules must share to be added."""
        return tuple(self.a.shape[1:]), (self.b.shape[0], *self.b.shape[2:]), self.kind

    def factors(self) -> tuple[Tensor, Tensor]:
        """b [N, r] with its scaling, and a [r, K], as matrices in fp64; a convolution's kernel is flattened
        into K."""
        if self.b.shape[1] != self.rank:
            raise ValueError(
                f"got b {tuple(self.b.shape)} for a of rank {self.rank}: a grouped convolution's LoRA cannot"
                " be combined"
            )
        if self.b[0, 0].numel() != 1:
            raise ValueError(
                f"got b {tuple(self.b.shape)}, expected a convolution of 1 x 1: it cannot be combined",
            )
        return self.b.flatten(1).double() * self.scaling, self.a.flatten(1).double()

    def with_factors(self, b: Tensor, a: Tensor, bias: Tensor | None = None) -> LoraModule:
        """A plain module of these matrices, scaling 1, with this one's shapes."""
        b, a = b.reshape(*b.shape, *self.b.shape[2:]), a.reshape(-1, *self.a.shape[1:])
        return LoraModule(
            a.float().contiguous(),
            b.float().contiguous(),
            1.0,
            None if bias is None else bias.float(),
            None,
            self.kind,
        )


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter: PEFT's configuration, its modules by the name they have in the base, and what it
    replaces in the base.

    replaced: tensors that take the place of the base's (modules_to_save, trained biases, trained tokens), by
        their name in the file.
    record: how the adapter was made, for its arithmetic.json.
    """

    name: str
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def obstacle(self) -> str | None:
        """Why b @ a is not all that this adapter adds to the base; None where it is, DoRA and `replaced`
        aside."""
        start = self.config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            return (
                f"init_lora_weights={start!r} also changed the base when it "
                "was made; save it as a plain LoRA first "
                "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
        unknown = [key for key, value in self.config.items() if value and key not in _UNDERSTOOD]
        return (
            f"its configuration has {', '.join(unknown)}, a kind of LoRA that cannot be combined"
            if unknown
            else None
        )

    @property
    def trained(self) -> dict[str, Tensor]:
        """What of `replaced` was trained; the rest are copies of frozen weights, which PEFT saves with LoRA
        on an embedding."""
        saved = tuple(self.config.get("modules_to_save") or ())

        def is_trained(key: str) -> bool:
            named = any(part in saved for part in key.split(".")) or any(f".{name}." in key for name in saved)
            return named or not key.endswith(".weight") or "token_adapter" in key

        return {key: value for key, value in self.replaced.items() if is_trained(key)}

    @property
    def is_dora(self) -> bool:
        """Whether a module has a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())


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


def plain_config(
    config: dict[str, Any],
    modules: Mapping[str, LoraModule],
    *,
    same_targets: bool,
) -> dict[str, Any]:
    """`config` for plain modules of scaling 1; where they may be at other places than it says, they are
    targeted by their full names."""
    (common, _), *_ = Counter(module.rank for module in modules.values()).most_common(1)
    # PEFT matches a pattern with the end of a name: ^ keeps a name from matching a longer one.
    ranks = {f"^{name}": module.rank for name, module in modules.items() if module.rank != common}
    biased = any(module.bias is not None for module in modules.values())
    places = (
        {}
        if same_targets
        else {"target_modules": sorted(modules), "exclude_modules": None, "layers_to_transform": None}
    )
    places |= {} if same_targets else {"layers_pattern": None}
    result = (
        config
        | places
        | {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": ranks,
            "alpha_pattern": dict(ranks),
        }
    )
    result |= {
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": biased,
        "init_lora_weights": True,
        "bias": "none",
    }
    return result | {
        "modules_to_save": None,
        "trainable_token_indices": None,
        "eva_config": None,
        "inference_mode": True,
    }


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


def scaled(adapter: LoraWeights, weight: float) -> LoraWeights:
    """The adapter times a number, its ranks, alphas and places as they are: b and its bias are scaled, and in
    fp32 unless by -1."""

    def times(tensor: Tensor) -> Tensor:
        return -tensor if weight == -1.0 else (tensor.double() * weight).float()

    modules = {
        name: replace(module, b=times(module.b), bias=None if module.bias is None else times(module.bias))
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules, record={})


def zeros_like(adapter: LoraWeights) -> LoraWeights:
    """A plain adapter at the same places that adds exactly nothing."""
    modules = {
        name: LoraModule(
            module.a[:1].float().contiguous(),
            torch.zeros_like(module.b[:, :1], dtype=torch.float32).contiguous(),
            1.0,
            None,
            None,
            module.kind,
        )
        for name, module in adapter.modules.items()
    }
    return LoraWeights(adapter.name, plain_config(adapter.config, modules, same_targets=True), modules)
