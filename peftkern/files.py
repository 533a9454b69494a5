"""Files and folders that are either whole or absent, whatever kills the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "TEMP_PREFIX",
    "LockedError",
    "atomic_directory",
    "atomic_files",
    "cache_dir",
    "clear_temporaries",
    "locked",
    "remove_directory",
    "replace",
    "write_json",
]

TEMP_PREFIX = ".incomplete-"


def cache_dir() -> Path:
    """Folder of downloaded and converted files: PEFTKERN_CACHE, else ~/.cache/peftkern."""
    return Path(os.environ.get("PEFTKERN_CACHE") or Path.home() / ".cache" / "peftkern")


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; it is synced and renamed to `final` on success, removed on
    failure.

    Writers report a full disk in many ways (OSError, RuntimeError, safetensors' own error); all leave here as
    OSError.
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
    complete = folder / f"{TEMP_PREFIX}files"
    with atomic_directory(complete) as temporary:
        yield temporary
    for path in complete.iterdir():
        replace(path, folder / path.name)
    complete.rmdir()


def replace(source: Path, target: Path) -> None:
    """Move a file or a folder over what may be there under the name `target`."""
    if source.is_dir() and target.exists():
        remove_directory(target)
    os.replace(source, target)


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the operating system's lock on the file `path`, which exists for that time only.

    Raises LockedError where another process holds it, unless `wait`. The system frees the lock of a process
    that ends in any way, so that the file a killed one leaves behind blocks nobody. File systems without
    locks (some network mounts) lock nothing.
    """
    file = _open_locked(path, wait)
    try:
        with contextlib.suppress(OSError):  # a name for messages only: a full disk is for others to report
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _open_locked(path: Path, wait: bool) -> int:
    """The descriptor of the locked file."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise LockedError(f"{holder} is at work there") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(file)
                raise
        # The holder before may have removed the file between our opening and our locking it: then a new one
        # is the lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)


def remove_directory(path: Path) -> None:
    """Remove a folder so that no moment shows it half-empty under its own name."""
    doomed = path.parent / f"{TEMP_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_temporaries(folder: Path, name: str = "") -> None:
    """Remove what a killed run left behind in `folder`: everything, or what was to become `name`."""
    for path in folder.glob(f"{TEMP_PREFIX}{name}*"):
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
        raise OSError(
            f"could not write {path}: {error}. Check the free disk space and the permissions"
        ) from error
