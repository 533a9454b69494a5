"""`peftkern data`: rows in, report and filtered file out; bad input is one message and nothing
half-written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.any_isa

for _package in ("cleanlab", "datasketch", "matplotlib"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'peftkern[data]'")

from peftkern.__main__ import main  # noqa: E402
from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.data.checks import DataReport, check_texts  # noqa: E402
from peftkern.transfer.data.rows import read_data, row_text  # noqa: E402

GOOD = ["fine", "great", "lovely", "charming", "superb", "warm"]
BAD = ["awful", "dull", "poor", "boring", "weak", "cold"]


def sentence(words: list[str], draw: random.Random) -> str:
    filler = [f"w{draw.randrange(90)}" for _ in range(9)]
    return " ".join(draw.sample(words, 4) + filler)


def rows(count: int = 120, wrong: int = 6) -> list[dict[str, Any]]:
    """Labelled sentences; the first `wrong` have the other label, and the last three repeat others."""
    draw = random.Random(0)
    made = []
    for index in range(count):
        label = index % 2
        given = 1 - label if index < wrong else label
        made.append(
            {"text": sentence(GOOD if label else BAD, draw), "label": given, "source": f"doc{index // 4}"}
        )
    return made + [{**row, "text": row["text"] + "!"} for row in made[40:43]]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_report_and_filtered_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rows()
    data = write(tmp_path / "rows.jsonl", lines)
    held_out = write(
        tmp_path / "eval.jsonl", [{"text": lines[50]["text"]}, {"text": "something else altogether"}]
    )
    output, report = tmp_path / "new" / "clean.jsonl", tmp_path / "report"
    arguments = [
        data,
        "--eval-data",
        held_out,
        "--label",
        "label",
        "--filter",
        "duplicates",
        "overlap",
        "labels",
    ]
    assert main(["data", *arguments, "--output", str(output), "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert (
        "123 rows" in said
        and "3 of 123 rows (2.4%) repeat another" in said
        and "1 of 2 evaluation rows" in said
    )
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert f"{len(kept)} of 123 rows are in {output}" in said
    texts = {row["text"] for row in kept}
    assert len(texts & {row["text"] for row in lines[:6]}) <= 1  # the wrong labels
    assert (
        lines[50]["text"] not in texts
        and len(texts & {row["text"] for row in (*lines[40:43], *lines[120:])}) == 3
    )
    assert kept[0].keys() == {"text", "label", "source"}
    stored = json.loads((report / "report.json").read_text())
    suspects = {row["row"] for row in stored["checks"]["labels"]["rows"]}
    assert len(suspects & set(range(6))) >= 5 and len(suspects) < 12
    page = (report / "report.md").read_text()
    assert "## Labels" in page and "label 1, rather 0" in page and (report / "report.png").stat().st_size > 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["clean.jsonl"]


def test_labels_of_tables_are_read(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label,other\n" + "".join(f"{row['text']},{row['label']},x\n" for row in rows()))
    found = read_data([str(table)], label="label")
    assert found.labels[:2] == ("1", "0") and found.rows[0].keys() == {"text", "label"}


def test_what_a_row_says() -> None:
    assert row_text({"prompt": "a", "completion": "b"}) == "a\nb"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    assert row_text({"messages": [*turns, {"role": "assistant", "content": None, "tool_calls": []}]}) == "u"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "label", "--folds", "70"], "class 1 has 61 rows, fewer than 70 folds"),
        (
            ["--label", "label", "--group", "source", "--folds", "40"],
            "there are 30 documents, fewer than 40 folds",
        ),
        (["--label", "mood"], "rows.jsonl:1: has no 'mood' but the keys text, label, source"),
        (
            ["--filter", "labels", "--output", "OUT"],
            "--filter labels: that check was not made; it needs --label",
        ),
        (
            ["--filter", "overlap", "--output", "OUT"],
            "--filter overlap: that check was not made; it needs --eval-data",
        ),
        (["--filter", "losses", "--output", "OUT"], "it needs --adapter or --model"),
        (
            ["--filter", "typos", "--output", "OUT"],
            "--filter must be of duplicates, overlap, labels, losses, dynamics; got 'typos'",
        ),
        (["--filter", "duplicates"], "--filter and --output go together"),
        (["--group", "source"], "--group is of the check of labels"),
        (["--threshold", "2"], "the threshold of near duplicates"),
        (["--filter", "duplicates", "--output", "DATA"], "is a file that is read"),
        (["--eval-data", "nowhere.jsonl"], "--eval-data nowhere.jsonl: no such file"),
        (["--filter", "overlap", "--output", "OUT", "--eval-data", "DATA"], "would leave none of 123 rows"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    data = write(tmp_path / "rows.jsonl", rows())
    places = {"OUT": str(tmp_path / "out.jsonl"), "DATA": data}
    assert main(["data", data, *(places.get(argument, argument) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_one_class_and_empty_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", [{**row, "label": 1} for row in rows()])
    assert main(["data", one, "--label", "label"]) == 2
    assert "a probe needs at least two classes" in capsys.readouterr().err
    empty = write(tmp_path / "empty.jsonl", [])
    assert main(["data", empty]) == 2
    assert "is empty: it needs at least one row" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = write(tmp_path / "rows.jsonl", rows()), tmp_path / "out" / "clean.jsonl"
    output.parent.mkdir()
    output.write_text("old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["data", data, "--filter", "duplicates", "--output", str(output)]) == 2
    assert output.read_bytes() == b"old" and len(list(output.parent.iterdir())) == 1


def test_reasons_come_in_the_order_of_the_checks() -> None:
    found = read_rows_of(["a b c d e f", "a b c d e f", "other words that nobody wrote before"])
    report = check_texts(found, ["a b c d e f"], run=3)
    assert list(report.made()) == ["duplicates", "overlap"]
    assert report.reasons(["duplicates", "overlap"])[1].startswith("near duplicate of row 0")
    assert report.reasons(["overlap", "duplicates"])[1] == "holds text of the evaluation"
    with pytest.raises(InputError, match="that check was not made"):
        DataReport(rows=found).reasons(["duplicates"])


def read_rows_of(texts: list[str]) -> Any:
    from peftkern.transfer.data.rows import DataRows

    made = tuple({"text": text} for text in texts)
    return DataRows(made, tuple(f"row {index}" for index in range(len(texts))), tuple(texts))
