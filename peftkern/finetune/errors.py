"""Errors that the person at the command line can act on."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["InputError", "require"]


class InputError(ValueError):
    """Something in the command, the data or the model that the user can change; the message says how."""


def require(*names: str, extra: str = "finetune") -> None:
    """Say which packages of the extra are missing and how to get them; imports none, so that it is quick."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f"`peftkern finetune` needs {', '.join(missing)}, which {verb} not installed: run pip install 'peftkern[{extra}]'"
        )
