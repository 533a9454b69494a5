"""Damaged, hostile and interrupted: a run goes on from what is sound, says so, and loses no complete step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune import trainer as trainer_module
from peftkern.finetune.checkpoints import newest_sound, write_checksums
from peftkern.finetune.metrics import restore_metrics
from peftkern.finetune.signals import Interrupted

from ..cases import nightly

pytestmark = pytest.mark.any_isa

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    """On our own kernels, with dropout so that the random state counts."""
    return options | {"patch": True, "dropout": 0.1, "grad_accumulation": 2}


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def losses(output: str) -> list[tuple[int, float, float]]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def finished_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(options: dict[str, Any], finished_cache: Path) -> Path:
    """A copy, in the output folder, of a finished run of 6 steps with checkpoints 4 and 6."""
    if not list(finished_cache.iterdir()):
        run(options, output=str(finished_cache / "run"))
    output = Path(options["output"])
    shutil.copytree(finished_cache / "run", output)
    return output


def cut(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.5])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_gives_way_to_the_one_before(
    finished: Path, name: str, part: float, checksums: bool
) -> None:
    for path in (finished / "checkpoints").iterdir():
        if not checksums:
            (path / "checksums.json").unlink()
    cut(finished / "checkpoints/checkpoint-6" / name, part)
    said: list[str] = []
    checkpoint = newest_sound(finished / "checkpoints", said.append)
    assert checkpoint is not None and checkpoint.path.name == "checkpoint-4" and checkpoint.step == 4
    assert len(said) == 1 and "checkpoint-6 is damaged" in said[0] and name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_missing_part_is_damage(finished: Path, name: str) -> None:
    (finished / "checkpoints/checkpoint-6" / name).unlink()
    said: list[str] = []
    checkpoint = newest_sound(finished / "checkpoints", said.append)
    assert checkpoint is not None and checkpoint.step == 4 and f"({name} is missing)" in said[0]


def test_changed_bit_is_damage(finished: Path) -> None:
    path = finished / "checkpoints/checkpoint-6/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    said: list[str] = []
    checkpoint = newest_sound(finished / "checkpoints", said.append)
    assert checkpoint is not None and checkpoint.step == 4 and "is not as it was written" in said[0]


def test_no_sound_checkpoint_is_one_message(
    options: dict[str, Any],
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (finished / "result.json").unlink()
    for path in (finished / "checkpoints").iterdir():
        cut(path / "optimizer.pt", 0.5)
    monkeypatch.setattr("peftkern.finetune.model.load_model", lambda *_: pytest.fail("heavy work was begun"))
    assert main(["finetune", *FinetuneConfig(**options, resume=True).to_arguments()]) == 2
    said = capsys.readouterr().err
    assert (
        "no checkpoint is sound" in said
        and f"Remove {finished}/checkpoints to train from the first step again" in said
    )
    assert len(list((finished / "checkpoints").iterdir())) == 2


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_with_code_is_refused_even_with_right_checksums(
    finished: Path, tmp_path: Path, name: str
) -> None:
    torch.save({"state": _Hostile(tmp_path / "ran")}, finished / "checkpoints/checkpoint-6" / name)
    write_checksums(finished / "checkpoints/checkpoint-6")
    said: list[str] = []
    checkpoint = newest_sound(finished / "checkpoints", said.append)
    assert checkpoint is not None and checkpoint.step == 4 and f"{name} cannot be read safely" in said[0]
    assert not (tmp_path / "ran").exists()


def test_run_goes_on_from_the_older_checkpoint_to_the_same_end(
    options: dict[str, Any], finished: Path, finished_cache: Path
) -> None:
    (finished / "result.json").unlink()
    cut(finished / "checkpoints/checkpoint-6/scheduler.pt", 0.5)
    result = run(options, resume=True)
    assert losses(str(finished)) == losses(str(finished_cache / "run"))
    assert (
        result.perplexity_after
        == json.loads((finished_cache / "run/result.json").read_text())["perplexity_after"]
    )


@pytest.mark.parametrize(
    "content", nightly(["", '{"output": "o', "[]", '{"steps": 6}'], quick=['{"output": "o', '{"steps": 6}'])
)
def test_damaged_result_is_made_again(
    options: dict[str, Any], finished: Path, finished_cache: Path, content: str
) -> None:
    (finished / "result.json").write_text(content)
    result = run(options, resume=True)
    assert (
        result.perplexity_after
        == json.loads((finished_cache / "run/result.json").read_text())["perplexity_after"]
    )


@pytest.mark.parametrize("content", ["", '{"config": {', "[]", '{"config": {}, "data": {}}'])
def test_damaged_record_is_one_message(options: dict[str, Any], finished: Path, content: str) -> None:
    (finished / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is damaged .*--overwrite"):
        run(options, resume=True)


def test_lost_metrics_are_completed_from_the_checkpoint(
    options: dict[str, Any], finished: Path, finished_cache: Path
) -> None:
    whole = (finished / "metrics.jsonl").read_text().splitlines()
    (finished / "metrics.jsonl").write_bytes(
        b"\n".join([*(line.encode() for line in whole[:2]), b"\xff\xfe", b"{}"])
    )
    (finished / "result.json").unlink()
    result = run(options, resume=True)
    assert losses(str(finished)) == losses(str(finished_cache / "run"))
    assert result.steps == 6 and result.tokens_per_second > 0
    rows, lost = restore_metrics(finished / "none.jsonl", 2, [])
    assert lost == 2 and [row["step"] for row in rows] == [1, 2]


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is heard: a shell that starts a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("number", "status", "batch"),
    [
        (signal.SIGTERM, 143, 0),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 138, 1, marks=pytest.mark.slow),
    ],
)
def test_signal_in_training_saves_and_says_so(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    batch: int,
    finished_cache: Path,
) -> None:
    """In the middle of a step's batches or at its end; what follows is bit for bit as if nothing had
    happened."""
    original, batches = trainer_module.RecipeTrainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(self.state.global_step)
        loss = original(self, *args, **kwargs)
        if batches.count(3) == batch + 1 and self.state.global_step == 3:
            os.kill(os.getpid(), number)
        return loss

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match="checkpoint-[34] is saved, and .*--resume") as stopped,
    ):
        patch.setattr(trainer_module.RecipeTrainer, "training_step", training_step)
        run(options)
    assert stopped.value.status == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    assert (Path(options["output"]) / "checkpoints" / f"checkpoint-{3 + batch}").exists()
    result = run(options, resume=True)
    if not list(finished_cache.iterdir()):
        run(options, output=str(finished_cache / "run"))
    assert losses(options["output"]) == losses(str(finished_cache / "run"))
    assert (
        result.perplexity_after
        == json.loads((finished_cache / "run/result.json").read_text())["perplexity_after"]
    )


def test_signal_outside_training_ends_at_once_and_leaves_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "peftkern.finetune.model.load_tokenizer", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted) as stopped:
        run(options)
    assert stopped.value.status == 143 and not Path(options["output"]).exists()


def test_handlers_of_the_program_stay(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        monkeypatch.setattr(
            "peftkern.finetune.model.load_tokenizer",
            lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            run(options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["mine"]


@pytest.mark.slow  # a process that imports everything; above, the same signals to this one
def test_command_ends_with_the_status_schedulers_expect(options: dict[str, Any]) -> None:
    arguments = FinetuneConfig(**(options | {"steps": 4000, "save_steps": 1000})).to_arguments()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "peftkern", "finetune", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = Path(options["output"]) / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 143, said
    (saved,) = (Path(options["output"]) / "checkpoints").iterdir()
    assert f"Stopped by SIGTERM: {saved} is saved" in said and "Traceback" not in said
    assert int(saved.name.removeprefix("checkpoint-")) == len(metrics.read_text().splitlines())
