"""Kinds of data files: each is read as what it is, or refused with the way to go; what is wrong is named by
file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import InputError
from peftkern.finetune.data import data_kind, evaluation_names, load_data
from peftkern.finetune.rows import decode_row

from .conftest import write_jsonl

ROWS = [
    {"prompt": "one, two", "completion": 'he said "three"\nand four'},
    {"prompt": "ä €", "completion": "𝄞"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "x"}}}
CHATS = [
    {
        "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        "tools": [{"name": "f"}],
    },
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ]
    },
]


def read(path: Path | str) -> list[dict[str, Any]]:
    return [decode_row(row) for row in load_data(str(path))]


def table(rows: list[dict[str, str]], separator: str) -> str:
    quoted = [[key, *('"' + row[key].replace('"', '""') + '"' for row in rows)] for key in rows[0]]
    return "".join(separator.join(line) + "\n" for line in zip(*quoted, strict=True))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet as module

    module.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("ROWS.JSONL", LINES),
        ("rows.ndjson", LINES),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", LINES),
        ("rows", LINES),
        ("rows.txt", LINES),
        ("rows.csv", table(ROWS, ",")),
        ("rows.CSV", table(ROWS, ",")),
        ("rows.tsv", table(ROWS, "\t")),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)],
)
def test_the_same_rows_from_every_kind(
    tmp_path: Path, name: str, content: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(content.encode()))
    assert read(path) == ROWS


def test_parquet_and_folders_give_chats_without_invented_keys(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(CHATS).save_to_disk(tmp_path / "folder")
    for path in (
        parquet(tmp_path / "rows.parquet", CHATS),
        tmp_path / "folder",
        Path(write_jsonl(tmp_path / "rows.jsonl", CHATS)),
    ):
        assert read(path) == CHATS
        assert data_kind(load_data(str(path))) == "messages"


def test_text_of_an_unknown_kind_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "novel"
    path.write_text("once upon a time\n")
    assert read(path) == [{"text": "once upon a time\n"}]
    assert "novel is read as plain text" in capsys.readouterr().err
    (tmp_path / "novel.txt").write_text("{ once }\n")
    read(tmp_path / "novel.txt")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.bin", gzip.compress(b"text", mtime=0), "is a gzip file: name it"),
        ("rows.data", b"PAR1 ...", "is a Parquet file: name it"),
        ("rows.xlsx", b"PK\x03\x04 ...", "a spreadsheet.*save it as .csv"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],
            r"rows\.jsonl\.gz: damaged after line \d+",
        ),
        ("rows.txt.gz", b"no gzip", r"rows\.txt\.gz: damaged after line 0"),
        ("rows.parquet", b"PAR1" * 9, r"rows\.parquet: no whole Parquet file"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", r"rows\.csv:3: 'completion' must be a string, got null"),
        ("rows.csv", b"text\na,b\n", r"rows\.csv:2: more cells than the first line has names"),
        ("rows.csv", b'text\n"a\n', r"rows\.csv:2: not CSV"),
        ("rows.csv", b"instruction,output\na,b\n", r"rows\.csv:2: .* got the keys instruction, output"),
        ("rows.csv", b"text\n\xff\n", r"rows\.csv:2: not UTF-8"),
        ("rows.json", b'[\n{"text": "a"},\n{"text" "b"}\n]', r"rows\.json:3: not JSON"),
        ("rows.json", b'[{"text": "a"}, {"text": 1}]', r"rows\.json, element 2: 'text' must be a string"),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text": "\\ud83d"}\n',
            r"rows\.jsonl:2: \\ud83d is half a surrogate pair",
        ),
        (
            "rows.jsonl",
            b'{"text": "a"}\n' + b"[" * 200_000,
            r"rows\.jsonl:2: lists and objects are nested too deeply",
        ),
        ("rows.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"rows\.jsonl:1: a number is too long"),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "user", "content": 1}]}',
            r"rows\.jsonl:1: 'content' must be a string or a list of parts",
        ),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
            r"rows\.jsonl:1: 'content' has a part that is no text",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_data(str(path))


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="write it to a file first"):
        load_data(str(tmp_path / "pipe.jsonl"))


def test_several_files_of_one_kind_are_one_dataset(tmp_path: Path) -> None:
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]),
        write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}]),
    )
    dataset = load_data((first, second))
    assert dataset["text"][:] == ["a", "b"] and dataset["place"][:] == [f"{first}:1", f"{second}:1"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "a"}, CHATS[0], "messages but .* has text"),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": CHATS[0]["messages"], "completion": CHATS[0]["messages"]},
            "prompt, completion as messages but",
        ),
    ],
)
def test_files_of_two_kinds_are_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    paths = write_jsonl(tmp_path / "a.jsonl", [first]), write_jsonl(tmp_path / "b.jsonl", [second])
    with pytest.raises(InputError, match=rf"b\.jsonl:1: this row has {message}"):
        load_data(paths)


def test_evaluation_files_of_one_stem_keep_apart() -> None:
    assert evaluation_names(("a/held.jsonl", "b/held.jsonl", "c/other.txt")) == {
        "a/held": "a/held.jsonl",
        "b/held": "b/held.jsonl",
        "other": "c/other.txt",
    }
    assert list(evaluation_names(("held.jsonl", "held.txt"))) == ["held.jsonl", "held.txt"]
    with pytest.raises(InputError, match=r"names a\.txt twice"):
        evaluation_names(("a.txt", "a.txt"))


def test_long_line_of_text_is_several_rows(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("word " * 100_000)
    rows = read(path)
    assert len(rows) > 3 and "".join(row["text"] for row in rows) == path.read_text()
