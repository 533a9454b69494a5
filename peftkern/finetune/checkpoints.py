"""Checkpoints on disk: written whole with their checksums, read only when every part of them is sound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from .errors import InputError

__all__ = ["Checkpoint", "checkpoints", "newest_sound", "write_checksums"]

_CHECKSUMS = "checksums.json"
_ADAPTER, _STATE = "adapter_model.safetensors", "trainer_state.json"
_PICKLED = ("optimizer.pt", "scheduler.pt")
_RANDOM = ("rng_state.pth", "rng_state_0.pth")  # of one process, of the first of several


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its folder, the step after which it was written, and the trainer's state then."""

    path: Path
    step: int
    state: dict[str, Any]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; anything still under a temporary name is none."""
    complete = [
        path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest_sound(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be gone on from, None where there is none at all.

    A damaged one is named to `say`, and the one before it is taken; InputError where all are damaged.
    """
    damages = []
    for path in reversed(checkpoints(folder)):
        try:
            return _read(path)
        except _DamagedError as error:
            damages.append(f"{path} is damaged ({error})")
            say(f"{damages[-1]}: going on from the checkpoint before it, if there is one.")
    if damages:
        raise InputError(
            f"--resume: no checkpoint is sound: {'; '.join(damages)}. Remove {folder} to train from "
            "the first step again, "
            "or start again with --overwrite"
        )
    return None


def write_checksums(folder: Path) -> None:
    """Note the SHA-256 of every file of a checkpoint in it."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != _CHECKSUMS]
    write_json(folder / _CHECKSUMS, {path.name: _sha256(path) for path in files})


class _DamagedError(Exception):
    """What is wrong with a checkpoint."""


def _read(path: Path) -> Checkpoint:
    for name in (_ADAPTER, *_PICKLED, _STATE):
        if not (path / name).is_file():
            raise _DamagedError(f"{name} is missing")
    random = [file.name for file in sorted(path.glob("rng_state*.pth"))]
    if not set(_RANDOM) & set(random):
        raise _DamagedError(f"{_RANDOM[0]} is missing")
    _check_sums(path)
    state = _json(path / _STATE)
    step = state.get("global_step")
    if not isinstance(step, int) or step < 1:
        raise _DamagedError(f"{_STATE} tells no step")
    _check_adapter(path / _ADAPTER)
    for name in (*_PICKLED, *random):
        _check_pickle(path / name)
    return Checkpoint(path, step, state)


def _check_sums(path: Path) -> None:
    if not (path / _CHECKSUMS).exists():
        return  # written before checksums were
    for name, expected in _json(path / _CHECKSUMS).items():
        file = path / Path(name).name
        if not file.is_file():
            raise _DamagedError(f"{name} is missing")
        if _sha256(file) != expected:
            raise _DamagedError(f"{name} is not as it was written")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise _DamagedError(f"{path.name} holds no JSON object")
    return value


def _check_adapter(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if not list(file.keys()):
                raise _DamagedError(f"{path.name} holds no weights")
    except (SafetensorError, OSError) as error:
        raise _DamagedError(f"{path.name}: {error}") from None


def _check_pickle(path: Path) -> None:
    """Load it as the trainer does: tensors and plain values only, never code."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile pickle raises is of many types
        reason = str(error).strip().splitlines()
        raise _DamagedError(
            f"{path.name} cannot be read safely: {reason[0] if reason else type(error).__name__}"
        ) from None
    if not isinstance(value, dict):
        raise _DamagedError(f"{path.name} holds no state")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
