"""Errors that the person at the command line can act on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

__all__ = ["InputError", "exit_status", "require"]


class InputError(ValueError):
    """Something in the command, the data or the model that the user can change; the message says how."""


def require(*names: str, extra: str = "finetune") -> None:
    """Say which packages of the extra are missing and how to get them; imports none, so that it is quick."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f"`peftkern finetune` needs {', '.join(missing)}, which {verb} not installed: run pip install"
            f" 'peftkern[{extra}]'"
        )


def exit_status(
    name: str,
    command: Callable[[], int | None],
    *,
    interrupted: str = "",
    worded: Callable[[Exception], str] = str,
    mendable: tuple[type[Exception], ...] = (InputError,),
) -> int:
    """Run the sub-command `name` and give its exit status: what the user can mend is one message, and status
    2.

    Args:
        command: returns a status; None: 0.
        interrupted: what is said where Ctrl-C ends it. An interruption with a `status` of its own says
            itself.
        worded: an error's message.
        mendable: errors for the user, beside those of files, memory and missing packages; others are a
            traceback.
    """
    try:
        return command() or 0
    except KeyboardInterrupt as error:
        text = f"{error}." if hasattr(error, "status") else interrupted
        if text:
            print(f"\n{text}", file=sys.stderr)
        return getattr(error, "status", 130)
    except (*mendable, OSError, MemoryError, ModuleNotFoundError) as error:
        print(f"peftkern {name}: error: {worded(error)}", file=sys.stderr)
        return 2
