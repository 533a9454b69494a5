"""--source-data and what holds it: measured, budgeted, replayed, and bit-equal after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, FinetuneResult, InputError, finetune
from peftkern.finetune.sample import python_reference
from peftkern.transfer.forgetting import FisherFactors

from .conftest import write_jsonl
from .test_resume import break_at

HELD = {"ewc": 2.0, "l2_sp": 0.01, "replay": 0.5}


@pytest.fixture
def options(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of 6 steps that is measured after each second, with dropout so that the random state matters."""
    texts = [
        f"{number} " + " ".join(f"w{number * 1000 + place * place}" for place in range(60))
        for number in range(12)
    ]
    source = write_jsonl(tmp_path / "source.jsonl", [{"text": text} for text in texts])
    changes = {
        "steps": 6,
        "save_steps": 2,
        "dropout": 0.1,
        "source_data": str(source),
        "patch": True,
        "quantization": "none",
    }
    return options | changes


def letters(number: int) -> str:
    return " ".join(f"w{number * 1000 + place * place}" for place in range(60))


def run(options: dict[str, Any], **changes: Any) -> FinetuneResult:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def rows(output: str) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "wall", "peak_memory")
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def test_a_run_measures_forecasts_and_plots_what_it_forgets(options: dict[str, Any]) -> None:
    result = run(options, **HELD)
    logged = rows(options["output"])
    assert all(row["forgetting_weight"] == 2.0 and row["forgetting"] >= 0 for row in logged)
    assert [("source_rise" in row, "target_loss" in row) for row in logged] == [
        (False, False),
        (True, True),
    ] * 3
    found = result.forgetting
    assert (
        found["step"] == 6 and found["source_rise"] == logged[-1]["source_rise"] and found["budget"] is None
    )
    output = Path(options["output"])
    assert (output / "forgetting.png").stat().st_size > 10000
    fisher = FisherFactors.load(output / "forgetting" / "fisher.safetensors")
    assert fisher.labels == "true" and len(fisher.rows) == 14
    kept = [path for path in (output / "forgetting").iterdir() if path.is_dir()]
    assert kept and all((path / "adapter_model.safetensors").is_file() for path in kept)


@pytest.mark.parametrize("held", [HELD, pytest.param({"forget_budget": 1e-5}, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_unbroken_one(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, Any]
) -> None:
    whole = run(options, output=str(tmp_path / "whole"), **held)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 3)
        run(options, **held)
    resumed = run(options, resume=True, **held)
    assert rows(resumed.output) == rows(whole.output) and resumed.forgetting == whole.forgetting
    adapters = [(Path(each.output) / "adapter_model.safetensors").read_bytes() for each in (whole, resumed)]
    assert adapters[0] == adapters[1]
    fronts = [
        sorted(path.name for path in (Path(each.output) / "forgetting").iterdir())
        for each in (whole, resumed)
    ]
    assert fronts[0] == fronts[1]


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_still_tells_what_it_forgot(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(options, output=str(tmp_path / "whole"), l2_sp=0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 6, "perplexity")
        run(options, l2_sp=0.1)
    assert run(options, l2_sp=0.1, resume=True).forgetting == whole.forgetting is not None
    without = {"source_data": (), "overwrite": True, "steps": 2}
    (Path(options["output"]) / "mine.txt").write_text("not the run's")
    run(options, **without)
    names = {path.name for path in Path(options["output"]).iterdir()}
    assert "mine.txt" in names and not any("forgetting" in name for name in names)


@pytest.mark.slow
def test_a_killed_run_equals_the_unbroken_one(options: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of the process that trains, once a checkpoint is there."""
    options = options | {"steps": 40, "forget_budget": 0.001, "replay": 0.5}
    command = [sys.executable, "-m", "peftkern", "finetune", *FinetuneConfig(**options).to_arguments()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while (
        not list((Path(options["output"]) / "checkpoints").glob("checkpoint-*"))
        and time.monotonic() < deadline
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*command[3:], "--resume"]) == 0
    whole = run(options, output=str(tmp_path / "whole"))
    assert rows(options["output"]) == rows(whole.output)


def test_a_spent_budget_ends_the_run_and_keeps_an_adapter_within_it(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greek = [
        "".join(chr(0x3B1 + (number * place + place) % 25) for place in range(1, 200)) for number in range(40)
    ]
    source = write_jsonl(tmp_path / "source.jsonl", [{"text": text} for text in greek])
    options = options | {"source_data": source, "eval_tokens": 2048, "dropout": 0.0}
    hard = {"forget_budget": 0.004, "lr": 0.1, "steps": 40, "warmup": 0.0, "source_steps": 1}
    arguments = FinetuneConfig(**options | hard).to_arguments()
    main(["finetune", *arguments])
    shown = capsys.readouterr().out
    result = json.loads((Path(options["output"]) / "result.json").read_text())
    assert result["steps"] < 40 and result["forgetting"]["stopped_early"]
    assert "nats per token of 0.004 allowed" in shown and "training ended there" in shown
    measured = {row["step"]: row["source_rise"] for row in rows(options["output"]) if "source_rise" in row}
    assert result["forgetting"]["source_rise"] == min(measured.values())
    chosen = (
        Path(options["output"])
        / "forgetting"
        / f"step-{result['forgetting']['step']:05d}"
        / "adapter_model.safetensors"
    )
    from safetensors.torch import load_file

    final, kept = load_file(Path(options["output"]) / "adapter_model.safetensors"), load_file(chosen)
    assert final.keys() == kept.keys() and all((final[name] == kept[name]).all() for name in final)
    assert main(["finetune", *arguments, "--resume"]) == 0


def test_overlap_with_the_evaluation_text_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    shared = write_jsonl(tmp_path / "shared.jsonl", [{"text": letters(3)}, {"text": "nothing of it " * 20}])
    with pytest.raises(
        InputError, match=r"overlaps the evaluation text shared: 1 of its 12 rows .*source.jsonl:4"
    ):
        run(options, eval_data=str(shared))
    with pytest.raises(InputError, match="overlaps the evaluation text --data"):
        run(options, source_data=options["data"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source_data": (), "forget_budget": 0.02},
            "--forget-budget needs text of what must not be forgotten",
        ),
        ({"source_data": (), "replay": 0.1}, "--replay needs text"),
        ({"forget_budget": 0.02, "ewc": 1.0}, "not both"),
        ({"forget_budget": -1.0}, "--forget-budget must be greater than 0"),
        ({"replay": 1.5}, "--replay must be at most 1"),
        ({"fisher": "sampled"}, "--fisher must be one of true, empirical"),
        ({"dora": True, "l2_sp": 1.0}, "drop --dora"),
        ({"source_steps": 0}, "--source-steps must be a whole number of at least 1"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**options | changes)


def test_empty_and_too_short_sources_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    for name, content, message in (
        ("empty", [], "is empty"),
        ("one", [{"text": letters(1)}], "one row only"),
        ("twice", [{"text": letters(1)}] * 3, "repeat each other"),
    ):
        source = write_jsonl(tmp_path / f"{name}.jsonl", content)
        with pytest.raises(InputError, match=message):
            run(options, source_data=str(source))
    assert not Path(options["output"]).exists()


def test_with_dora_the_source_is_measured_and_replayed_without_a_forecast(options: dict[str, Any]) -> None:
    result = run(options, dora=True, replay=0.5)
    logged = rows(options["output"])
    assert "forgetting" not in logged[-1] and logged[-1]["source_rise"] == result.forgetting["source_rise"]


def test_the_sample_s_source_shares_nothing_with_its_evaluation_text() -> None:
    from peftkern.transfer.forgetting.overlap import overlapping

    held_out, others = ([row["text"] for row in python_reference(held_out=which)] for which in (True, False))
    assert len(held_out) == 7 and len(others) > 60 and not overlapping(others, held_out)


def test_a_run_stored_before_sources_goes_on_without_one(options: dict[str, Any]) -> None:
    config = FinetuneConfig(**options | {"source_data": ()}).resolved()
    new = ("source_data", "forget_budget", "ewc", "l2_sp", "replay", "fisher", "source_steps")
    assert config.differences({key: value for key, value in config.to_dict().items() if key not in new}) == []
