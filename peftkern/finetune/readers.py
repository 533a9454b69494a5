"""Rows of data files, one at a time, each with the place it came from: JSON lines, JSON, CSV, Parquet, plain
text, `datasets` folders."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .rows import COLUMNS, form_of, without_nulls

__all__ = ["read_rows"]

_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_TEXT = {".txt", ".text", ".md", ".rst"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# How files begin that would otherwise be read as text.
_MAGIC = {
    b"\x1f\x8b": "a gzip file: name it .jsonl.gz, .csv.gz or .txt.gz",
    b"PAR1": "a Parquet file: name it .parquet",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it with `zstd -d`",
    b"ARROW1": "an Arrow file: give the folder that datasets' save_to_disk wrote, or save it as .parquet",
}
_CHUNK = (
    65536  # characters of a row of a plain text file: rows are shuffled, and one long string tokenizes slowly
)

Row = tuple[str, Any]  # the place, such as "rows.jsonl:3", and what stands there


def read_rows(path: Path, option: str, *, also: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a file or folder, unchecked, each with its place; raises InputError for what cannot be read
    as such.

    Of tables the columns that the recipe knows are read, and those of `also` (a label).
    """
    columns = (*COLUMNS, *also)
    if path.is_dir():
        return _read_folder(path, option, columns)
    if not path.is_file():
        raise InputError(
            f"{option} {path} is a pipe or a device, which can be read only once: write it to a file first"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    lines = _lines(path, _OPENERS.get(compression, open))
    if suffix in _SEPARATED:
        return _read_separated(path, lines, _SEPARATED[suffix], columns)
    if suffix in _JSON_LINES:
        return (
            _read_array(path, lines)
            if suffix == ".json" and _starts_array(path, compression)
            else _read_json_lines(path, lines)
        )
    return _read_unnamed(path, option, compression, suffix)


def _read_unnamed(path: Path, option: str, compression: str, suffix: str) -> Iterator[Row]:
    """A file whose name promises text or nothing: JSON lines if its first line is a row of data, else plain
    text."""
    opener = _OPENERS.get(compression, open)
    with path.open("rb") as file:
        head = file.read(8)
    for magic, advice in _MAGIC.items() if not compression else ():
        if head.startswith(magic):
            raise InputError(f"{option} {path} is {advice}")
    if _first_line_is_row(path, opener):
        print(f"{option} {path} holds JSON lines and is read as such.", file=sys.stderr)
        return _read_json_lines(path, _lines(path, opener))
    if suffix not in _TEXT:
        print(
            f"{option} {path} is read as plain text (the names of other kinds end in .jsonl, .json, .csv,"
            " .tsv or .parquet).",
            file=sys.stderr,
        )
    return _read_text(path, _lines(path, opener))


def _lines(path: Path, opener: Callable[..., Any]) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; the byte-order mark is no part of the first."""
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: damaged after line {number} ({error}): compress or copy the file again"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: not JSON ({error.msg}, column {error.colno}): every line must be one JSON object"
        ) from error
    except RecursionError:
        raise InputError(
            f"{place}: lists and objects are nested too deeply to be read: flatten this row"
        ) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(
            f"{place}: a number is too long ({str(error).split(':')[0]}): write it as a string"
        ) from None


def _read_json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            place = f"{path}:{number}"
            yield place, _parse(line, place)


def _starts_array(path: Path, compression: str) -> bool:
    first = next((line for _, line in _lines(path, _OPENERS.get(compression, open)) if line.strip()), "")
    return first.lstrip().startswith("[")


def _read_array(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """The elements of one JSON list."""
    text = "".join(line for _, line in lines)
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}): mend it, or give JSON"
            " lines"
        ) from error
    except (RecursionError, ValueError):
        elements = _parse(text, str(path))
    for number, row in enumerate(elements, 1):
        yield f"{path}, element {number}", row


def _first_line_is_row(path: Path, opener: Callable[..., Any]) -> bool:
    line = next((line for _, line in _lines(path, opener) if line.strip()), "")
    try:
        form_of(_parse(line, ""), "")
    except InputError:
        return False
    return True


def _read_separated(
    path: Path, lines: Iterator[tuple[int, str]], separator: str, columns: tuple[str, ...]
) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; chats stand in their cells as JSON."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader((line for _, line in lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:
                raise InputError(
                    f"{place}: more cells than the first line has names"
                    f" ({', '.join(reader.fieldnames or ())}): quote the commas"
                )
            kept = {key: row[key] for key in columns if key in row} or dict(row)
            yield (
                place,
                {
                    key: _parse(cell, place) if key == "messages" and cell else cell
                    for key, cell in kept.items()
                },
            )
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.reader.line_num}: not CSV ({error}): mend the quotes of this row"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, known: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in known]
        form_of(dict.fromkeys(columns or file.schema_arrow.names), str(path))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: no whole Parquet file ({str(error).splitlines()[0]}): write or copy it again"
        ) from error


def _read_folder(path: Path, option: str, known: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a folder that `datasets` wrote; of several splits, those of train."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        message = (
            f"{option} {path} is a folder, but none that datasets' save_to_disk wrote: give such a folder, or"
            " files (FOLDER/*.jsonl)"
        )
        raise InputError(message) from error
    except IndexError:  # what `datasets` makes of a folder whose dataset has no rows
        return iter(())
    except Exception as error:  # Arrow, JSON and key errors of a damaged folder
        raise InputError(
            f"{option} {path} cannot be loaded by datasets ({type(error).__name__}: {error}): save it again"
        ) from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise InputError(
                f"{option} {path} has no split named train but {', '.join(dataset)}: give the folder of one"
                " split"
            )
        dataset = dataset["train"]
    columns = [name for name in dataset.column_names if name in known]
    form_of(dict.fromkeys(columns or dataset.column_names), str(path))
    return (
        (f"{path}, row {number}", without_nulls(row))
        for number, row in enumerate(dataset.select_columns(columns), 1)
    )


def _read_text(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """Rows of whole lines (a longer line is cut), at most a twentieth of a small file each so that some can
    be held out."""
    size = path.stat().st_size
    target = min(_CHUNK, max(min(2000, size // 4), size // 20))
    chunk, start = "", 1
    for number, line in lines:
        chunk += line
        while len(chunk) >= target:
            end = len(chunk) if len(chunk) <= 2 * _CHUNK else _CHUNK
            yield f"{path}:{start}", {"text": chunk[:end]}
            chunk, start = chunk[end:], number + (len(chunk) <= end)
    if chunk.strip():
        yield f"{path}:{start}", {"text": chunk}
