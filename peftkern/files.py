"""Files and folders that are either whole or absent, whatever kills the process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TEMP_PREFIX", "atomic_directory", "atomic_files", "cache_dir", "clear_temporaries", "remove_directory", "write_json"]

TEMP_PREFIX = ".incomplete-"


def cache_dir() -> Path:
    """Folder of downloaded and converted files: PEFTKERN_CACHE, else ~/.cache/peftkern."""
    return Path(os.environ.get("PEFTKERN_CACHE") or Path.home() / ".cache" / "peftkern")


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; it is synced and renamed to `final` on success, removed on failure.

    Writers report a full disk in many ways (OSError, RuntimeError, safetensors' own error); all leave here as OSError.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMP_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        if final.exists():
            remove_directory(final)
        os.replace(temporary, final)
    except Exception as error:
        raise OSError(
            f"could not write {final}: {error}. Nothing incomplete was left there. "
            "Check the free disk space, the quota and the permissions of that folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move into `folder`, each in one step, once all are complete."""
    with atomic_directory(folder / "files") as temporary:
        yield temporary
    for path in (folder / "files").iterdir():
        os.replace(path, folder / path.name)
    (folder / "files").rmdir()


def remove_directory(path: Path) -> None:
    """Remove a folder so that no moment shows it half-empty under its own name."""
    doomed = path.parent / f"{TEMP_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_temporaries(folder: Path) -> None:
    """Remove what a killed run left behind in `folder`."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    temporary = path.with_name(f"{TEMP_PREFIX}{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}. Check the free disk space and the permissions") from error
