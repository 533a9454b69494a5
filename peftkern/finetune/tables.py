"""Rows in Arrow files that are mapped into memory, so that data larger than memory can be trained on."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import TEMP_PREFIX, cache_dir

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

__all__ = ["write_table"]

_BATCH = 256  # rows in memory at a time


def write_table(rows: Iterable[dict[str, Any]], schema: pyarrow.Schema) -> Dataset:
    """Write `rows` to a file of this process and return them as a dataset that maps it."""
    import pyarrow
    from datasets import Dataset

    path = _scratch_folder() / f"{uuid.uuid4().hex[:12]}.arrow"
    source = iter(rows)
    with contextlib.ExitStack() as opened:
        with _writing(path):
            file = opened.enter_context(pyarrow.OSFile(str(path), "wb"))
            stream = opened.enter_context(pyarrow.ipc.new_stream(file, schema))
        while batch := list(islice(source, _BATCH)):
            with _writing(path):
                stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
        with _writing(path):
            opened.close()
    return Dataset.from_file(str(path))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not write the rows of the data to {path}: {error}. Check the free disk space "
            "there, or let "
            "PEFTKERN_CACHE name a folder on a larger disk"
        ) from error


@functools.cache
def _scratch_folder() -> Path:
    """A folder for the tables of this process, removed when it ends; what killed processes left is removed
    first."""
    host = socket.gethostname()
    for parent in (cache_dir() / "data", Path(tempfile.gettempdir())):
        folder = parent / f"{TEMP_PREFIX}{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
        except OSError:
            continue
        for left in _abandoned(parent, host):
            shutil.rmtree(left, ignore_errors=True)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    raise OSError(
        f"neither {cache_dir()} nor {tempfile.gettempdir()} can be written: let PEFTKERN_CACHE name a "
        "folder that can"
    )


def _abandoned(parent: Path, host: str) -> Iterator[Path]:
    for path in parent.glob(f"{TEMP_PREFIX}{host}-*"):
        process = path.name.removeprefix(f"{TEMP_PREFIX}{host}-").partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            yield path


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
