"""Errors that the person at the command line can act on."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["InputError", "require"]


class InputError(ValueError):
    """Something in the command, the data or the model that the user can change; the message says how."""


def require(*names: str) -> list[ModuleType]:
    """Import the packages of the `finetune` extra, or say which are missing and how to get them."""
    modules, missing = [], []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            missing.append(name)
    if missing:
        raise ModuleNotFoundError(
            f"`peftkern finetune` needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "run pip install 'peftkern[finetune]'"
        )
    return modules
