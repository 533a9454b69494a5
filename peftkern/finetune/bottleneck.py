"""--adapter bottleneck, and AdapterHub's names of bottleneck adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..adapters.bottleneck import BottleneckConfig
    from ..memory.planner.shapes import Shape
    from .config import FinetuneConfig

__all__ = ["NAMES", "add", "check", "load", "planned"]

_OF_R = "bottleneck"  # double_seq_bn whose width is --r
NAMES = (_OF_R, "double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn")


def check(config: FinetuneConfig) -> None:
    """Raise InputError where --adapter cannot be read, or --r does not apply."""
    made, default = _configuration(config), type(config).__dataclass_fields__["r"].default
    if config.r != default and made.size != config.r:
        raise InputError(
            f"--r {config.r} is the width of --adapter {_OF_R}; the width of {config.adapter} is the hidden"
            " size divided by its reduction_factor: drop --r, or write"
            f" {config.adapter.partition('[')[0]}[size={config.r}]"
        )


def add(base: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """The base with a new bottleneck adapter."""
    from ..adapters.bottleneck import get_bottleneck_model

    try:
        return get_bottleneck_model(base, _configuration(config), task_type="CAUSAL_LM")
    except ValueError as error:
        raise InputError(f"--adapter {config.adapter} does not fit {config.model}: {error}") from error


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with a saved bottleneck adapter."""
    from ..adapters.bottleneck import BottleneckModel

    return BottleneckModel.from_pretrained(base, folder)


def planned(config: FinetuneConfig, shape: Shape) -> dict[str, Any]:
    """The adapters as the planner counts them; InputError where its formulas do not hold."""
    from ..memory.planner.bottleneck import PLACES, Bottlenecks

    made = _configuration(config)
    places = tuple(place for place in PLACES if place in made.places)
    reason = _unplanned(made, places)
    if reason:
        raise InputError(
            f"--adapter {config.adapter}: the planner knows bottlenecks that are alike in all layers, of"
            f" which those that read the sum are the MLP's: {reason}"
        )
    trained = {"learned": 1, "channel": shape.hidden}
    found = Bottlenecks(
        size=made.size_at(0, shape.hidden),
        places=places,
        reads=made.reads,
        bias=made.bias,
        scaling=trained.get(made.scaling, 0),
        dropout=made.dropout > 0,
    )
    return {"rank": 0, "bottleneck": found}


def _unplanned(made: BottleneckConfig, places: tuple[str, ...]) -> str:
    """What of it the planner does not know; empty where it knows all."""
    if made.leave_out or isinstance(made.reduction_factor, Mapping):
        return "drop leave_out, and give one reduction_factor or size"
    if made.reads == "sum" and places != ("mlp",):
        return "drop mh_adapter, or write original_ln_before=False"
    return "drop modules_to_save" if made.modules_to_save else ""


def _configuration(config: FinetuneConfig) -> BottleneckConfig:
    from ..adapters.bottleneck import BottleneckConfig

    name, bracket, options = config.adapter.partition("[")
    try:
        made = BottleneckConfig.parse(f"double_seq_bn{bracket}{options}" if name == _OF_R else config.adapter)
    except ValueError as error:
        raise InputError(f"--adapter {config.adapter}: {error}") from None
    given: dict[str, Any] = {"dropout": config.dropout} if config.dropout else {}
    if name == _OF_R and made.size is None and "reduction_factor" not in options:
        given["size"] = config.r
    return dataclasses.replace(made, **given)
