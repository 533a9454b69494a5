"""The folders that an expression's names stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["folders_of"]


def folders_of(names: Iterable[str], given: Iterable[str]) -> dict[str, Path]:
    """The folder of every name; `given` holds NAME=PATH, a name without one is a folder itself."""
    named = {}
    for pair in given:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise ValueError(
                f"got {pair!r}, expected NAME=PATH, as a=runs/a (the expression comes first, in quotes)",
            )
        if name in named:
            raise ValueError(f"{name} is given two folders, {named[name]} and {path}")
        named[name] = path
    if unused := [name for name in named if name not in set(names)]:
        raise ValueError(
            f"{unused[0]}={named[unused[0]]} is not in the expression, which names {', '.join(names)}",
        )
    found = {name: Path(named.get(name, name)) for name in names}
    for name, folder in found.items():
        if not folder.is_dir():
            hint = "" if name in named else f"; say where it is with {name}=PATH"
            raise ValueError(f"there is no folder {folder}{hint}")
    return found
