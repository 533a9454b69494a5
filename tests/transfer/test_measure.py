"""`peftkern measure`, from the command line to the report: what it says, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftkern.__main__ import main

from ..finetune.conftest import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with 2 layers of width 64."""
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny-model")))


def _rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _sentences(n: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    words = {"sea": ["wave", "salt", "ship", "foam"], "hill": ["rock", "tree", "path", "crag"]}
    return [
        {"text": " ".join(rng.choice(words[label], 6)), "label": label, "document": index // 2}
        for index, label in enumerate(["sea", "sea", "hill", "hill"] * (n // 4))
    ]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return _rows(tmp_path / "rows.jsonl", _sentences())


def test_cut_reports_and_writes(
    tiny: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    options = ["--document-column", "document", "--folds", "3", "--repeats", "1", "--output", str(output)]
    assert main(["measure", "cut", "--model", tiny, "--data", data, *options]) == 0
    printed = capsys.readouterr().out
    assert "| depth | probe accuracy |" in printed and "a bag of words" in printed and "Cut " in printed
    assert (output / "cut.md").read_text() == printed and (output / "cut.png").stat().st_size > 5000
    assert sorted(path.name for path in output.iterdir()) == ["cut.md", "cut.png"]


def test_cut_by_training_needs_no_labels(
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = _rows(tmp_path / "texts.jsonl", [{"text": "waves and rocks " * 4} for _ in range(20)])
    options = ["--train", "--steps", "2", "--seeds", "2", "--max-length", "16", "--depths", "0", "1"]
    assert main(["measure", "cut", "--model", tiny, "--data", texts, *options]) == 0
    found = capsys.readouterr()
    assert "| from layer | held-out loss |" in found.out and "2 cuts x 2 seeds x 2 steps" in found.err


def test_cut_by_training_with_labels(
    tiny: str,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--train", "--steps", "2", "--seeds", "2", "--max-length", "16", "--depths", "0", "2"]
    assert main(["measure", "cut", "--model", tiny, "--data", data, *options]) == 0
    found = capsys.readouterr()
    assert "| from layer | held-out loss |" in found.out and "| 2 | " in found.out


def test_similarity(
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = _sentences(120)
    sea = _rows(tmp_path / "sea.jsonl", [row for row in rows if row["label"] == "sea"])
    hill = _rows(tmp_path / "hill.jsonl", [row for row in rows if row["label"] == "hill"])
    arguments = [
        "--model",
        tiny,
        "--source",
        sea,
        "--target",
        hill,
        "--folds",
        "3",
        "--max-length",
        "32",
        "--null-draws",
        "2",
    ]
    assert main(["measure", "similarity", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| A-distance, characters | 2.00 |" in printed and "bits a byte of the base" in printed


def test_negative(tiny: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "4", "--seeds", "2", "--rates", "1e-3", "--max-length", "16", "--depths", "1"]
    assert main(["measure", "negative", "--model", tiny, "--data", data, *options]) == 0
    found = capsys.readouterr()
    assert (
        "4 arms x (2 seeds x 4 steps" in found.err
        and "| first 1 |" in found.out
        and "| shuffled |" in found.out
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}] * 9, ["cut"], "has no column 'label', and probes need labels"),
        ([{"text": "a", "label": 1}] * 9, ["cut"], "all 9 labels are 1"),
        (
            [{"text": "a", "label": i % 2, "d": i % 3} for i in range(30)],
            ["cut", "--document-column", "d"],
            "3 documents, fewer than 5 folds",
        ),
        (
            [{"text": "a", "label": i % 2} for i in range(30)],
            ["cut", "--probe", "forest"],
            "--probe is 'forest'",
        ),
        (
            [{"text": "a", "label": i % 2} for i in range(30)],
            ["cut", "--depths", "7"],
            "--depths 7: the model has 2 layers",
        ),
        ([{"text": "a", "label": 1}, {"text": "b"}], ["cut"], "rows.jsonl:2: column 'label'"),
        ([{"word": "a", "label": 1}], ["cut"], "rows.jsonl:1: column 'text'"),
        ([{"text": "a", "label": 1}] * 9, ["negative"], "all 9 labels are 1"),
        (
            [{"text": "a b c", "label": i % 2} for i in range(40)],
            ["negative", "--budget", "0"],
            "more than the budget of 0 s",
        ),
        ([{"text": "a"}] * 9, ["negative"], "no text of --data"),
    ],
)
def test_bad_input_is_one_message(
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    options: list[str],
    message: str,
) -> None:
    path, output = _rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert (
        main(
            [
                "measure",
                options[0],
                "--model",
                tiny,
                "--data",
                path,
                "--output",
                str(output),
                *options[1:],
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert message in said and f"peftkern measure {options[0]}: error:" in said and "Traceback" not in said
    assert not output.exists()


def test_missing_files_are_named(
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = _rows(tmp_path / "few.jsonl", [{"text": "one two"}] * 4)
    assert (
        main(
            ["measure", "similarity", "--model", tiny, "--source", few, "--target", "nowhere.jsonl"],
        )
        == 2
    )
    assert "--target nowhere.jsonl: no such file" in capsys.readouterr().err
    assert main(["measure", "similarity", "--model", tiny, "--source", few, "--target", few]) == 2
    assert "4 documents, fewer than the 10" in capsys.readouterr().err
    rows = _rows(tmp_path / "rows.jsonl", _sentences())
    assert main(["measure", "cut", "--model", str(tmp_path), "--data", rows]) == 2
    assert "has no config.json" in capsys.readouterr().err
