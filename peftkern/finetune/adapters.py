"""The kinds of adapter that --adapter names: how each is put on a base, and read back from its folder.

A kind is one `Kind` in `_KINDS`; what builds it is imported when it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bottleneck, prefix
from .errors import InputError
from .layer_rates import excluded_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..memory.planner.shapes import Shape
    from .config import FinetuneConfig

__all__ = [
    "DEFAULT",
    "add_adapter",
    "add_lora",
    "adapter_loader",
    "adapter_title",
    "check_adapter",
    "is_lora",
    "load_adapter",
    "planned_adapter",
]

DEFAULT = "lora"
# Options of LoRA, with the values that leave them out.
_OF_LORA = {
    "alpha": None,
    "targets": ("all-linear",),
    "rslora": False,
    "dora": False,
    "lora_plus": None,
    "first_layer": None,
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a value of --adapter stands for.

    title: in model cards; peft_type: as adapter_config.json names it; loader: the function that reads its
    folder in Python; add(base, config): the base with a new adapter, InputError where it does not fit;
    load(base, folder): the base with a saved one; planned(config, shape): what the planner's RunOptions say
    of it, InputError for what the planner does not know; check(config): raises InputError for a value of
    --adapter that it cannot read, or an option that does not apply.
    """

    title: str
    peft_type: str
    loader: str = "peft.PeftModel.from_pretrained"
    add: Callable[[PreTrainedModel, FinetuneConfig], PeftModel]
    load: Callable[[PreTrainedModel, Path], PeftModel]
    planned: Callable[[FinetuneConfig, Shape], dict[str, Any]]
    check: Callable[[FinetuneConfig], None] = lambda config: None


def check_adapter(config: FinetuneConfig) -> None:
    """Raise InputError where --adapter names no kind, or an option is given that the kind does not have."""
    _kind(config.adapter).check(config)
    if is_lora(config):
        return
    for name, unset in _OF_LORA.items():
        if getattr(config, name) != unset:
            raise InputError(
                f"--{name.replace('_', '-')} is an option of LoRA, and --adapter is {config.adapter}: drop"
                " one of them"
            )


def add_adapter(base: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """The base with a new adapter of the kind that --adapter names, its random values drawn from --seed."""
    from transformers import set_seed

    set_seed(config.seed)
    return _kind(config.adapter).add(base, config)


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter that `folder` holds, of whatever kind; errors as the kind's library raises
    them."""
    peft_type = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    kind = next((kind for kind in _KINDS.values() if kind.peft_type == peft_type), _KINDS[DEFAULT])
    return kind.load(base, folder)


def planned_adapter(config: FinetuneConfig, shape: Shape) -> dict[str, Any]:
    """What the planner's RunOptions say of the adapter on a model of this shape.

    Raises: InputError for an adapter that the planner does not know, with the reason.
    """
    return _kind(config.adapter).planned(config, shape)


def adapter_title(config: FinetuneConfig) -> str:
    """What a model card calls the adapter."""
    return "DoRA" if config.dora else _kind(config.adapter).title


def adapter_loader(config: FinetuneConfig) -> str:
    """The Python function that puts the saved adapter on its base."""
    return _kind(config.adapter).loader


def is_lora(config: FinetuneConfig) -> bool:
    """Whether LoRA's options apply."""
    return _kind(config.adapter) is _KINDS[DEFAULT]


def _kind(value: str) -> Kind:
    name = value.partition("[")[0]
    if name not in _KINDS:
        raise InputError(f"--adapter must be one of {', '.join(_KINDS)}; got {value!r}")
    return _KINDS[name]


# ---- LoRA


def add_lora(
    base: PreTrainedModel,
    config: FinetuneConfig,
    *,
    task_type: str | None = "CAUSAL_LM",
    trained: Sequence[str] = (),
) -> PeftModel:
    """The base with a new LoRA adapter; the modules that `trained` names are trained in full instead.

    Raises: InputError where there is no layer to adapt.
    """
    from peft import LoraConfig, get_peft_model

    excluded = [excluded_layers(base, config), *map(re.escape, trained)]
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(base, config),
        use_rslora=config.rslora,
        use_dora=config.dora,
        exclude_modules="|".join(f"({name})" for name in excluded if name) or None,
        modules_to_save=list(trained) or None,
        task_type=task_type,
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise InputError(
            f"no layer of {config.model} to adapt with --targets {' '.join(config.targets)}: {error}"
        ) from error
    if not any("lora_" in name for name, _ in model.named_parameters()):
        raise InputError(
            f"{config.model} has no linear layer to adapt: LoRA needs torch.nn.Linear (or 4-bit linear)"
            " layers"
        )
    return model


def _targets(base: PreTrainedModel, config: FinetuneConfig) -> str | list[str]:
    """PEFT's `target_modules` for --targets, each of which must be there: PEFT itself is content with one of
    several."""
    if config.targets == _OF_LORA["targets"]:
        return config.targets[0]
    names = [name for name, _ in base.named_modules()]
    absent = [
        target for target in config.targets if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if absent:
        import torch

        linear = {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        there = ", ".join(sorted(linear)) or "no linear layer"
        raise InputError(
            f"--targets {' '.join(absent)}: {config.model} has no layer of that name; it has {there}"
        )
    return list(config.targets)


def _planned_lora(config: FinetuneConfig, shape: Shape) -> dict[str, Any]:
    words, names = [t.rpartition(".")[2] for t in config.targets], {linear.name for linear in shape.linears}
    targets = tuple(words) if set(words) <= names else None  # all linears
    return {"rank": config.r, "targets": targets, "dora": config.dora, "dropout": config.dropout > 0}


def _load_peft(base: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


_KINDS: dict[str, Kind] = {
    DEFAULT: Kind(title="LoRA", peft_type="LORA", add=add_lora, load=_load_peft, planned=_planned_lora),
    **dict.fromkeys(
        bottleneck.NAMES,
        Kind(
            title="Bottleneck",
            peft_type="BOTTLENECK",
            loader="peftkern.adapters.bottleneck.BottleneckModel.from_pretrained",
            add=bottleneck.add,
            load=bottleneck.load,
            planned=bottleneck.planned,
            check=bottleneck.check,
        ),
    ),
    prefix.NAME: Kind(
        title="Prefix",
        peft_type="PREFIX_TUNING",
        loader="peftkern.adapters.prefix.load_prefix",
        add=prefix.add,
        load=prefix.load,
        planned=prefix.planned,
        check=prefix.check,
    ),
}
