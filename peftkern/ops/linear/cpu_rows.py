"""The limits of this CPU: those that `peftkern tune` measured, kept per CPU and level, else the table's."""

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
from . import config
from .config import Config

__all__ = ["choose", "cpu_name", "forget", "load", "path", "read_again", "row", "save", "use_row"]

_log = logging.getLogger(__name__)
_forced: dict[str, Config] = {}


@functools.lru_cache(
    maxsize=4096
)  # a call's way to its kernel leads through here: no Python where it is known
def choose(*, dtype: str, isa: str, m: int, n: int, k: int, **options: bool | int) -> config.Choice:
    """`config.choose` by this CPU's limits."""
    return config.choose(dtype=dtype, isa=isa, m=m, n=n, k=k, row=row(isa), **options)


def row(isa: str) -> Config:
    """Of a level: the row of the enclosing `use_row`, the measured one, the table's."""
    return _forced.get(isa) or load(isa) or config.TABLE.get(isa, config.TABLE["baseline"])


@contextlib.contextmanager
def use_row(isa: str, limits: Config) -> Iterator[None]:
    """Every call of the process on this level follows `limits` within the block: for tuning and tests."""
    before = _forced.get(isa)
    _forced[isa] = limits
    choose.cache_clear()
    try:
        yield
    finally:
        _forced.pop(isa)
        if before is not None:
            _forced[isa] = before
        choose.cache_clear()


@functools.cache
def cpu_name() -> str:
    """What kinds of CPU are told apart by, e.g. "GenuineIntel 6 207"; virtual machines hide the model's
    name."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return "unknown"
    told = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    return " ".join(told.values()) or "unknown"


def path(isa: str) -> Path:
    """The file of this CPU on a level, e.g. <cache>/tune/genuineintel-6-207-amx.json."""
    return (
        cache_dir() / "tune" / f"{re.sub(r'[^a-z0-9]+', '-', f'{cpu_name()} {isa}'.lower()).strip('-')}.json"
    )


@functools.cache
def load(isa: str) -> Config | None:
    """The measured row of this CPU; None where there is none, or where the file does not fit this version (a
    warning names the fix)."""
    file = path(isa)
    try:
        return _checked(json.loads(file.read_text())["config"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not a tuning file of this version (%s); run: peftkern tune --cpu", file, error)
        return None


def _checked(values: Mapping[str, object]) -> Config:
    names = {field.name for field in fields(Config)}
    if not isinstance(values, dict) or values.keys() != names:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"got the fields {found}, expected {sorted(names)}")
    kinds = {"gemv_max_m": int, "slice_rows": int, "vendor": list, "measured": str, "attention": bool}
    kinds |= {"dense_vendor": dict, "tiles": dict, "loss": bool}
    if any(type(values[name]) is not kind for name, kind in kinds.items()):
        raise ValueError(f"got {values}")
    dtypes = {"float32", "bfloat16", "float16"}
    limits = [
        *values["tiles"].values(),
        *(limit for limit in values["dense_vendor"].values() if limit is not None),
    ]
    if values["dense_vendor"].keys() != dtypes or not {*values["vendor"], *values["tiles"]} <= dtypes:
        raise ValueError(f"got dtypes {values['dense_vendor']}, {values['vendor']}, {values['tiles']}")
    if any(type(limit) is not int or limit < 0 for limit in (*limits, values["gemv_max_m"])):
        raise ValueError(f"got a limit that is no row count in {values}")
    if values["slice_rows"] < 1:
        raise ValueError(f"got slice_rows {values['slice_rows']}")
    return Config(**values | {"vendor": tuple(values["vendor"])})


def save(isa: str, limits: Config, timings: Mapping[str, float], versions: Mapping[str, str]) -> Path:
    """Write a row with what it was derived from; later calls of this process see it."""
    file = path(isa)
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"device": cpu_name(), "level": isa, "config": asdict(limits), "milliseconds": dict(timings)}
    write_json(file, told | {"versions": dict(versions)})
    read_again()
    return file


def forget(isa: str) -> None:
    """Back to the table's row."""
    path(isa).unlink(missing_ok=True)
    read_again()


def read_again() -> None:
    """Files and answers are looked up anew: another cache folder, say, or a file that was written to."""
    load.cache_clear()
    choose.cache_clear()
