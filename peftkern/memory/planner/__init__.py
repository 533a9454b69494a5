"""What a training run will need, before it is started: every part as data, phase by phase, from a config
alone.

`read_shape` gives a model's sizes, `predict` the peak of a run on a card in bytes, `plan` the whole table
with what fits, how long a step takes and what to change, `choose` the cheapest options that fit a budget.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "Card",
    "Limits",
    "Part",
    "Plan",
    "RunOptions",
    "Shape",
    "choose",
    "llama_shape",
    "plan",
    "predict",
    "read_shape",
]

_HOMES = {
    "Limits": "budgets",
    "Card": "cards",
    "Part": "ledger",
    "Plan": "plan",
    "RunOptions": "options",
    "Shape": "shapes",
    "choose": "choose",
    "llama_shape": "shapes",
    "plan": "plan",
    "predict": "plan",
    "read_shape": "shapes",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
