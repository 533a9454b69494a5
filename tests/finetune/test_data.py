"""Data files good and bad; every message names the place and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import InputError
from peftkern.finetune.data import data_kind, fingerprint, load_data, split
from peftkern.finetune.rows import decode_row

from .conftest import write_jsonl

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"text": "a"}, {"text": "b"}], "text"),
        ([{"prompt": "a", "completion": "b"}], "prompt"),
        ([{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}], "prompt"),
        ([{"messages": MESSAGES}], "messages"),
    ],
)
def test_jsonl_forms(tmp_path: Path, rows: list[Any], kind: str) -> None:
    dataset = load_data(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert data_kind(dataset) == kind
    assert list(map(decode_row, dataset)) == rows
    assert [place.rpartition(":")[2] for place in dataset["place"]] == [str(i + 1) for i in range(len(rows))]


def test_other_keys_are_dropped_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "id": 1}\n\n{"text": "b", "id": "x"}\n')
    assert list(map(decode_row, load_data(str(path)))) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: it needs at least one row"),
        ("\n \n", "is empty"),
        ('{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON .*column"),
        ('{"text": "a"}\n["b"]\n', r"bad\.jsonl:2: a row must be a JSON object .* got list"),
        ('{"txt": "a"}\n', r"bad\.jsonl:1: .* exactly one of .*; got the keys txt"),
        ("{}\n", r"bad\.jsonl:1: .* got the keys none"),
        ('{"text": "a", "messages": []}\n', r"bad\.jsonl:1: .* got the keys text, messages"),
        (
            '{"text": "a"}\n\n{"prompt": "a", "completion": "b"}\n',
            r"bad\.jsonl:3: this row has prompt, completion but .*bad\.jsonl:1 has text",
        ),
        ('{"text": 3}\n', r"bad\.jsonl:1: 'text' must be a string, got 3"),
        ('{"messages": [{"content": "a"}]}\n', r"bad\.jsonl:1: 'messages' must be a list of .*role"),
        ('{"messages": []}\n', r"bad\.jsonl:1: 'messages' must be a list"),
        (
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}\n',
            r"bad\.jsonl:1: .* both be strings or both",
        ),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_data(str(path))


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n\xe9t\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt:2: not UTF-8"):
        load_data(str(path))


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert list(map(decode_row, load_data(str(path)))) == [{"text": "a"}]


def test_missing_file_and_strange_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--eval-data .*nowhere: no such file"):
        load_data(str(tmp_path / "nowhere"), option="--eval-data")
    with pytest.raises(InputError, match="save_to_disk"):
        load_data(str(tmp_path))


def test_folder_of_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"text": "a", "id": 1}])
    DatasetDict(train=rows).save_to_disk(tmp_path / "good")
    DatasetDict(test=rows).save_to_disk(tmp_path / "no-train")
    rows.select([]).save_to_disk(tmp_path / "none")
    assert list(map(decode_row, load_data(str(tmp_path / "good")))) == [{"text": "a"}]
    with pytest.raises(InputError, match="no split named train but test"):
        load_data(str(tmp_path / "no-train"))
    with pytest.raises(InputError, match="is empty: it needs at least one row"):
        load_data(str(tmp_path / "none"))


def test_plain_text_keeps_every_character(text_file: str) -> None:
    rows = load_data(text_file)
    assert len(rows) >= 10
    assert "".join(rows["text"]) == Path(text_file).read_text()


def test_split_is_a_partition_and_depends_on_the_seed_only(tmp_path: Path) -> None:
    dataset = load_data(write_jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(50)]))
    train, held_out = split(dataset, fraction=0.1, seed=3)
    assert len(held_out) == 5 and sorted([*train["text"], *held_out["text"]], key=int) == dataset["text"][:]
    assert (
        split(dataset, fraction=0.1, seed=3)[1]["text"][:]
        == held_out["text"][:]
        != split(dataset, fraction=0.1, seed=4)[1]["text"][:]
    )
    with pytest.raises(InputError, match="one row only.*--eval-data"):
        split(dataset.select([0]), fraction=0.1, seed=3)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": "a"}])
    first = fingerprint(str(path))
    assert fingerprint(str(path)) == first
    write_jsonl(path, [{"text": "b"}])
    assert fingerprint(str(path)) != first
