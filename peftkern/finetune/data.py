"""Training and evaluation text: read, checked row by row, split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import SAMPLE
from .errors import InputError
from .sample import python_reference, sample_text

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PYTHON_REFERENCE", "data_kind", "fingerprint", "load_data", "split"]

PYTHON_REFERENCE = "python-reference"
_FORMS = (("text",), ("prompt", "completion"), ("messages",))
_FORMS_TEXT = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
_JSONL = {".jsonl", ".ndjson", ".json"}
_CHUNK = 65536  # characters of a row of a plain text file: rows are shuffled, and one long string tokenizes slowly


def load_data(source: str, *, option: str = "--data") -> Dataset:
    """Read `source` as a dataset with the columns text, or prompt and completion, or messages.

    `source` is a jsonl file, a plain text file, a folder written by `datasets`, "sample" (its held-out books for
    --eval-data) or, for --eval-data, "python-reference". Raises InputError naming file and line.
    """
    from datasets import Dataset

    path = Path(source)
    if source == SAMPLE:
        return Dataset.from_list(sample_text(held_out=option == "--eval-data"))
    if source == PYTHON_REFERENCE:
        return Dataset.from_list(python_reference())
    if path.is_dir():
        return _read_folder(path, option)
    if not path.exists():
        raise FileNotFoundError(f"{option} {source}: no such file or folder; give a jsonl or text file, a datasets folder, or `{SAMPLE}`")
    rows = list(_read_jsonl(path) if path.suffix in _JSONL else _read_text(path))
    if not rows:
        raise InputError(f"{option} {source} is empty: it needs at least one row of text")
    return Dataset.from_list(rows)


def data_kind(dataset: Dataset) -> str:
    """ "text", "prompt" or "messages"."""
    return next(form[0] for form in _FORMS if form[0] in dataset.column_names)


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
    files = sorted(path.glob("**/*.json")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}): save the file as UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one and the same form; keys that are no part of it are dropped."""
    expected = None
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not JSON ({error.msg}, column {error.colno}): every line must be one JSON object") from error
        form = _form(row, place)
        expected = expected or (form, number)
        if form != expected[0]:
            raise InputError(
                f"{place}: this row has {', '.join(form)} but line {expected[1]} has {', '.join(expected[0])}: "
                "all rows of a file must be of one form; put the others in a file of their own"
            )
        yield {key: row[key] for key in form}


def _form(row: Any, place: str) -> tuple[str, ...]:
    """Which of the three forms a row has; raises for none, several, or values of another type."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a JSON object such as {_FORMS_TEXT}, got {type(row).__name__}")
    matching = [form for form in _FORMS if all(key in row for key in form)]
    if len(matching) != 1:
        found = ", ".join(map(str, row)) or "none"
        raise InputError(f"{place}: a row must have the keys of exactly one of {_FORMS_TEXT}; got the keys {found}")
    form = matching[0]
    for key in form:
        value = row[key]
        good = _is_messages(value) if key == "messages" else isinstance(value, str) or (key != "text" and _is_messages(value))
        if not good:
            wanted = 'a list of {"role": ..., "content": ...}' if key == "messages" else "a string"
            raise InputError(f"{place}: {key!r} must be {wanted}, got {json.dumps(value)[:60]}")
    if len({type(row[key]) for key in form}) > 1:
        raise InputError(f"{place}: 'prompt' and 'completion' must both be strings or both be lists of messages")
    return form


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value)
    )


def _read_text(path: Path) -> Iterator[dict[str, str]]:
    """Rows of whole lines, at most a twentieth of a small file each so that some can be held out."""
    target = min(_CHUNK, max(2000, path.stat().st_size // 20))
    chunk = ""
    for _, line in _lines(path):
        chunk += line
        if len(chunk) >= target:
            yield {"text": chunk}
            chunk = ""
    if chunk.strip():
        yield {"text": chunk}


def _read_folder(path: Path, option: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        message = f"{option} {path} is a folder, but none that datasets' save_to_disk wrote: give such a folder, or a file"
        raise InputError(message) from error
    except IndexError:  # what `datasets` makes of a folder whose dataset has no rows
        raise InputError(f"{option} {path} has no rows: it needs at least one") from None
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise InputError(f"{option} {path} has no split named train but {', '.join(dataset)}: give the folder of one split")
        dataset = dataset["train"]
    return dataset.select_columns(list(_form(dataset[0], f"{path} (first row)")))
