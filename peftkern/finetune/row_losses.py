"""--row-losses: the loss of each training row in each epoch, noted from the losses that training makes
anyway."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from ..files import TEMP_PREFIX
from .errors import InputError
from .loss import watched_losses

if TYPE_CHECKING:
    import numpy

__all__ = ["RecordedLosses", "RowLossRecorder", "read_recorded"]

FIELDS = ("step", "epoch", "row", "tokens", "nats")


class RowLossRecorder(TrainerCallback):
    """Writes row_losses.csv: a line for each row, or piece of one, that a step trained on; nats are the sum
    over its tokens.

    A row is known by its token ids, which packing does not change; rows of equal ids share tokens and losses
    alike. Lines are written after each step; a resumed run drops those of steps that it makes again.
    """

    def __init__(self, path: Path, rows: Iterable[tuple[int, Sequence[int]]], *, length: int) -> None:
        self.path = path
        self._rows: dict[bytes, Counter[int]] = defaultdict(Counter)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._lines: list[tuple[int, int, float, float]] = []
        for number, ids in rows:
            for start in range(0, len(ids), length):
                self._rows[_key(ids[start : start + length])][number] += 1

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While the model, without wrappers, makes the loss of a batch."""
        self._seen = []
        with watched_losses(model, lambda losses, labels: self._seen.append((losses, labels))):
            yield

    def note(self, inputs: dict[str, Any], outputs: Any, *, epoch: int) -> None:
        """Keep what `watching` saw of a batch; where the loss was made from logits, what these give."""
        losses, labels = self._seen[-1] if self._seen else _of_logits(outputs, inputs)
        counted = (labels != -100).cpu()
        values = losses.detach().double().cpu()
        ids = inputs["input_ids"].cpu()
        for row, start, end in _segments(inputs):
            holders = self._rows.get(_key(ids[row, start:end].tolist()), Counter())
            tokens = int(counted[row, start:end].sum())
            nats = float(values[row, start:end][counted[row, start:end]].sum())
            shares = {number: times / holders.total() for number, times in holders.items() if tokens}
            self._lines += [(epoch, number, part * tokens, part * nats) for number, part in shares.items()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines of the steps that the checkpoint holds."""
        kept = [line for line in _lines(self.path) if line[0] <= state.global_step]
        temporary = self.path.with_name(f"{TEMP_PREFIX}{self.path.name}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows(map(_written, kept))
        temporary.replace(self.path)
        self._lines = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the step's batches gave."""
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows(_written((state.global_step, *line)) for line in self._lines)
        except OSError as error:
            told = f"could not write {self.path}: {error}. Free some disk space, then go on with --resume"
            raise OSError(told) from error
        self._lines = []


@dataclass(frozen=True)
class RecordedLosses:
    """nats [epochs, rows], a token, NaN where a row was not trained on; tokens [rows] that it has to
    learn."""

    nats: numpy.ndarray
    tokens: numpy.ndarray


def read_recorded(path: Path, rows: int) -> RecordedLosses:
    """What a run with --row-losses wrote, of data of so many rows.

    Raises: InputError for a file that is none, or that has other rows; FileNotFoundError.
    """
    import numpy

    if not path.is_file():
        raise FileNotFoundError(
            f"--row-losses {path}: no such file; it is in the --output of a run with --row-losses"
        )
    found = _lines(path)
    if not found:
        raise InputError(f"--row-losses {path} has no losses: give row_losses.csv of a run with --row-losses")
    largest = max(line[2] for line in found)
    if largest >= rows:
        raise InputError(
            f"--row-losses {path} has row {largest}, but the data has {rows}: give the data of that run"
        )
    epochs = 1 + max(line[1] for line in found)
    nats, tokens = numpy.zeros((epochs, rows)), numpy.zeros((epochs, rows))
    for _, epoch, row, count, value in found:
        nats[epoch, row] += value
        tokens[epoch, row] += count
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return RecordedLosses(nats / tokens, tokens.max(0).round().astype(numpy.int64))


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(torch.tensor(ids, dtype=torch.int32).numpy().tobytes(), digest_size=12).digest()


def _segments(inputs: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(batch row, start, end) of each example: of a window without padding by its positions, else without the
    padding on the right."""
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if mask is None and positions is not None:
        for row, places in enumerate(positions.cpu()):
            starts = [*(places == 0).nonzero().flatten().tolist(), len(places)]
            yield from ((row, start, end) for start, end in zip(starts, starts[1:], strict=False))
        return
    for row in range(len(ids)):
        yield row, 0, ids.shape[1] if mask is None else int(mask[row].sum())


def _of_logits(outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As the watcher's, of a model that makes its logits, a row at a time."""
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    rows = zip(outputs["logits"].detach(), labels.to(outputs["logits"].device), strict=True)
    return torch.stack([F.cross_entropy(row.float(), label, reduction="none") for row, label in rows]), labels


def _written(line: tuple[int, int, int, float, float]) -> tuple[Any, ...]:
    return (*line[:3], *(f"{value:.9g}" for value in line[3:]))


def _lines(path: Path) -> list[tuple[int, int, int, float, float]]:
    """Every complete line up to the first that is none: a killed process leaves its last one unfinished."""
    found: list[tuple[int, int, int, float, float]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    header, *lines = text.splitlines(keepends=True) or [""]
    if header.strip() != ",".join(FIELDS):
        return found
    for line in lines:
        cells = line.rstrip("\n").split(",")
        try:
            if not line.endswith("\n"):
                break
            step, epoch, row = map(int, cells[:3])
            tokens, nats = map(float, cells[3:])
        except ValueError:
            break
        if min(step, epoch, row) < 0 or not 0 < tokens < math.inf or not math.isfinite(nats):
            break
        found.append((step, epoch, row, tokens, nats))
    return found
