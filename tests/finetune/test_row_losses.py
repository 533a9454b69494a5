"""--row-losses: each row's loss in each epoch from the fused loss, without changing a bit of training; and
`peftkern data` finds the rows that are never learnt in it.
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern import functional
from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune.row_losses import read_recorded
from peftkern.finetune.trainer import RecipeTrainer
from tests.finetune.conftest import write_jsonl

OPTIONS: dict[str, Any] = {
    "r": 8,
    "seq_length": 48,
    "batch_size": 4,
    "grad_accumulation": 2,
    "epochs": 2.0,
    "save_steps": 2,
    "lr": 1e-2,
    "eval_tokens": 200,
    "sample_tokens": 1,
    "dtype": "fp32",
    "quantization": "none",
    "row_losses": True,
}


def pairs(count: int, wrong: int = 0) -> list[dict[str, str]]:
    """What follows a letter is one word, but in the first `wrong` rows, where it is noise."""
    draw, made = random.Random(0), []
    for index in range(count):
        noise = "".join(draw.choices("bcdfgh#%&", k=6))
        made.append(
            {
                "prompt": f"{index:02d} {'ax'[index % 2]}: ",
                "completion": noise if index < wrong else "yes!yes!",
            }
        )
    return made


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "row_losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(folder: Path, model: str, rows: list[dict[str, str]], **more: Any) -> Path:
    data = write_jsonl(folder.parent / "rows.jsonl", rows)
    held_out = write_jsonl(folder.parent / "held-out.jsonl", rows[-2:])
    config = FinetuneConfig(model=model, data=data, eval_data=held_out, output=str(folder), **OPTIONS | more)
    finetune(config, quiet=True)
    return folder


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("patch", [True, False])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_add_up_to_the_loss_that_is_logged(
    tmp_path: Path, tiny_model: str, packing: bool, patch: bool
) -> None:
    folder = run(tmp_path / "out", tiny_model, pairs(21), packing=packing, patch=patch)
    found = lines(folder)
    seen = {(row["epoch"], row["row"]) for row in found}
    assert len(found) == len(seen) == 42 and {epoch for epoch, _ in seen} == {"0", "1"}
    assert all(row["tokens"] == "9" for row in found)  # eight letters and the end
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in found:
        sums[int(row["step"])][0] += float(row["nats"])
        sums[int(row["step"])][1] += int(row["tokens"])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert len(metrics) == len(sums)
    for entry in metrics:
        nats, tokens = sums[entry["step"]]
        assert nats / tokens == pytest.approx(entry["loss"], rel=2e-4)


def test_noting_changes_no_bit_of_training_and_makes_no_second_forward(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    calls = {"with": 0, "without": 0}
    real = functional.linear_cross_entropy
    for name, folder in (("with", tmp_path / "a"), ("without", tmp_path / "b" / "a")):

        def counted(*args: Any, name: str = name, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(functional, "linear_cross_entropy", counted)
        run(folder, tiny_model, pairs(12), row_losses=name == "with")
    assert calls["with"] == calls["without"] > 0
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b" / "a")
    assert not (tmp_path / "b" / "a" / "row_losses.csv").exists()


def test_a_killed_run_writes_the_same_file(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs(21)
    whole = run(tmp_path / "whole", tiny_model, rows)

    class Killed(BaseException):
        pass

    step = RecipeTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecipeTrainer, "training_step", killed)
        run(tmp_path / "again", tiny_model, rows)
    with (tmp_path / "again" / "row_losses.csv").open("a") as file:
        file.write("4,0,7,9")  # cut in the middle of a line
    assert {row["step"] for row in lines(tmp_path / "again")} == {"1", "2", "3", "4"}  # 3 is made again
    run(tmp_path / "again", tiny_model, rows, resume=True)
    assert (tmp_path / "again" / "row_losses.csv").read_bytes() == (whole / "row_losses.csv").read_bytes()
    assert adapter(tmp_path / "again") == adapter(whole)


def test_texts_in_pieces_add_up(tmp_path: Path, tiny_model: str) -> None:
    texts = [{"text": f"{index}" * length} for index, length in enumerate((20, 130, 47, 70))]
    folder = run(
        tmp_path / "out", tiny_model, texts, document_boundaries=True, batch_size=1, grad_accumulation=1
    )
    found = read_recorded(folder / "row_losses.csv", 4)
    # The end of a text is a token more; of each piece of 48 the first token is not predicted.
    assert found.tokens.tolist() == [20, 131 - 3, 47, 71 - 2] and found.nats.shape == (2, 4)


def test_rows_that_are_never_learnt_are_found(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasketch", reason="datasketch is not installed: pip install 'peftkern[data]'")
    folder = run(tmp_path / "out", tiny_model, pairs(30, wrong=3), epochs=4.0, grad_accumulation=1)
    data, clean, report = str(tmp_path / "rows.jsonl"), tmp_path / "clean.jsonl", tmp_path / "report"
    arguments = ["--row-losses", str(folder / "row_losses.csv"), "--filter", "dynamics", "--percentile", "90"]
    assert main(["data", data, *arguments, "--output", str(clean), "--report", str(report)]) == 0
    assert "dynamics: 30 of 30 rows were trained on; the median row goes from" in capsys.readouterr().out
    kept = [json.loads(line) for line in clean.read_text().splitlines()]
    assert kept == pairs(30, wrong=3)[3:]
    assert "## Loss dynamics" in (report / "report.md").read_text()
    stored = json.loads((report / "report.json").read_text())["checks"]["dynamics"]["rows"]
    assert {row["row"] for row in stored} == {0, 1, 2} and "nats a token when first seen" in stored[0]["why"]


def test_bad_input_is_named(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="drop --filter-data"):
        FinetuneConfig(row_losses=True, filter_data="duplicates")
    with pytest.raises(InputError, match="give --document-boundaries as well"):
        run(tmp_path / "text", tiny_model, [{"text": "abc " * 9}] * 9)
    pytest.importorskip("datasketch", reason="datasketch is not installed: pip install 'peftkern[data]'")
    folder = run(tmp_path / "out", tiny_model, pairs(8), epochs=1.0)
    other = write_jsonl(tmp_path / "other.jsonl", pairs(9))
    few = write_jsonl(tmp_path / "few.jsonl", pairs(3))
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    for data, file, message in (
        (other, folder / "row_losses.csv", "is of a run on other data"),
        (few, folder / "row_losses.csv", "has row 7, but the data has 3"),
        (other, tmp_path / "none.csv", "has no losses: give row_losses.csv"),
        (other, tmp_path / "nowhere.csv", "no such file; it is in the --output"),
    ):
        assert main(["data", data, "--row-losses", str(file)]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert main(["data", other, "--filter", "dynamics", "--output", str(tmp_path / "new.jsonl")]) == 2
    assert "it needs --row-losses" in capsys.readouterr().err


def test_the_op_hands_out_the_rows_of_its_reduced_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator, requires_grad=True)
    weight, labels = torch.randn(40, 64, generator=generator), torch.tensor([5, 39, -100, 0, 1, 2])
    rows = torch.full((6,), float("nan"))
    loss = functional.linear_cross_entropy(x, weight, labels, row_losses=rows)
    assert torch.equal(rows, functional.linear_cross_entropy(x, weight, labels, reduction="none"))
    (with_rows,) = torch.autograd.grad(loss, x)
    (alone,) = torch.autograd.grad(functional.linear_cross_entropy(x, weight, labels), x)
    assert torch.equal(with_rows, alone) and not rows.requires_grad
    for wrong in (rows[:5], rows.double(), torch.zeros(6, 2)[:, 0], torch.zeros(6, requires_grad=True)):
        with pytest.raises(ValueError, match="row_losses: got"):
            functional.linear_cross_entropy(x, weight, labels, row_losses=wrong)
