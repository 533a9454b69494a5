"""Rows left out before training, and the losses of rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.any_isa

for _package in ("datasketch", "cleanlab"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'peftkern[data]'")

from torch.nn import functional as F  # noqa: E402

from peftkern.__main__ import main  # noqa: E402
from peftkern.finetune import FinetuneConfig, InputError, finetune  # noqa: E402
from peftkern.finetune.config import FILTERS  # noqa: E402
from peftkern.finetune.data import load_data  # noqa: E402
from peftkern.finetune.inference import loaded  # noqa: E402
from peftkern.finetune.loss import summed_nll, token_nll  # noqa: E402
from peftkern.finetune.tokens import tokenize  # noqa: E402
from peftkern.transfer.data.filtering import filtered  # noqa: E402
from peftkern.transfer.data.losses import row_losses  # noqa: E402

from .conftest import write_jsonl  # noqa: E402


def texts(count: int = 12) -> list[str]:
    return [
        " ".join(f"word{(7 * row + 3 * place) % 211}x{row}" for place in range(20)) for row in range(count)
    ]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Twelve rows, two of them once more, and an evaluation that holds one of them."""
    rows = texts()
    return {
        "data": write_jsonl(
            tmp_path / "rows.jsonl", [{"text": text} for text in [*rows, rows[3] + ".", rows[5]]]
        ),
        "eval_data": write_jsonl(
            tmp_path / "eval.jsonl", [{"text": rows[8]}, {"text": "Something else. " * 20}]
        ),
    }


def test_which_rows_are_left_out(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = load_data(files["data"]), {"eval": load_data(files["eval_data"])}
    left = filtered(train, held_out, FILTERS)
    assert len(left) == 11 and texts()[8] not in left["text"]
    assert len(set(left["text"]) & {texts()[3], texts()[3] + "."}) == 1
    said = capsys.readouterr().err
    assert "3 of 14 rows are left out: 1 hold text of --eval-data, 2 are near duplicates of others" in said
    assert filtered(train.select(range(3)), {}, ["duplicates"])["text"] == train["text"][:3]


def test_a_run_trains_on_what_is_left(
    options: dict[str, Any], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.finetune import inputs

    seen = []
    original = inputs.prepare
    monkeypatch.setattr(
        inputs,
        "prepare",
        lambda config, train, *rest: seen.append(len(train)) or original(config, train, *rest),
    )
    result = finetune(FinetuneConfig(**options | files | {"filter_data": FILTERS, "steps": 2}), quiet=True)
    assert seen == [11]
    assert json.loads((Path(result.output) / "run.json").read_text())["config"]["filter_data"] == list(
        FILTERS
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter_data": "typos"}, "--filter-data must be of duplicates, overlap; got typos"),
        ({"filter_data": "overlap", "eval_data": ()}, "--filter-data overlap needs --eval-data"),
        ({"filter_data": ("overlap",), "eval_data": "DATA"}, "leaves no row to train on"),
    ],
)
def test_filters_that_do_not_fit(
    options: dict[str, Any], files: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    changes = {key: files["data"] if value == "DATA" else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        finetune(FinetuneConfig(**options | files | changes), quiet=True)


# ---- losses


@pytest.mark.parametrize("patch", [True, False])
def test_the_loss_of_each_token_is_that_of_the_logits(tiny_model: str, patch: bool) -> None:
    with loaded(None, model=tiny_model, quantization="none", dtype="fp32", patch=patch) as model:
        ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, :4] = -100
        losses = token_nll(model.model, {"input_ids": ids, "labels": labels})
        logits = model.model(input_ids=ids).logits.double()
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        ).reshape(2, 11)
        assert losses.shape == (2, 11) and torch.allclose(losses.double(), expected, atol=1e-5)
        assert torch.allclose(
            summed_nll(model.model, {"input_ids": ids, "labels": labels}), losses.sum(), rtol=1e-5
        )
        assert (losses[:, :3] == 0).all() and not losses.requires_grad


def test_the_loss_of_each_row(tiny_model: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is it?", "completion": text} for text in ("A thing.", "", "Quite another thing.")
    ]
    data = load_data(write_jsonl(tmp_path / "rows.jsonl", rows))
    with loaded(None, model=tiny_model, quantization="none", dtype="fp32") as model:
        tokens = tokenize(data, model.tokenizer, length=64, wrapped=False)
        found = row_losses(model, tokens, count=len(data))
        example = next(row for row in tokens if row["row"] == 2)
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            loss = model.model(input_ids=ids, labels=labels).loss.item()
    assert found.nats[2] == pytest.approx(loss, rel=1e-5) and found.tokens[2] == int(
        (labels[0, 1:] != -100).sum()
    )
    assert found.worst[2] >= found.nats[2] and "median loss" in found.verdict
    # An empty completion teaches the end of the sequence alone, or nothing.
    assert found.tokens[1] in (0, 1) and math.isnan(found.nats[1]) == (found.tokens[1] == 0)
    assert found.above(0)[0] == max(
        (0, 1, 2), key=lambda row: -1.0 if math.isnan(found.nats[row]) else found.nats[row]
    )


def test_the_command_takes_losses_under_an_adapter(
    options: dict[str, Any], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(FinetuneConfig(**options | {"steps": 2}), quiet=True)
    output = str(tmp_path / "clean.jsonl")
    filters = ["--filter", "losses", "--percentile", "90", "--output", output]
    assert main(["data", files["data"], "--adapter", options["output"], *filters]) == 0
    said = capsys.readouterr().out
    assert "losses: median loss" in said and f"12 of 14 rows are in {output}" in said
