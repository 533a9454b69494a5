"""`peftkern report`, from the command line to the page."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from peftkern.__main__ import main

from ...finetune.conftest import tiny_model  # noqa: F401 (a fixture)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name][:1500]}) + "\n" for name in sorted(topics)[:40]))
    return str(path)


def arguments(model: str, data: str, output: Path, *more: Any) -> list[str]:
    named = ["--model", model, "--data", data, "--output", str(output), "--seq-length", "64", "--dtype", "fp32"]
    return ["report", *named, *map(str, more)]


def test_what_there_is_no_time_for_is_said(tiny_model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    output = tmp_path / "report.md"
    assert main(arguments(tiny_model, data, output, "--minutes", 1e-6)) == 0
    text = output.read_text()
    assert text.count("Not measured: the 1e-06 minutes of --minutes were over.") >= 3
    command = f"peftkern finetune --model {tiny_model} --data {data}"
    assert command in text and command in capsys.readouterr().out


@pytest.mark.slow
def test_every_section_is_measured(tiny_model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    output = tmp_path / "report.html"
    assert main(arguments(tiny_model, data, output, "--steps", 4, "--arms", 2, "--lr", 5e-3)) == 0
    text = output.read_text()
    assert "Not measured" not in text and text.count("data:image/png") >= 3
    for name in ("proxy A-distance of characters", "bits a byte of LZMA", "gain of training all layers", "its forecast"):
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
    tiny_model: str,  # noqa: F811
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(tiny_model, data, tmp_path / "report.html", *more)) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "report.html").exists()
