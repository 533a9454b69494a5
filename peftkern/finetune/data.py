"""Training and evaluation text: read, checked row by row, split."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .constants import SAMPLE
from .errors import InputError
from .readers import read_rows
from .rows import CHAT, check_row, decode_row, encode_row
from .sample import python_reference, sample_text
from .tables import write_table

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "PYTHON_REFERENCE",
    "data_kind",
    "evaluation_names",
    "fingerprint",
    "first_rows",
    "load_data",
    "split",
]

PYTHON_REFERENCE = "python-reference"


def load_data(source: str | Sequence[str], *, option: str = "--data") -> Dataset:
    """Read one source, or several of one kind, as one dataset.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet, plain text; all but Parquet also as .gz, .bz2 or
    .xz), a folder written by `datasets`, "sample" (its held-out books for --eval-data) or, for --eval-data,
    "python-reference". The columns are text, or prompt and completion, or chat (see `rows`), and place.
    Raises InputError naming file and line.
    """
    sources = (source,) if isinstance(source, str) else tuple(source)
    rows = _checked(sources, option)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{option} {' '.join(sources)} is empty: it needs at least one row of text")
    return write_table(_after(first, rows), _schema(tuple(first)))


def first_rows(
    source: str | Sequence[str], count: int, *, option: str = "--data"
) -> Iterator[dict[str, Any]]:
    """The first rows of what `load_data` reads, without reading the rest."""
    sources = (source,) if isinstance(source, str) else tuple(source)
    return (decode_row(row) for row in itertools.islice(_checked(sources, option), count))


def data_kind(dataset: Dataset) -> str:
    """ "text", "prompt" or "messages"; a chat of prompt and completion is of the kind "prompt"."""
    if CHAT not in dataset.column_names:
        return "text" if "text" in dataset.column_names else "prompt"
    return "messages" if "messages" in decode_row(dataset[0]) else "prompt"


def evaluation_names(sources: Sequence[str]) -> dict[str, str]:
    """A name for each evaluation source: its stem, or as much of its path as tells it from the others."""
    if len(set(sources)) < len(sources):
        raise InputError(
            f"--eval-data names {next(s for s in sources if sources.count(s) > 1)} twice: give it once"
        )
    return {_name(source, sources): source for source in sources}


def split(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a fraction of the rows, the same ones for the same seed; at least one row on either side."""
    if len(dataset) < 2:
        raise InputError("the data has one row only, so none can be held out: give more rows, or --eval-data")
    held_out = min(len(dataset) - 1, max(1, round(len(dataset) * fraction)))
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def fingerprint(source: str) -> str:
    """A short hash of what `source` holds, to notice on resumption that the data has changed."""
    path = Path(source)
    if source in (SAMPLE, PYTHON_REFERENCE):
        return source
    digest = hashlib.sha256()
    for file in sorted(path.glob("**/*.json")) if path.is_dir() else [path]:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _name(source: str, sources: Sequence[str]) -> str:
    """The shortest end of the path, first without suffix, that no other source shares."""
    parts = Path(source).parts
    for count in range(1, len(parts) + 1):
        for shorten in (lambda path: path.with_suffix(""), lambda path: path):
            names = [shorten(Path(*Path(other).parts[-count:])).as_posix() for other in sources]
            name = names[sources.index(source)]
            if names.count(name) == 1:
                return name
    return source


def _after(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _schema(columns: tuple[str, ...]) -> Any:
    import pyarrow

    return pyarrow.schema([(name, pyarrow.string()) for name in columns])


def _checked(sources: Sequence[str], option: str) -> Iterator[dict[str, str]]:
    """The rows of all sources as columns of text; raises at the first that differs in form from the first of
    all."""
    expected: tuple[tuple[str, ...], str] | None = None
    for source in sources:
        for place, row in _source_rows(source, option):
            form = check_row(row, place)
            columns = encode_row(row, form, place)
            expected = expected or ((*form, *columns), place)
            if (*form, *columns) != expected[0]:
                raise InputError(_mixed(place, form, expected, CHAT in columns))
            yield columns | {"place": place}


def _mixed(place: str, form: tuple[str, ...], expected: tuple[tuple[str, ...], str], chat: bool) -> str:
    def described(names: Sequence[str], chat: bool) -> str:
        return ", ".join(dict.fromkeys(name for name in names if name != CHAT)) + (
            " as messages" if chat and names[0] == "prompt" else ""
        )

    return (
        f"{place}: this row has {described(form, chat)} but {expected[1]} has "
        f"{described(expected[0], CHAT in expected[0])}: all rows of "
        "--data (and of each --eval-data) must be of one form; train on the others in a run of their own"
    )


def _source_rows(source: str, option: str) -> Iterator[tuple[str, Any]]:
    if source == SAMPLE:
        return ((SAMPLE, row) for row in sample_text(held_out=option == "--eval-data"))
    if source == PYTHON_REFERENCE:
        return ((PYTHON_REFERENCE, row) for row in python_reference(held_out=option != "--source-data"))
    return _file_rows(source, option)


def _file_rows(source: str, option: str) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        what = (
            f"is a link to {os.readlink(path)}, which does not exist"
            if os.path.islink(path)
            else "no such file or folder"
        )
        raise FileNotFoundError(
            f"{option} {source}: {what}; give a jsonl or text file, a datasets folder, or `{SAMPLE}`"
        )
    try:
        yield from read_rows(path, option)
    except OSError as error:
        raise InputError(
            f"{option} {source} cannot be read: {error.strerror or error}. Check its permissions and the disk"
        ) from error
