"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) on a frozen 4-bit or dense base of any structure with
residual additions.

`add_bottleneck(model, "double_seq_bn")` puts one on any module in place; `get_bottleneck_model` gives a
`peft.PeftModel` for trainers. They are no linear maps of weights and cannot be merged into the base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attach import (
    add_bottleneck,
    bottleneck_disabled,
    bottleneck_parameters,
    remove_bottleneck,
    set_bottleneck,
)
from .config import BottleneckConfig
from .files import load_bottleneck, save_bottleneck
from .function import bottleneck
from .places import Place, find_places

if TYPE_CHECKING:
    from .peft_model import BottleneckModel, get_bottleneck_model

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "Place",
    "add_bottleneck",
    "bottleneck",
    "bottleneck_disabled",
    "bottleneck_parameters",
    "find_places",
    "get_bottleneck_model",
    "load_bottleneck",
    "remove_bottleneck",
    "save_bottleneck",
    "set_bottleneck",
]


def __getattr__(name: str) -> Any:
    """What needs PEFT is imported when it is asked for."""
    if name in ("BottleneckModel", "get_bottleneck_model"):
        from . import peft_model

        return getattr(peft_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
