"""The command `adapt` on a tiny encoder: what it learns, reports, saves and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

from peftkern.__main__ import main  # noqa: E402
from tests.finetune.conftest import write_jsonl  # noqa: E402


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .test_masked import tokenizer

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer().save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def rows(count: int, *, domain: int, labelled: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """The class is in the first word, the domain in the others."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        label = index % 2
        others = torch.randint(20 + 20 * domain, 40 + 20 * domain, (3,), generator=generator).tolist()
        text = " ".join(f"w{word}" for word in [4 + label, 4 + label, *others])
        made.append({"text": text} | ({"label": ["bad", "good"][label]} if labelled else {}))
    return made


@pytest.fixture
def arguments(encoder: str, tmp_path: Path) -> dict[str, str]:
    return {
        "model": encoder,
        "data": write_jsonl(tmp_path / "source.jsonl", rows(120, domain=0)),
        "target-data": write_jsonl(tmp_path / "target.jsonl", rows(60, domain=1, labelled=False)),
        "test-data": write_jsonl(tmp_path / "test.jsonl", rows(40, domain=1, seed=1)),
        "output": str(tmp_path / "out"),
        "steps": "40",
        "lr": "0.02",
        "seq-length": "16",
    }


def run(arguments: dict[str, str]) -> int:
    return main(["adapt", *(part for name, value in arguments.items() for part in (f"--{name}", value))])


@pytest.mark.parametrize("method", ["dann", "mmd", "none"])
def test_it_trains_reports_and_saves(
    arguments: dict[str, str], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A strong adversary of so small a network takes the class along with the domain.
    assert run(arguments | {"method": method, "strength": "0.1"}) == 0
    said = capsys.readouterr().out
    accuracy = float(re.search(r"Accuracy on --test-data:  ([\d.]+)", said)[1])
    assert accuracy > 0.9 and "Target without labels:" in said and "held-out accuracy" in said
    assert "Classes lost" not in said
    folder = Path(arguments["output"])
    stored = json.loads((folder / "adapt.json").read_text())
    assert stored["labels"] == ["bad", "good"] and stored["method"] == method
    from peft import AutoPeftModelForSequenceClassification

    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    test = rows(40, domain=1, seed=1)
    with torch.no_grad():
        found = model(
            **tokenizer([row["text"] for row in test], padding=True, return_tensors="pt")
        ).logits.argmax(1)
    right = sum(["bad", "good"][i] == row["label"] for i, row in zip(found.tolist(), test, strict=True))
    assert right / 40 == pytest.approx(accuracy, abs=1e-3)


def test_lost_classes_are_named(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """An adversary that outweighs the task."""
    assert run(arguments | {"method": "dann", "strength": "30"}) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"held-out source rows:  ([\d.]+)", said)[1]) < 0.8
    assert re.search(r"Classes lost:  the commonest label alone is right in 0\.\d{3};.*--method mmd", said)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        (
            "data",
            rows(20, domain=0, labelled=False),
            "source-bad.jsonl:1: the row has no label: --data needs rows with text",
        ),
        (
            "data",
            [{"text": "w5", "label": "good"}] * 20,
            "--data: all 20 labels are 'good': it needs two classes",
        ),
        ("data", rows(8, domain=0), "--data has 8 rows, too few to hold out 4"),
        (
            "target-data",
            [{"words": "w5"}],
            "the row has no text: --target-data needs rows with the field text",
        ),
        ("target-data", [{"text": "w5"}], r"--target-data has 1 row\(s\), expected at least 2"),
        (
            "test-data",
            [{"text": "w5", "label": "odd"}],
            "--test-data has the label 'odd', which --data has not",
        ),
    ],
)
def test_bad_rows_are_one_message(
    arguments: dict[str, str],
    tmp_path: Path,
    option: str,
    content: list[Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments[option] = write_jsonl(tmp_path / "source-bad.jsonl", content)
    assert run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search("peftkern adapt: error: .*" + message, lines[-1]), lines
    assert not Path(arguments["output"]).exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "coral"}, "--method must be one of dann, mmd, none, got 'coral'"),
        ({"batch-size": "1"}, "--batch-size must be at least 2, got 1"),
        ({"strength": "nan"}, "--strength must be above 0 and finite"),
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: no such file or folder"),
        ({"model": "nowhere/none"}, "--model nowhere/none cannot be loaded"),
        ({"output": "."}, r"--output \. exists"),
    ],
)
def test_bad_options_are_one_message(
    arguments: dict[str, str], changed: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments | changed) == 2
    assert re.search("peftkern adapt: error: .*" + message, capsys.readouterr().err.splitlines()[-1])
