"""`peftkern arithmetic --sweep` on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from peftkern.__main__ import main
from peftkern.adapters.arithmetic import combine, read_adapter
from tests.finetune.conftest import save_tiny_model

from .kinds import peft, transformers

for _package in ("trl", "datasets", "bitsandbytes", "matplotlib"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'peftkern[finetune]'")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, two adapters of it, and two texts."""
    folder = tmp_path_factory.mktemp("sweep")
    base = save_tiny_model(folder / "base")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(base),
            peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"][: seed + 1], task_type="CAUSAL_LM"),
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.2)
        model.save_pretrained(folder / name)
    (folder / "data.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    (folder / "control.txt").write_text("0123456789 " * 60)
    return folder


def command(trained: Path, expression: str, output: Path, *more: str) -> int:
    folders = [f"a={trained / 'a'}", f"b={trained / 'b'}"]
    options = [
        "--quantization",
        "none",
        "--seq-length",
        "64",
        "--output",
        str(output),
        "--data",
        str(trained / "data.txt"),
    ]
    return main(["arithmetic", expression, *folders, *options, *more])


@pytest.mark.parametrize("expression", ["x*(a - 0.5*b)", "a + x*b"])
def test_the_best_is_written_with_its_curve(
    trained: Path,
    expression: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--sweep", "x=-1:1:5", "--control", str(trained / "control.txt"), "--budget", "0.5")
    assert command(trained, expression, tmp_path / "out", *more) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lambda ") and "nats a token, control" in shown
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["lambda"] for row in rows] == ["-1", "-0.5", "0", "0.5", "1"]
    best = json.loads((tmp_path / "out" / "arithmetic.json").read_text())["x"]
    allowed = [row for row in rows if float(row["control nats"]) <= 1.5 * float(rows[2]["control nats"])]
    assert best == float(min(allowed, key=lambda row: float(row["data nats"]))["lambda"])
    adapters = {name: read_adapter(trained / name) for name in "ab"}
    exact = combine(expression.replace("x", f"({best})"), adapters).adapter
    got = read_adapter(tmp_path / "out")
    assert all(torch.equal(got.modules[name].b, module.b) for name, module in exact.modules.items())
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sweep", "y=0:1:3"), "y is not in the expression"),
        (("--sweep", "x=0:1"), "expected NAME=FROM:TO:COUNT"),
        (("--sweep", "x=0:0:3"), "two different numbers"),
        (("--sweep", "x=0:1:3", "--seq-length", "100000"), "fewer than one window"),
        (("--sweep", "x=0:1:3", "--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: str,
) -> None:
    expression = "x*(a + b)" if more[1][0] == "x" else "0.5*(a + b)"
    assert command(trained, expression, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
