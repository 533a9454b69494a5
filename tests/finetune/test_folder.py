"""The output folder: locked, kept until its replacement is complete, rid of our own files only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peftkern import files
from peftkern.files import LockedError, locked
from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune import folder as folder_module
from peftkern.finetune import trainer as trainer_module
from peftkern.finetune.folder import open_run

from ..cases import nightly

pytestmark = pytest.mark.any_isa


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fake_run(folder: Path, name: str, *, steps: int, extra: str | None = None) -> None:
    """The files of a finished run, each of which tells which run it is of."""
    (folder / "checkpoints" / f"checkpoint-{steps}").mkdir(parents=True)
    (folder / "checkpoints" / f"checkpoint-{steps}" / "optimizer.pt").write_text(name)
    listed = ["adapter_model.safetensors", "README.md", *([extra] if extra else [])]
    for file in (*listed, "metrics.jsonl", "loss.png"):
        (folder / file).write_text(name)
    (folder / "run.json").write_text(json.dumps({"name": name, "files": listed}))
    (folder / "result.json").write_text(json.dumps({"name": name}))


def config(output: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**({"data": "x.txt", "output": str(output)} | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": "typo.jsonl"}, "typo.jsonl"),
        ({"model": "no/such-model"}, "--model"),
        ({"targets": ("nonsense",)}, "--targets"),
        ({"eval_data": ("typo.txt",)}, "typo.txt"),
    ],
)
def test_overwrite_that_cannot_start_changes_nothing(
    options: dict[str, Any], tmp_path: Path, changes: Any, error: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fake_run(output, "old", steps=4)
    before = contents(output)
    with pytest.raises((InputError, FileNotFoundError), match=error):
        run(options, overwrite=True, **changes)
    assert contents(output) == before and not list(output.glob(".*"))


def test_overwrite_replaces_our_files_and_no_others(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fake_run(output, "old", steps=99, extra="old-only.json")
    (output / "compare.json").write_text("old")
    fake_run(output / "stock", "old stock", steps=99)
    (output / "mine.txt").write_bytes(Path(options["data"]).read_bytes())
    (output / "checkpoints" / "notes.md").write_text("mine")
    run(options, overwrite=True, data=str(output / "mine.txt"), steps=2)
    left = contents(output)
    assert left["mine.txt"] == Path(options["data"]).read_bytes() and left["checkpoints/notes.md"] == b"mine"
    assert not [name for name, value in left.items() if value in (b"old", b"old stock")]
    assert "old-only.json" not in left and not (output / "stock").exists()
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"checkpoint-2", "notes.md"}
    assert not [name for name in left if name.startswith(".")]
    assert set(json.loads(left["run.json"])["files"]) >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    }


def test_overwrite_keeps_the_earlier_run_until_the_end(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(options, steps=2)
    adapter = (Path(options["output"]) / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            trainer_module.RecipeTrainer,
            "training_step",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()),
        )
        run(options, steps=3, overwrite=True)
    assert (Path(options["output"]) / "adapter_model.safetensors").read_bytes() == adapter
    assert json.loads((Path(options["output"]) / "result.json").read_text())["steps"] == first.steps == 2
    assert run(options, steps=3, resume=True).steps == 3
    assert (Path(options["output"]) / "adapter_model.safetensors").read_bytes() != adapter
    assert run(options, steps=3, resume=True).steps == 3


def test_overwrite_refuses_inputs_that_it_would_replace(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fake_run(output, "old", steps=4)
    for option, name in (("data", "metrics.jsonl"), ("model", "."), ("model", "checkpoints/checkpoint-4")):
        refused = pytest.raises(InputError, match="is part of the run that --overwrite replaces")
        with refused, open_run(config(output, overwrite=True, **{option: str(output / name)})):
            pass


def test_replacing_is_completed_after_a_kill_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename and removal of the exchange is the last one in turn; the next command completes it."""

    class Killed(BaseException):
        pass

    def killed_after(count: int, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        left = count
        return call

    for count in range(60):
        output = tmp_path / str(count)
        output.mkdir()
        fake_run(output, "old", steps=9, extra="old-only.json")
        fake_run(output / ".replacement-1", "new", steps=2, extra="new-only.json")
        (output / "thesis.doc").write_text("mine")
        killed = False
        with monkeypatch.context() as patch:
            counted = killed_after(count, os.replace)
            patch.setattr(os, "replace", counted)
            try:
                folder_module._promote(output, output / ".replacement-1")
            except Killed:
                killed = True
        with open_run(config(output, resume=True)) as folder:
            assert folder.work == output
        left = contents(output)
        assert set(left.values()) - {b"new", b"mine"} == {left["run.json"], left["result.json"]}, count
        assert json.loads(left["run.json"])["name"] == json.loads(left["result.json"])["name"] == "new"
        assert (
            left["thesis.doc"] == b"mine" and left["new-only.json"] == b"new" and "old-only.json" not in left
        )
        assert set(left) >= {"adapter_model.safetensors", "checkpoints/checkpoint-2/optimizer.pt"}
        if not killed:
            assert count > 5
            return
    pytest.fail("the exchange never came to its end")


def test_second_run_in_a_folder_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fake_run(output, "old", steps=4)
    before = contents(output)
    with locked(output / ".lock"):
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(
                InputError, match=rf"in use by another run: process {os.getpid()} on .* is at work there"
            ):
                run(options, **changes)
    assert contents(output) == before
    fake_run(output / "stock", "stock", steps=4)
    with (
        locked(output / "stock" / ".lock"),
        pytest.raises(InputError, match="stock is in use by another run"),
    ):
        run(options, overwrite=True)


def test_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = "import sys, pathlib; from peftkern.files import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} on"), locked(path):
        pass
    holder.kill()
    holder.communicate()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists()


def test_file_system_without_locks_still_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(files.errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with locked(tmp_path / ".lock"):
        assert (tmp_path / ".lock").exists()


def test_output_that_cannot_be_written_is_one_message(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is a link to .*nowhere, which does not exist"):
        run(options, output=str(tmp_path / "dangling"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: name a folder"):
        run(options, output=str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be made: Not a directory"):
        run(options, output=str(tmp_path / "file" / "below"))

    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(files.errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "open", refused)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        run(options, output=str(tmp_path / "new" / "below"))
    assert not (tmp_path / "new").exists()


def test_failing_start_leaves_the_folder_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "plots").mkdir(parents=True)
    with pytest.raises(InputError, match="--targets"):
        run(options, targets=("nonsense",))
    assert [path.name for path in output.iterdir()] == ["plots"]


def test_resume_does_not_take_a_folder_called_files(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            trainer_module.RecipeTrainer,
            "training_step",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()),
        )
        run(options, steps=2)
    mine = Path(options["output"]) / "files" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run(options, steps=2, resume=True)
    assert mine.read_text() == "mine"


OVERWRITE, LONGER = {"overwrite": True, "steps": 3}, {"resume": True, "steps": 5}


@pytest.mark.parametrize("changes", nightly([OVERWRITE, LONGER], quick=[OVERWRITE]))
def test_full_disk_loses_nothing_of_the_earlier_run(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    patched = options | {"patch": True}
    first = run(patched, steps=2)
    output = Path(options["output"])
    before = contents(output)

    def full(*_: Any) -> None:
        raise OSError(files.errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"could not write .*checkpoint-\d.*No space left.*free disk space"),
    ):
        patch.setattr(files, "_fsync", full)
        run(patched, **changes)
    after = contents(output)
    kept = [name for name in before if name not in ("run.json", "metrics.jsonl")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert not list(output.rglob(".incomplete-*"))
    assert run(patched, resume=True, steps=changes["steps"]).steps == changes["steps"]
    assert json.loads((output / "result.json").read_text())["steps"] == changes["steps"] > first.steps


def test_conversion_waits_for_another_one_of_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes second takes what the first has made, and removes nothing of it."""
    from peftkern.finetune import conversion

    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.3)
        folder.mkdir()

    monkeypatch.setattr(conversion, "_convert", convert)
    threads = [threading.Thread(target=conversion.dense_folder, args=(gguf,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and made[0].is_dir()
    assert [path for path in made[0].parent.iterdir()] == made
