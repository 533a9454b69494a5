"""Rows of data files with their text, label and document, as the checks look at them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...finetune.constants import SAMPLE
from ...finetune.readers import read_rows
from ...finetune.rows import check_row
from ...finetune.sample import sample_text

__all__ = ["DataRows", "read_data", "row_text"]


@dataclass(frozen=True)
class DataRows:
    """Rows as they were read, the place of each, its text, and where asked for its label and its document."""

    rows: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[Any, ...] | None = None
    groups: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)


def read_data(
    sources: Sequence[str],
    *,
    label: str | None = None,
    group: str | None = None,
    option: str = "--data",
) -> DataRows:
    """The rows of all sources, each a file or folder that `finetune` reads, or "sample".

    Args:
        label, group: the keys of a row's label and of the document it is from.
    Raises: InputError naming file and line for a row that is none, or that has no such key;
        FileNotFoundError.
    """
    keys = tuple(key for key in (label, group) if key is not None)
    found: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        for place, row in _source(source, keys, option):
            check_row(row, place)
            missing = next((key for key in keys if row.get(key) is None), None)
            if missing is not None:
                raise InputError(
                    f"{place}: has no {missing!r} but the keys {', '.join(map(str, row))}: "
                    "name the key of the label by --label "
                    "and of the document by --group, or label this row"
                )
            found.append((place, row))
    if not found:
        raise InputError(f"{option} {' '.join(sources)} is empty: it needs at least one row")
    places, rows = zip(*found, strict=True)
    labels, groups = (None if key is None else _values(rows, places, key) for key in (label, group))
    return DataRows(rows, places, tuple(map(row_text, rows)), labels, groups)


def row_text(row: Mapping[str, Any]) -> str:
    """What a row says: its text, prompt and completion, or its messages without the system's, which many rows
    share."""
    if "text" in row:
        return row["text"]
    if "messages" in row:
        return _said(row["messages"])
    return "\n".join(
        part if isinstance(part, str) else _said(part) for part in (row["prompt"], row["completion"])
    )


def _said(messages: Iterable[Mapping[str, Any]]) -> str:
    texts = []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "system" or content is None:
            continue
        texts.append(content if isinstance(content, str) else "".join(part["text"] for part in content))
    return "\n".join(texts)


def _values(rows: Sequence[dict[str, Any]], places: Sequence[str], key: str) -> tuple[Any, ...]:
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row[key], (str, int, float, bool)):
            raise InputError(f"{place}: {key!r} must be one string or number, got {type(row[key]).__name__}")
    kinds = {type(row[key]) for row in rows}
    # Labels of several types do not compare: then their texts stand for them.
    return tuple(row[key] if len(kinds) == 1 else str(row[key]) for row in rows)


def _source(source: str, keys: tuple[str, ...], option: str) -> Iterable[tuple[str, Any]]:
    if source == SAMPLE:
        return ((SAMPLE, row) for row in sample_text(held_out=option == "--eval-data"))
    if not os.path.exists(source):
        raise FileNotFoundError(
            f"{option} {source}: no such file or folder; give a file of rows, or `{SAMPLE}`",
        )
    return read_rows(Path(source), option, also=keys)
