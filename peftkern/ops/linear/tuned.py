"""Limits that `peftkern tune` measured on a card, kept per device; they stand before the table's row."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from ...files import cache_dir, write_json
from ...runtime import backends
from ...runtime.replay import forget as forget_records
from .config import GPUConfig

__all__ = ["crossover", "forget", "forced", "load", "path", "save", "settings", "use_row"]

_log = logging.getLogger(__name__)
_forced: GPUConfig | None = None


def forced() -> GPUConfig | None:
    """The row of the enclosing `use_row`."""
    return _forced


def settings() -> tuple[GPUConfig | None, str | None]:
    """What a GPU's plans depend on beside their arguments, and what can change within a process."""
    return _forced, backends.forced()


@contextlib.contextmanager
def use_row(row: GPUConfig) -> Iterator[None]:
    """Every GPU call of the process follows `row` within the block: for tuning, benchmarks and tests."""
    global _forced
    before, _forced = _forced, row
    try:
        yield
    finally:
        _forced = before


def path(device_name: str) -> Path:
    """The file of a device, e.g. <cache>/tune/nvidia-geforce-rtx-4090.json."""
    return cache_dir() / "tune" / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@functools.cache
def load(device_name: str) -> GPUConfig | None:
    """The measured row of a device; None where there is none, or where the file does not fit this version (a
    warning names the fix)."""
    file = path(device_name)
    try:
        row = json.loads(file.read_text())["config"]
        return _checked(row)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not a tuning file of this version (%s); run: peftkern tune", file, error)
        return None


def _checked(row: Mapping[str, object]) -> GPUConfig:
    if not isinstance(row, dict):
        raise TypeError(f"config is {type(row).__name__}")
    wanted = {field.name: str if field.name in ("gemm", "measured") else int for field in fields(GPUConfig)}
    wanted["fused_by_shape"] = list
    if row.keys() != wanted.keys() or any(type(row[name]) is not kind for name, kind in wanted.items()):
        raise ValueError(f"got the fields {sorted(row)}, expected {sorted(wanted)}")
    if row["gemm"] not in ("cublas", "triton") or row["slab_bytes"] < 1 << 20:
        raise ValueError(f"got gemm {row['gemm']!r}, slab_bytes {row['slab_bytes']}")
    shapes = tuple(map(tuple, row["fused_by_shape"]))
    if any([type(size) for size in one] != [int] * 3 or min(one[:2]) < 1 for one in shapes):
        raise ValueError(f"got fused_by_shape {row['fused_by_shape']}, expected [N, K, limit] of each shape")
    return GPUConfig(**row | {"fused_by_shape": shapes})


def save(device_name: str, row: GPUConfig, timings: Mapping[str, float], versions: Mapping[str, str]) -> Path:
    """Write a row with what it was derived from; later calls of this process see it."""
    file = path(device_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {
            "device": device_name,
            "config": asdict(row),
            "milliseconds": dict(timings),
            "versions": dict(versions),
        },
    )
    _changed()
    return file


def forget(device_name: str) -> None:
    """Back to the table's row."""
    path(device_name).unlink(missing_ok=True)
    _changed()


def _changed() -> None:
    """Rows are read again, and plans are made anew."""
    load.cache_clear()
    forget_records()


def crossover(sizes: list[int], first: list[float], second: list[float]) -> int:
    """The largest size up to which `first` is the faster at every measured size; 0 where it loses at the
    smallest.

    A single loss between wins is noise below 2 %: it does not end the range.
    """
    best = 0
    for size, a, b in zip(sizes, first, second, strict=True):
        if a > 1.02 * b:
            break
        if a <= b:
            best = size
    return best
