"""A run that is killed and resumed ends with the losses of an unbroken one, bit for bit on one CPU thread."""

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

from peftkern.finetune import FinetuneConfig, FinetuneResult, InputError, finetune
from peftkern.finetune import trainer as trainer_module

from ..cases import nightly

STEPS = 9


@pytest.fixture
def options(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Our kernels; dropout, accumulation and an epoch's end after six steps, so that the random state and the
    place in the data matter."""
    data = tmp_path / "text.txt"
    data.write_text(Path(options["data"]).read_text()[:12000])
    changes = {
        "data": str(data),
        "steps": STEPS,
        "save_steps": 3,
        "dropout": 0.1,
        "grad_accumulation": 2,
        "seq_length": 256,
    }
    return options | changes | {"batch_size": 4, "patch": True}


def run(options: dict[str, Any], **changes: Any) -> FinetuneResult:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def losses(output: str) -> list[tuple[int, float, float]]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, name: str = "training_step") -> None:
    """Stop the process' run as a kill would, without its clean-up, when method `name` is called at `step`."""
    original = getattr(trainer_module.RecipeTrainer, name)

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.RecipeTrainer, name, breaking)


@pytest.mark.parametrize("step", nightly([0, 3, 5], quick=[0, 5]))
def test_resumed_run_equals_the_unbroken_one(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    unbroken: dict[str, Any],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, step)
        run(options)
    assert not (Path(options["output"]) / "result.json").exists()
    result = run(options, resume=True)
    assert losses(options["output"]) == unbroken["losses"]
    assert result.perplexity_after == unbroken["result"].perplexity_after
    assert result.sample_after == unbroken["result"].sample_after


@pytest.fixture(scope="module")
def unbroken_cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def unbroken(options: dict[str, Any], tmp_path: Path, unbroken_cache: dict[str, Any]) -> dict[str, Any]:
    """Losses and result of the same run without a break; computed once."""
    if not unbroken_cache:
        output = str(tmp_path / "unbroken")
        unbroken_cache["result"] = run(options, output=output)
        unbroken_cache["losses"] = losses(output)
        assert [row[0] for row in unbroken_cache["losses"]] == list(range(1, STEPS + 1))
    return unbroken_cache


@pytest.mark.slow
def test_a_resumed_stock_run_equals_the_unbroken_one(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before either training there is an evaluation, or none: a stock layer must train the same after
    both."""
    whole = run(options, patch=False, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 3)
        run(options, patch=False)
    resumed = run(options, patch=False, resume=True)
    assert (
        losses(resumed.output) == losses(whole.output) and resumed.perplexity_after == whole.perplexity_after
    )


def test_kill_after_the_last_step_trains_no_further(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, STEPS, "perplexity")
        run(options)
    result = run(options, resume=True)
    assert losses(options["output"]) == unbroken["losses"]
    assert result.perplexity_after == unbroken["result"].perplexity_after


def test_leftovers_of_a_kill_while_writing_are_ignored(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 5)
        run(options)
    output = Path(options["output"])
    half = output / "checkpoints" / ".incomplete-checkpoint-6-12345678"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(options, resume=True)
    assert losses(output) == unbroken["losses"]
    assert not half.exists()


def test_evaluation_before_training_is_not_repeated(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 4)
        run(options)
    calls = []
    original = trainer_module.RecipeTrainer.perplexity
    monkeypatch.setattr(
        trainer_module.RecipeTrainer,
        "perplexity",
        lambda self, name: calls.append(name) or original(self, name),
    )
    result = run(options, resume=True)
    assert (
        calls == ["held-out"] and result.perplexity_before["held-out"] > result.perplexity_after["held-out"]
    )


def test_resume_of_another_configuration_lists_the_differences(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 4)
        run(options)
    with pytest.raises(
        InputError, match=r"--r: 4 in the stored run, 8 now\n.*\n.*--lr: 0\.005 in the stored run, 0\.1 now"
    ):
        run(options, resume=True, r=8, lr=0.1)


def test_resume_with_changed_data_is_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text(Path(options["data"]).read_text())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 4)
        run(options, data=str(data))
    data.write_text(data.read_text() + "more")
    with pytest.raises(InputError, match=r"the content of .*data\.txt has changed"):
        run(options, data=str(data), resume=True)


def test_finished_run_resumes_to_its_result(options: dict[str, Any]) -> None:
    first = run(options)
    assert run(options, resume=True) == first


def test_resume_without_a_run_starts_one(options: dict[str, Any], unbroken: dict[str, Any]) -> None:
    run(options, resume=True)
    assert losses(options["output"]) == unbroken["losses"]


def start(options: dict[str, Any], **changes: Any) -> subprocess.Popen[bytes]:
    arguments = FinetuneConfig(**(options | changes)).to_arguments()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "peftkern", "finetune", *arguments], env=environment, stderr=subprocess.DEVNULL
    )


def kill_when(process: subprocess.Popen[bytes], condition: Any, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_9_then_resume_ends_with_the_same_loss(
    options: dict[str, Any], unbroken: dict[str, Any]
) -> None:
    """The resumed run is this process's; in test_kill_9_at_many_moments it is one of the command line."""
    output = Path(options["output"])
    metrics = output / "metrics.jsonl"
    kill_when(start(options), lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5)
    assert not (output / "result.json").exists()
    run(options, resume=True)
    assert losses(str(output)) == unbroken["losses"]
    result = json.loads((output / "result.json").read_text())
    assert result["final_loss"] == unbroken["result"].final_loss
    assert result["perplexity_after"] == unbroken["result"].perplexity_after


@pytest.mark.slow
def test_kill_9_at_many_moments(options: dict[str, Any], tmp_path: Path) -> None:
    whole = str(tmp_path / "whole")
    assert start(options, output=whole).wait(timeout=300) == 0
    output = Path(options["output"])
    begun = [
        lambda: output.exists(),
        lambda: (output / "run.json").exists(),
        lambda: any((output / "checkpoints").glob(".incomplete-*")),
        lambda: (output / "checkpoints" / f"checkpoint-{STEPS}").exists(),
        lambda: (output / "adapter_model.safetensors").exists() or any(output.glob(".incomplete-*")),
    ]
    for condition in begun:
        kill_when(start(options, resume=True), condition)
    assert start(options, resume=True).wait(timeout=300) == 0
    assert losses(str(output)) == losses(whole)
    assert not list(output.rglob(".incomplete-*"))
