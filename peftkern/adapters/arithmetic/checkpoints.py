"""Task arithmetic on full checkpoints, streamed from shards to shards in bounded memory, and gone on with
where it was interrupted."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import TEMP_PREFIX, LockedError, locked, write_json
from .matching import PIECE, require_same_tensors, tied_twice
from .rules import Method, Piece, Rule, prepare_rule
from .shards import DTYPES, Checkpoint, Entry, ShardWriter, layout, open_checkpoint, pieces_of

__all__ = ["PIECE", "combine_checkpoints", "peak_bytes"]

_JOURNAL, _RECORD, _LOCK = "arithmetic-progress.json", "arithmetic.json", ".lock"
_DTYPE_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def peak_bytes(terms: int, piece: int = PIECE) -> int:
    """An upper bound of the tensors that are alive at once, whatever the model's size: per checkpoint a piece
    as read and in fp32, and for the rule two of each in fp32 with a count in int64; the histograms beside."""
    return (terms + 1) * piece * 12 + terms * piece * 8 + piece * 40 + (terms + 2) * (1 << 20)


def combine_checkpoints(
    coefficients: Mapping[str, float],
    base: str | Path,
    checkpoints: Mapping[str, str | Path],
    output: str | Path,
    *,
    method: Method | None = None,
    dtype: str | None = None,
    piece: int = PIECE,
    progress: bool = True,
) -> Path:
    """Write base + scale * method(w_1 (W_1 - base), ..., w_T (W_T - base)) as a checkpoint with the base's
    shards and other files.

    A sum is computed as (1 - sum of w) base + sum of w W, so that 1.0*a is a and a - a is the base, to the
    bit. Everything is fp32 and rounded once. TIES' thresholds are those of the whole flattened vector; tied
    weights are in it once. The folder appears under its name when it is complete; an interrupted call, made
    again with the same arguments, goes on at the tensor where it was.

    Args:
        coefficients: w by name, as `parse` gives it; zeros are left out.
        base: folder of the checkpoint that the others were trained from.
        checkpoints: the folder of every name.
        output: a folder that does not exist yet.
        method: Method; default the sum.
        dtype: "fp32", "bf16" or "fp16" of the output; default as the base has it.
        piece: elements that are read at a time.
        progress: show a bar on stderr.
    Returns: the output folder.
    Raises: ValueError where checkpoints differ in their tensors or shapes, are quantized, damaged or
        incomplete, or the output exists; OSError where there is no space or right to write.
    """
    job = _plan(coefficients, Path(base), checkpoints, Path(output), method or Method(), dtype, piece)
    if job.output.exists():
        raise ValueError(f"--output {job.output} exists: name another folder, or remove it")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    work = job.output.parent / f"{TEMP_PREFIX}{job.output.name}-arithmetic"
    work.mkdir(exist_ok=True)
    try:
        with locked(work / _LOCK):
            _run_or_clear(job, work, progress)
    except LockedError as error:
        raise ValueError(
            f"--output {job.output} is being written by another run: {error}. Wait until it ends, or name"
            " another"
        ) from None
    os.replace(work, job.output)
    return job.output


@dataclass(frozen=True)
class _Job:
    """What is computed: all of it is known before anything is written."""

    base: Checkpoint
    others: list[Checkpoint]
    weights: list[float]
    output: Path
    method: Method
    files: dict[str, dict[str, Entry]]
    piece: int

    @property
    def tensors(self) -> list[str]:
        return [name for tensors in self.files.values() for name in tensors]

    def description(self) -> dict[str, Any]:
        """What an interrupted job must share with the one that goes on with it."""
        sources = {checkpoint.name: checkpoint.identity() for checkpoint in (self.base, *self.others)}
        kinds = {name: entry.dtype for tensors in self.files.values() for name, entry in tensors.items()}
        return {
            "coefficients": dict(zip([other.name for other in self.others], self.weights, strict=True)),
            "method": vars(self.method),
            "sources": sources,
            "dtypes": hashlib.sha256(json.dumps(kinds).encode()).hexdigest(),
        }


def _plan(
    coefficients: Mapping[str, float],
    base: Path,
    folders: Mapping[str, str | Path],
    output: Path,
    method: Method,
    dtype: str | None,
    piece: int,
) -> _Job:
    if dtype is not None and dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype: got {dtype!r}, expected fp32, bf16 or fp16")
    unknown = [name for name in coefficients if name not in folders]
    if unknown:
        raise ValueError(
            f"checkpoints: no folder is given for {unknown[0]!r}; known are {', '.join(folders) or 'none'}",
        )
    source = open_checkpoint(base, "base")
    named = {name: weight for name, weight in coefficients.items() if weight}
    others = [open_checkpoint(folders[name], name) for name in named]
    entries = {name: entry for name, entry in source.entries.items() if name != tied_twice(source)}
    for other in others:
        require_same_tensors(source, other, entries)
    files = layout(entries, _DTYPE_NAMES[dtype] if dtype else None)
    return _Job(source, others, list(named.values()), output, method, files, piece)


def _run_or_clear(job: _Job, work: Path, progress: bool) -> None:
    """Run the job; where its input turns out to be wrong, nothing stays that could be gone on with."""
    try:
        _run(job, work, progress)
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _run(job: _Job, work: Path, progress: bool) -> None:
    writers = {file: ShardWriter(work / file, tensors) for file, tensors in job.files.items()}
    journal = _resume(job, work)
    if journal is None:
        for path in work.iterdir():
            if path.name != _LOCK:
                path.unlink()
        _require_space(work, sum(writer.size for writer in writers.values()))
        _create(writers.values(), work)
        journal = {"job": job.description(), "done": 0}
        write_json(work / _JOURNAL, journal)
    with _bar(job, journal, progress) as bar:
        rule = _rule(job, journal, work, bar)
        _write(job, rule, writers, journal, work, bar)
    _finish(job, rule, work)


def _resume(job: _Job, work: Path) -> dict[str, Any] | None:
    """The journal of the same job; None where there is none or it is of another."""
    with contextlib.suppress(OSError, ValueError):
        journal = json.loads((work / _JOURNAL).read_text(encoding="utf-8"))
        if journal["job"] == json.loads(json.dumps(job.description())):
            return journal
    return None


def _require_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
        raise OSError(
            f"--output: {needed / 1e9:.1f} GB are needed at {work.parent}, {free / 1e9:.1f} GB are free: free"
            " some, or name another folder"
        )


def _create(writers: Iterable[ShardWriter], work: Path) -> None:
    try:
        for writer in writers:
            writer.create()
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(
            f"--output: there is no space for it at {work.parent} ({error}): free some, or name another"
            " folder"
        ) from error


def _bar(job: _Job, journal: dict[str, Any], progress: bool) -> Any:
    from tqdm import tqdm

    total = sum(entry.numel for tensors in job.files.values() for entry in tensors.values())
    return tqdm(
        total=total,
        unit="",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
        desc="arithmetic",
    )


def _rule(job: _Job, journal: dict[str, Any], work: Path, bar: Any) -> Rule:
    """The rule, from the journal where an interrupted run has made it."""
    terms = [other.name for other in job.others]
    if "rule" not in journal:
        pieces = functools.partial(_pieces, job, bar=bar)
        rule = prepare_rule(job.method, terms, pieces) if job.others else Rule(Method(), terms)
        journal["rule"] = {"thresholds": rule.thresholds, "majority": rule.majority}
        write_json(work / _JOURNAL, journal)
        bar.reset()
    return Rule(job.method, terms, journal["rule"]["thresholds"], journal["rule"]["majority"])


def _pieces(job: _Job, purpose: str, bar: Any) -> Iterator[Piece]:
    """Every piece of the weighted task vectors."""
    bar.reset()
    bar.set_description(purpose)
    for tensors in job.files.values():
        for name, entry in tensors.items():
            for start, count in pieces_of(entry.numel if entry.is_float else 0, job.piece):
                yield _piece(job, name, start, count)[1]
                bar.update(count)


def _piece(job: _Job, name: str, start: int, count: int) -> tuple[Tensor, Piece]:
    """Elements of the base, fp32, and of the weighted task vectors."""
    base = job.base.read(name, start, count).float()
    vectors = [
        (other.read(name, start, count).float() - base).mul_(weight)
        for other, weight in zip(job.others, job.weights, strict=True)
    ]
    return base, Piece(name, start, vectors)


def _write(
    job: _Job,
    rule: Rule,
    writers: Mapping[str, ShardWriter],
    journal: dict[str, Any],
    work: Path,
    bar: Any,
) -> None:
    bar.set_description("writing")
    done = journal["done"]
    for number, (file, name) in enumerate(
        (file, name) for file, tensors in job.files.items() for name in tensors
    ):
        entry = job.files[file][name]
        if number >= done:
            for start, count in pieces_of(entry.numel, job.piece):
                writers[file].write(
                    name,
                    start,
                    _values(job, rule, name, start, count).to(DTYPES[entry.dtype]),
                )
                bar.update(count)
            writers[file].sync()
            journal["done"] = number + 1
            write_json(work / _JOURNAL, journal)
        else:
            bar.update(entry.numel)


def _values(job: _Job, rule: Rule, name: str, start: int, count: int) -> Tensor:
    """Elements of the result: fp32, or what is no float as the base has it."""
    if not job.base.entries[name].is_float or not job.others:
        return job.base.read(name, start, count)
    if job.method.name == "sum":
        return _sum(job, name, start, count)
    base, piece = _piece(job, name, start, count)
    return base.add_(rule.merge(piece))


def _sum(job: _Job, name: str, start: int, count: int) -> Tensor:
    """(1 - sum of w) base + sum of w W; a checkpoint of weight 0 is not read."""
    weights = [weight * job.method.scale for weight in job.weights]
    rest = 1.0 - sum(weights)
    parts = [
        (checkpoint, weight)
        for checkpoint, weight in zip((job.base, *job.others), (rest, *weights), strict=True)
        if weight
    ]
    first, weight = parts[0]
    total = first.read(name, start, count).float().mul_(weight)
    for checkpoint, weight in parts[1:]:
        total.add_(checkpoint.read(name, start, count).float(), alpha=weight)
    return total


def _finish(job: _Job, rule: Rule, work: Path) -> None:
    """The other files, the index and the record; then nothing is left that the folder shall not have."""
    names = {
        path.name for path in job.base.folder.iterdir() if path.is_file() and path.suffix not in _WEIGHT_FILES
    }
    for name in sorted(names - {"model.safetensors.index.json", _RECORD, _JOURNAL, _LOCK}):
        shutil.copyfile(job.base.folder / name, work / name)
    if len(job.files) > 1 or next(iter(job.files)) != "model.safetensors":
        places = {name: file for file, tensors in job.files.items() for name in tensors}
        size = sum(entry.nbytes for tensors in job.files.values() for entry in tensors.values())
        write_json(
            work / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": places},
        )
    _note_dtype(job, work / "config.json")
    made = {"thresholds": list(rule.thresholds), "majority": rule.majority} if job.method.elects else {}
    record = {
        "base": str(job.base.folder),
        "checkpoints": {other.name: str(other.folder) for other in job.others},
        "coefficients": dict(zip([other.name for other in job.others], job.weights, strict=True)),
    }
    write_json(work / _RECORD, record | {"method": vars(job.method)} | made)
    (work / _JOURNAL).unlink()


def _note_dtype(job: _Job, config: Path) -> None:
    """Let config.json say the dtype that the output has, where that was asked for."""
    kinds = {
        str(DTYPES[entry.dtype]).removeprefix("torch.")
        for tensors in job.files.values()
        for entry in tensors.values()
        if entry.is_float
    }
    if not config.is_file() or len(kinds) != 1:
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if key in values and values[key] not in kinds:
        write_json(config, values | {key: kinds.pop()})
