"""The output folder of a run: one run at a time, an earlier one kept until its replacement is complete, other
files untouched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import TEMP_PREFIX, LockedError, clear_temporaries, locked, remove_directory, replace, write_json
from .config import FinetuneConfig
from .errors import InputError

__all__ = ["RunFolder", "open_run"]

_LOCK = ".lock"
_REPLACEMENT = ".replacement-"
_ALWAYS = ("result.json", "run.json", "metrics.jsonl", "loss.png", "compare.json", "row_losses.csv")
# What runs wrote that did not yet list their files.
_UNLISTED = (
    *(
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ),
)


class RunFolder:
    """Where one run writes: `output`, or with --overwrite a folder in it that takes the earlier run's place
    at the end."""

    def __init__(self, output: Path, work: Path) -> None:
        self.output = output
        self.work = work
        self.checkpoints = work / "checkpoints"
        self.record = work / "run.json"
        self.result = work / "result.json"
        self.metrics = work / "metrics.jsonl"

    @property
    def replaces(self) -> bool:
        """Whether an earlier run stands in `output` until this one is complete."""
        return self.work != self.output

    def begin(self, record: dict[str, Any]) -> None:
        """Write run.json, by which the folder holds a run; an unfinished replacement of before is given up
        now."""
        write_json(self.record, record)
        for other in _replacements(self.output):
            if other != self.work:
                remove_directory(other)

    def discard_unless_begun(self) -> None:
        """Remove what a run wrote that failed before it began; nothing else."""
        if self.record.exists():
            return
        with contextlib.suppress(OSError):
            clear_temporaries(self.checkpoints)
            self.checkpoints.rmdir()
            if self.replaces:
                self.work.rmdir()

    def list_files(self, files: Iterable[str]) -> None:
        """Note in run.json what this run is about to write besides the usual files, so that a later
        --overwrite takes no others."""
        write_json(self.record, read_record(self.record) | {"files": sorted(files)})

    def settle(self) -> None:
        """Let a complete replacement take the earlier run's place."""
        if self.replaces:
            _promote(self.output, self.work)


@contextlib.contextmanager
def open_run(config: FinetuneConfig) -> Iterator[RunFolder]:
    """The locked folder of the run that `config` starts or goes on with; nothing stays of one that fails
    before it begins.

    Raises InputError where the folder is in use by another process, or for something else, or cannot be
    written.
    """
    output = Path(config.output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    _make(output)
    try:
        with _held(output), _held(output / "stock"):
            folder = _choose(output, config)
            try:
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
                clear_temporaries(folder.work)
                clear_temporaries(folder.checkpoints)
                yield folder
            finally:
                folder.discard_unless_begun()
        if folder.replaces:
            _remove_if_empty(output / "stock")  # its lock lay there until now
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def read_record(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file that a run wrote; InputError where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}): start again with --overwrite, or name another --output"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} is damaged (no JSON object): start again with --overwrite, or name another --output"
        )
    return value


def _make(output: Path) -> None:
    if output.is_symlink() and not output.exists():
        raise InputError(
            f"--output {output} is a link to {os.readlink(output)}, which does not exist: make that "
            "folder, or name another"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be made: {error.strerror}. Name a folder where you may write"
        ) from error


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock of `folder` if it exists."""
    if not folder.is_dir():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK))
        except LockedError as error:
            message = (
                f"--output {folder} is in use by another run: {error}. Wait until it ends, or name another "
                "folder"
            )
            raise InputError(message) from None
        except OSError as error:
            message = (
                f"--output {folder} cannot be written: {error.strerror}. Name a folder where you may "
                "write, on a disk with free space"
            )
            raise InputError(message) from error
        yield


def _choose(output: Path, config: FinetuneConfig) -> RunFolder:
    """Which run is meant: the one there, an unfinished replacement of it, or a new one; a complete
    replacement is put in place first."""
    replacements = _replacements(output)
    for work in replacements:
        if (work / "result.json").exists():
            _promote(output, work)
            replacements = _replacements(output)
    begun = [work for work in replacements if (work / "run.json").exists()]
    held = (output / "run.json").exists()
    if config.resume and begun:
        return RunFolder(output, begun[-1])
    if config.resume and held:
        return RunFolder(output, output)
    if config.overwrite and (held or begun):
        _refuse_inputs_among(config, output)
        return RunFolder(output, output / f"{_REPLACEMENT}{1 + max(map(_number, replacements), default=0)}")
    if any(path.is_file() for path in output.rglob("*") if not _ours(path.relative_to(output))):
        hint = "go on with --resume, start again with --overwrite" if held or begun else "empty it"
        raise InputError(f"--output {output} exists and is not empty: {hint}, or name another folder")
    return RunFolder(output, output)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _ours(path: Path) -> bool:
    return path.name == _LOCK or any(part.startswith(TEMP_PREFIX) for part in path.parts)


def _replacements(output: Path) -> list[Path]:
    """Oldest first."""
    return sorted(
        (path for path in output.glob(f"{_REPLACEMENT}*") if path.name.removeprefix(_REPLACEMENT).isdigit()),
        key=_number,
    )


def _number(replacement: Path) -> int:
    return int(replacement.name.removeprefix(_REPLACEMENT))


def _checkpoints(folder: Path) -> list[Path]:
    return [
        path
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]


def _names(folder: Path) -> set[str]:
    """Names of the files in `folder` that its run wrote."""
    try:
        listed = read_record(folder / "run.json").get("files", _UNLISTED)
    except (OSError, InputError):
        listed = _UNLISTED
    return {*_ALWAYS, *(Path(name).name for name in listed)}


def _own(folder: Path) -> list[Path]:
    """The files and checkpoints of the run in `folder`, and of the one that --compare made in its folder
    "stock"."""
    paths = [
        path for path in (folder / name for name in sorted(_names(folder))) if path.exists()
    ] + _checkpoints(folder)
    return paths + (_own(folder / "stock") if (folder / "stock" / "run.json").exists() else [])


def _refuse_inputs_among(config: FinetuneConfig, output: Path) -> None:
    """What a run reads must still be there when it is resumed."""
    replaced = {output.resolve(), *(path.resolve() for path in _own(output))}
    data = (config.data,) if isinstance(config.data, str) else config.data
    inputs = {
        "--model": (config.model,),
        "--data": data,
        "--eval-data": config.eval_data,
        "--source-data": config.source_data,
    }
    for option, sources in inputs.items():
        for place in (Path(source).resolve() for source in sources if Path(source).exists()):
            if place in replaced or any(parent in replaced - {output.resolve()} for parent in place.parents):
                raise InputError(
                    f"{option} {place} is part of the run that --overwrite replaces: copy it "
                    "elsewhere, or name another --output"
                )


def _promote(output: Path, work: Path) -> None:
    """Move a complete run from `work` into `output` over the earlier one; begun again after a kill, it ends
    the same.

    The earlier result.json goes first and the new one comes last: in between, the one in `work` tells that
    this is to be completed.
    """
    (output / "result.json").unlink(missing_ok=True)
    if (work / "run.json").exists():
        arriving = _names(work)
        for path in _own(output):
            stays = path.parent == output and path.name in arriving and path.name != "compare.json"
            if path.parent.name != "checkpoints" and not stays:
                remove_directory(path) if path.is_dir() else path.unlink()
        _move_checkpoints(output, work)
        for path in sorted(work.iterdir(), key=lambda path: path.name == "run.json"):
            if path.name != "result.json":
                replace(path, output / path.name)
    os.replace(work / "result.json", output / "result.json")
    shutil.rmtree(work, ignore_errors=True)


def _move_checkpoints(output: Path, work: Path) -> None:
    arriving = work / "checkpoints-arriving"
    if (work / "checkpoints").exists():
        for path in (*_checkpoints(output), *_checkpoints(output / "stock")):
            remove_directory(path)
        os.replace(work / "checkpoints", arriving)
    if arriving.exists():
        (output / "checkpoints").mkdir(exist_ok=True)
        for path in arriving.iterdir():
            os.replace(path, output / "checkpoints" / path.name)
        arriving.rmdir()
    _remove_if_empty(output / "stock" / "checkpoints")
