"""The recipe in several processes: the loss of one process on the same global batch, one writer, a resumption
after a killed process that equals the unbroken run."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune.checkpoints import newest_sound
from peftkern.finetune.processes import FollowedFolder, lost_processes

SECONDS = 240
ADAPTER = "adapter_model.safetensors"


def command(options: dict[str, Any], **changes: Any) -> list[str]:
    return ["finetune", *FinetuneConfig(**(options | changes)).to_arguments()]


def environment(**more: Any) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, **{name: str(value) for name, value in more.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(count: int, arguments: list[str], folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """As torchrun starts them, without its agent, which would end the others when one ends; each writes its
    messages to `folder`."""
    meeting = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    running = []
    with contextlib.ExitStack() as stack:
        for rank in range(count):
            messages = stack.enter_context((folder / f"messages-{rank}").open("w"))
            env = environment(RANK=rank, LOCAL_RANK=rank, **meeting) if count > 1 else environment()
            line = [sys.executable, "-m", "peftkern", *arguments]
            running.append(subprocess.Popen(line, env=env, stdout=messages, stderr=messages, text=True))
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


def run(count: int, arguments: list[str], folder: Path) -> None:
    with started(count, arguments, folder) as running:
        statuses = [process.wait(timeout=SECONDS) for process in running]
    assert statuses == [0] * count, (folder / "messages-0").read_text()[-3000:]


def column(output: str, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in Path(output, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_torchrun_trains_as_one_process_on_the_global_batch(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"patch": True}
    one = finetune(FinetuneConfig(**options), quiet=True)
    output = str(tmp_path / "two")
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
    ]
    ended = subprocess.run(
        [*line, "peftkern", *command(options, output=output, batch_size=1)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert column(output) == pytest.approx(column(options["output"]), rel=1e-5)
    assert column(output, "tokens") == column(options["output"], "tokens")
    result = json.loads(Path(output, "result.json").read_text())
    for name in ("perplexity_before", "perplexity_after"):
        assert result[name] == pytest.approx(getattr(one, name), rel=1e-5)
    assert ended.stdout.count("Perplexity (") == 1 and ended.stderr.count("modules patched") == 1
    files = {path.name for path in Path(options["output"]).iterdir()}
    assert {path.name for path in Path(output).iterdir()} == files  # nothing of a second process, no lock


@pytest.mark.slow
def test_a_killed_process_loses_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"steps": 40, "save_steps": 10, "dropout": 0.1, "batch_size": 1}
    run(2, command(options, output=str(tmp_path / "unbroken")), tmp_path)
    with started(2, command(options), tmp_path) as (first, second):
        deadline = time.monotonic() + SECONDS
        metrics = Path(options["output"], "metrics.jsonl")
        while not metrics.exists() or metrics.read_text().count("\n") < 12:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        assert first.wait(timeout=60) == 2
    message = (tmp_path / "messages-0").read_text()
    assert "process 0 of 2 lost contact with another one" in message and "--resume" in message
    assert "Traceback" not in message
    sound = newest_sound(Path(options["output"], "checkpoints"), pytest.fail)
    assert 10 <= sound.step < 40
    run(2, command(options, resume=True), tmp_path)
    assert column(options["output"]) == column(str(tmp_path / "unbroken"))
    name = "adapter_model.safetensors"
    assert filecmp.cmp(Path(options["output"], name), tmp_path / "unbroken" / name, shallow=False)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_a_run_goes_on_in_another_number_of_processes(
    before: int, after: int, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"schedule": "constant_with_warmup", "steps": 4, "batch_size": 4, "save_steps": 4}
    finetune(FinetuneConfig(**(options | {"steps": 8, "output": str(tmp_path / "one")})), quiet=True)
    run(before, command(options, batch_size=4 // before), tmp_path)
    run(after, command(options, batch_size=4 // after, steps=8, resume=True), tmp_path)
    # The warm-up is 5 % of either length: one step.
    assert column(options["output"]) == pytest.approx(column(str(tmp_path / "one")), rel=1e-5)


def test_rows_of_a_step_are_those_of_all_processes() -> None:
    config = FinetuneConfig(data="x.txt", batch_size=2, grad_accumulation=3).resolved()
    stored = config.to_dict() | {"batch_size": 4, "grad_accumulation": 3}
    assert config.differences(stored, (1, 2)) == []
    (line,) = config.differences(stored)
    assert "4 x 3 in the stored run, 2 x 3 now" in line
    (line,) = config.differences(stored, (2, 2))
    assert "4 x 3 x 2 processes in the stored run, 2 x 3 x 2 processes now" in line


@pytest.mark.parametrize(
    "changes", [{"row_losses": True}, {"unfreeze": "2"}, {"compare": True}, {"source_data": "x.txt"}]
)
def test_what_one_process_alone_can_do(
    changes: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    (name,) = changes
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} works in one process only"):
        finetune(FinetuneConfig(**(options | {"patch": True} | changes)))
    assert not Path(options["output"]).exists()


def test_all_but_the_first_process_write_nothing(tmp_path: Path) -> None:
    folder = FollowedFolder(tmp_path, tmp_path / ".replacement-1")
    folder.begin({})
    folder.list_files(["x"])
    folder.settle()
    folder.discard_unless_begun()
    assert not list(tmp_path.iterdir())


def test_a_lost_process_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="Connection closed"), lost_processes():
        raise closed  # of one process it is another error
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with (
        pytest.raises(ConnectionError, match=r"process 3 of 4 lost contact.*--resume") as raised,
        lost_processes(),
    ):
        raise closed
    assert "more" not in str(raised.value)
    with pytest.raises(RuntimeError, match="shape"), lost_processes():
        raise RuntimeError("shape [3] is invalid")


@pytest.mark.slow
def test_in_shards_it_trains_as_whole_and_either_goes_on_with_the_other(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"schedule": "constant_with_warmup", "steps": 6, "save_steps": 3, "patch": True}
    one = finetune(FinetuneConfig(**(options | {"output": str(tmp_path / "one")})), quiet=True)
    shards = options | {"batch_size": 1, "shard": True}
    run(2, command(shards), tmp_path)
    assert column(options["output"]) == pytest.approx(column(one.output), rel=1e-5)
    assert column(options["output"], "grad_norm") == pytest.approx(column(one.output, "grad_norm"), rel=1e-4)
    result = json.loads(Path(options["output"], "result.json").read_text())
    for name in ("perplexity_before", "perplexity_after"):
        assert result[name] == pytest.approx(getattr(one, name), rel=1e-5)
    assert result["sample_after"] == one.sample_after
    assert "bytes in shards over 2 processes" in (tmp_path / "messages-0").read_text()
    adapters = [load_file(Path(folder, ADAPTER)) for folder in (options["output"], one.output)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, expected in adapters[1].items():
        assert adapters[0][name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # From shards into one process, and back: the files are the same.
    longer = {"steps": 9, "resume": True}
    unbroken = str(tmp_path / "unbroken")
    finetune(FinetuneConfig(**(options | {"steps": 12, "output": unbroken})), quiet=True)
    run(1, command(options, batch_size=2, **longer), tmp_path)
    run(2, command(shards, **(longer | {"steps": 12})), tmp_path)
    assert column(options["output"]) == pytest.approx(column(unbroken), rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"schedule": "constant_with_warmup", "save_steps": 3, "dropout": 0.1, "batch_size": 1}
    options |= {"shard": True}
    run(2, command(options, steps=6, output=str(tmp_path / "unbroken")), tmp_path)
    run(2, command(options, steps=3), tmp_path)
    run(2, command(options, steps=6, resume=True), tmp_path)
    assert column(options["output"]) == column(str(tmp_path / "unbroken"))
    assert filecmp.cmp(Path(options["output"], ADAPTER), tmp_path / "unbroken" / ADAPTER, shallow=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "there is one: start them with"),
        ({"optimizer": "adamw_8bit"}, "take no parameters in shards"),
        ({"adapter": "bottleneck"}, "--shard is for LoRA"),
    ],
)
def test_shards_that_cannot_be_are_told(more: dict[str, Any], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        finetune(FinetuneConfig(**(options | {"shard": True} | more)), quiet=True)
    assert not Path(options["output"]).exists()
