"""`peftkern report`, from the command line to the page."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig
from peftkern.transfer.data.duplicates import near_duplicates
from peftkern.transfer.data.overlap import overlap
from peftkern.transfer.report import ReportOptions
from peftkern.transfer.report.build import recommended
from peftkern.transfer.report.data_section import DataFound, data_section
from peftkern.transfer.report.short_runs import ShortRun, ShortRuns

from ...finetune.conftest import tiny_model  # noqa: F401 (a fixture)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name][:1500]}) + "\n" for name in sorted(topics)[:40]))
    return str(path)


def arguments(model: str, data: str, output: Path, *more: Any) -> list[str]:
    named = [
        "--model",
        model,
        "--data",
        data,
        "--output",
        str(output),
        "--seq-length",
        "64",
        "--dtype",
        "fp32",
    ]
    return ["report", *named, *map(str, more)]


def test_what_there_is_no_time_for_is_said(
    tiny_model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.md"
    assert main(arguments(tiny_model, data, output, "--minutes", 1e-6)) == 0
    text = output.read_text()
    assert text.count("Not measured: the 1e-06 minutes of --minutes were over.") >= 3
    command = f"peftkern finetune --model {tiny_model} --data {data}"
    assert command in text and command in capsys.readouterr().out


@pytest.mark.slow
def test_every_section_is_measured(
    tiny_model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert main(arguments(tiny_model, data, output, "--steps", 4, "--arms", 2, "--lr", 5e-3)) == 0
    text = output.read_text()
    assert "Not measured" not in text and text.count("data:image/png") >= 3
    assert "Nothing wrong was found" in text
    for name in (
        "proxy A-distance of characters",
        "bits a byte of LZMA",
        "gain of training all layers",
        "its forecast",
    ):
        assert name in text
    assert "Where to cut?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output", "page.txt"), "ends in .html"),
        (("--minutes", "0"), "--minutes must be greater than 0"),
        (("--steps", "0"), "--steps and --arms must be at least 1"),
        (("--source-data", "nowhere.txt"), "--source-data nowhere.txt: no such file"),
    ],
)
def test_bad_options_are_one_message(
    more: tuple[str, ...],
    message: str,
    tiny_model: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(tiny_model, data, tmp_path / "report.html", *more)) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "report.html").exists()


def test_repeated_rows_and_leaks_speak_for_filters() -> None:
    words = [f"w{i * i % 811} v{i}" for i in range(60)]
    rows = [" ".join(words[i : i + 30]) for i in range(0, 30, 10)]
    found = DataFound(near_duplicates([*rows, rows[0]]), overlap(rows, [rows[1]]), separate=True)
    section = data_section(found)
    assert found.filters == ("duplicates", "overlap")
    assert section.verdict == "Mend it: rows repeat and the evaluation leaks." and len(section.plots) == 2
    clean = DataFound(near_duplicates(rows), overlap(rows, ["quite another text " * 10]), separate=True)
    assert clean.filters == () and "Nothing wrong" in data_section(clean).verdict
    split = DataFound(near_duplicates(rows), overlap(rows, [rows[1]]), separate=False)
    assert split.filters == ()  # the held-out rows change with every split


def test_the_command_names_what_was_measured(tmp_path: Path) -> None:
    before = ShortRun(0, (3.0, 3.1, 2.9), (2.0, 2.1, 1.9), 0.0)
    lost = (2.1, 2.21, 2.01)
    runs = ShortRuns(
        8, 10, before, (ShortRun(0, (2.0, 2.1, 1.9), lost, 1.0), ShortRun(4, (2.01, 2.11, 1.91), lost, 0.7))
    )
    config = FinetuneConfig(model="m", data=("a b.jsonl",), eval_data=("e.jsonl",))
    options = ReportOptions(source_data=("s.txt",), output=tmp_path / "x.html")
    command, reasons = recommended(config, options, runs, ("duplicates",))
    given = "peftkern finetune --model m --data 'a b.jsonl' --eval-data e.jsonl --first-layer 4"
    assert (
        command == f"{given} --source-data s.txt --forget-budget 0.02 --filter-data duplicates"
        and len(reasons) == 3
    )
    command, reasons = recommended(config, options, None)
    assert (
        command == "peftkern finetune --model m --data 'a b.jsonl' --eval-data e.jsonl"
        and "nothing measured" in reasons[0]
    )
