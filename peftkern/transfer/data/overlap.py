"""Training text that the evaluation holds too: the words of each row that stand in a run of words of the
other side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .duplicates import words

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Overlap", "overlap"]

_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplication by it loses nothing modulo 2^64


@dataclass(frozen=True)
class Overlap:
    """How much of each evaluation row stands in the training text.

    coverage  [evaluation rows], the share of a row's words that lie in a run of `run` words which a training
    row has rows      evaluation rows with a coverage of `threshold` or more
    training  training rows that share a run with one of those
    """

    coverage: np.ndarray
    run: int
    threshold: float
    rows: tuple[int, ...]
    training: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        count = len(self.coverage)
        if not self.rows:
            return f"none of {count} evaluation rows is in the training text (runs of {self.run} words)"
        return (
            f"{len(self.rows)} of {count} evaluation rows ({len(self.rows) / count:.1%}) "
            "are in the training text, in "
            f"{len(self.training)} of its rows: the evaluation rewards learning by heart"
        )

    def draw(self, axes: Any) -> None:
        """How many evaluation rows are covered how far."""
        import numpy as np

        axes.hist(self.coverage, bins=np.linspace(0, 1, 21))
        axes.axvline(self.threshold, linestyle="--", color="black")
        axes.set(
            xlabel="share of an evaluation row's words that training has",
            ylabel="rows",
            title=self.verdict,
        )
        axes.set_yscale("symlog")


def overlap(
    training: Sequence[str],
    evaluation: Sequence[str],
    *,
    run: int = 13,
    threshold: float = 0.5,
) -> Overlap:
    """Compare every run of `run` words of the two texts; a row shorter than that counts where the other side
    has the same row.

    Runs are compared by 64-bit hashes, 8 bytes a word of memory. In chats leave out what all rows share (a
    system prompt) before.

    Args:
        run: words in a row; 13 as for GPT-3 (Brown et al., 2020, appendix C).
        threshold: the coverage from which an evaluation row counts as seen, in (0, 1].
    Raises: InputError for an empty side, a run below 1, a threshold outside (0, 1].
    """
    import numpy as np

    if not len(training) or not len(evaluation):
        raise InputError("overlap needs rows on both sides: give training and evaluation rows")
    if run < 1 or not 0 < threshold <= 1:
        raise InputError(
            f"overlap needs a run of 1 or more words and a threshold in (0, 1], got {run} and {threshold}",
        )
    hasher = _Hasher(run)
    theirs = [hasher.runs(text) for text in evaluation]
    ours = [hasher.runs(text) for text in training]
    seen = np.unique(np.concatenate(ours)) if ours else np.zeros(0, np.uint64)
    coverage = np.array(
        [_covered(runs, seen, run, length) for runs, length in zip(theirs, hasher.lengths, strict=False)],
    )
    rows = np.flatnonzero(coverage >= threshold)
    held = np.unique(np.concatenate([theirs[row] for row in rows])) if len(rows) else np.zeros(0, np.uint64)
    sources = [index for index, runs in enumerate(ours) if len(held) and _are_in(runs, held).any()]
    return Overlap(coverage, run, threshold, tuple(int(row) for row in rows), tuple(sources))


class _Hasher:
    """Rolling hashes of runs of words; `lengths` are those of the texts hashed so far, in words."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.lengths: list[int] = []
        self._ids: dict[str, int] = {}

    def runs(self, text: str) -> np.ndarray:
        """[max(1, words - run + 1)] uint64; of a shorter text one hash of the whole, of none nothing."""
        import numpy as np

        found = words(text)
        self.lengths.append(len(found))
        if not found:
            return np.zeros(0, np.uint64)
        ids = np.array([self._id(word) for word in found], dtype=np.uint64)
        size = min(self.run, len(ids))
        hashes = np.zeros(len(ids) - size + 1, np.uint64)
        for offset in range(size):
            hashes = hashes * np.uint64(_BASE) + ids[offset : offset + len(hashes)]
        # A short row is hashed with its length, so that it equals no other row's run by chance of the sum.
        return hashes if size == self.run else hashes ^ np.uint64(size * _BASE % 2**64)

    def _id(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return self._ids[word]


def _are_in(runs: np.ndarray, sorted_hashes: np.ndarray) -> np.ndarray:
    import numpy as np

    places = np.searchsorted(sorted_hashes, runs)
    return sorted_hashes[np.minimum(places, len(sorted_hashes) - 1)] == runs


def _covered(runs: np.ndarray, seen: np.ndarray, run: int, length: int) -> float:
    """The share of the words that lie in a run which was seen."""
    import numpy as np

    if not length or not len(seen):
        return 0.0
    hits = _are_in(runs, seen)
    marks = np.zeros(length + 1, dtype=np.int64)
    starts = np.flatnonzero(hits)
    np.add.at(marks, starts, 1)
    np.add.at(marks, np.minimum(starts + run, length), -1)
    return float((np.cumsum(marks[:-1]) > 0).mean())
