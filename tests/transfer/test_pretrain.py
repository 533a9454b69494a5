"""The command: two runs on one budget, bits per byte of whole documents, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError
from peftkern.transfer.pretrain import continued_pretraining
from tests.finetune.conftest import save_tiny_model, write_jsonl

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def options(tiny_model: str, tmp_path: Path) -> dict[str, Any]:
    def rows(word: str, count: int, first: int = 0) -> list[dict[str, str]]:
        return [{"text": f"{word} {i:03d} " * (3 + i % 5)} for i in range(first, first + count)]

    return {
        "model": tiny_model,
        "data": write_jsonl(tmp_path / "target.jsonl", rows("target", 40)),
        "eval_data": write_jsonl(tmp_path / "held-out.jsonl", rows("target", 12, 40)),
        "output": str(tmp_path / "out"),
        "r": 8,
        "seq_length": 64,
        "batch_size": 2,
        "grad_accumulation": 1,
        "steps": 12,
        "save_steps": 4,
        "lr": 1e-2,
        "eval_tokens": 2000,
        "sample_tokens": 1,
        "dtype": "fp32",
        "quantization": "none",
        "patch": False,
        "document_boundaries": True,
    }


@pytest.fixture
def control(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "other.jsonl", [{"text": f"{i:03d}+OTHER=" * 4} for i in range(40)])


def test_target_text_does_more_than_other_text(options: dict[str, Any], control: str) -> None:
    report = continued_pretraining(FinetuneConfig(**options), (control,), quiet=True)
    assert list(report.arms) == ["before", "adapted", "control"] and report.steps == 12
    assert report.gain("adapted").low > 0.5 and "it is the target's text" in report.verdict
    folder = Path(options["output"])
    with (folder / "bits_per_byte.csv").open() as file:
        rows = list(csv.DictReader(file))
    total = sum(float(row["adapted"]) for row in rows) / sum(int(row["bytes"]) for row in rows)
    assert len(rows) == 12 and total == pytest.approx(report.arms["adapted"].per_byte.mean, rel=1e-4)
    assert (folder / "bits_per_byte.png").stat().st_size > 1000 and report.verdict in (
        folder / "report.md"
    ).read_text()
    steps = [
        json.loads((folder / arm / "result.json").read_text())["steps"] for arm in ("adapted", "control")
    ]
    assert steps == [12, 12]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    options: dict[str, Any], control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = continued_pretraining(FinetuneConfig(**options), (control,), quiet=True)
    from peftkern.finetune.trainer import RecipeTrainer

    class Killed(BaseException):
        pass

    step = RecipeTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "control" in self.args.output_dir and self.state.global_step == 6:
            raise Killed
        return step(self, *args, **kwargs)

    again = options | {"output": options["output"] + "-again"}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecipeTrainer, "training_step", killed)
        continued_pretraining(FinetuneConfig(**again), (control,), quiet=True)
    assert not (Path(again["output"]) / "report.md").exists()
    resumed = continued_pretraining(FinetuneConfig(**again, resume=True), (control,), quiet=True)
    assert resumed.arms == whole.arms


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_data": None}, "--eval-data is needed: held-out documents"),
        ({"data": [{"prompt": "a", "completion": "b"}] * 3}, "--data: pretraining needs rows of text"),
        (
            {"control_data": [{"prompt": "a", "completion": "b"}] * 3},
            "--control-data: pretraining needs rows of text",
        ),
        ({"eval_data": [{"text": "one document"}]}, r"--eval-data has 1 document\(s\), expected at least 2"),
        ({"control_data": "data"}, "is --data too: the control must be text of another domain"),
    ],
)
def test_bad_input_is_one_message(
    options: dict[str, Any],
    tmp_path: Path,
    changed: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {name: options[name] for name in ("model", "data", "eval_data", "output")}
    for name, rows in changed.items():
        values[name] = (
            write_jsonl(tmp_path / f"{name}-bad.jsonl", rows) if isinstance(rows, list) else values.get(rows)
        )
    arguments = ["pretrain"]
    for name, value in values.items():
        arguments += ["--" + name.replace("_", "-"), value] if value else []
    assert main([*arguments, "--steps", "2", "--quantization", "none"]) == 2
    lines = capsys.readouterr().err.splitlines()
    import re

    assert re.search("peftkern pretrain: error: .*" + message, lines[-1]), lines
    assert not Path(options["output"]).exists()


def test_the_control_is_not_the_target() -> None:
    with pytest.raises(InputError, match="is --data too"):
        continued_pretraining(FinetuneConfig(data="x.txt", eval_data="y.txt"), ("x.txt",))
