"""Near duplicates: candidates by datasketch's MinHash and its bands, each verified by its true Jaccard
similarity."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .extras import require_data

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

__all__ = ["Duplicate", "Duplicates", "bands", "jaccard", "near_duplicates", "shingles", "words"]

_WORD = re.compile(r"\w+")
_PERMUTATIONS = 256
_FOUND = 0.99  # the least probability that a pair at the threshold becomes a candidate
UNITS = ("words", "characters")


@dataclass(frozen=True)
class Duplicate:
    """A row that is left out: its near duplicate that is kept, and their Jaccard similarity (1: the same
    shingles)."""

    row: int
    kept: int
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """Near duplicates among `rows` texts: what to leave out so that no verified pair is left, the longest
    kept.

    threshold: of the Jaccard similarity; candidates: pairs that were verified; found: the probability that a
    pair at the threshold becomes a candidate.
    """

    rows: int
    threshold: float
    dropped: tuple[Duplicate, ...]
    candidates: int
    found: float

    @property
    def exact(self) -> int:
        """How many of the rows left out have the same words as the kept one."""
        return sum(duplicate.similarity == 1.0 for duplicate in self.dropped)

    @property
    def clusters(self) -> dict[int, tuple[Duplicate, ...]]:
        """What is left out by the row that is kept for it, the largest cluster first."""
        groups: dict[int, list[Duplicate]] = {}
        for duplicate in self.dropped:
            groups.setdefault(duplicate.kept, []).append(duplicate)
        return {kept: tuple(group) for kept, group in sorted(groups.items(), key=lambda item: -len(item[1]))}

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if not self.dropped:
            return (
                f"no near duplicates among {self.rows} rows (Jaccard similarity of {self.threshold:g} or"
                " more)"
            )
        return (
            f"{len(self.dropped)} of {self.rows} rows ({len(self.dropped) / self.rows:.1%}) repeat another, "
            f"{self.exact} of them word for word, in {len(self.clusters)} clusters"
        )

    def draw(self, axes: Any) -> None:
        """How many clusters there are of each size."""
        sizes = [len(group) + 1 for group in self.clusters.values()]
        edges = [bound + 0.5 for bound in range(1, max(sizes, default=2) + 1)]
        axes.hist(sizes, bins=edges)
        axes.set(xlabel="rows of a cluster", ylabel="clusters", title=self.verdict)
        axes.set_yscale("symlog")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def shingles(text: str, size: int = 5, unit: str = "words") -> set[str]:
    """The sets of `size` words (or characters of its words) in a row; of a shorter text the whole, of none
    nothing."""
    parts: Sequence[str] = words(text)
    if unit == "characters":
        parts = " ".join(parts)
    joint = " " if unit == "words" else ""
    count = max(1, len(parts) - size + 1)
    return {joint.join(parts[start : start + size]) for start in range(count)} if parts else set()


def jaccard(left: set[str], right: set[str]) -> float:
    """|left and right| / |left or right|; 0 for two empty sets."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0


def bands(threshold: float, permutations: int = _PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows of a band): the longest bands with which a pair at the threshold is found with 99 %.

    A pair of similarity s is a candidate with probability 1 - (1 - s^rows)^bands. datasketch's own choice
    weighs misses like false candidates, and at its threshold finds 31 to 55 % (128 permutations, thresholds
    .5 to .9); here false candidates are verified and cost only time.

    >>> b, r = bands(0.8)
    >>> 1 - (1 - 0.8**r) ** b >= 0.99
    True
    """
    for rows in range(permutations // 2, 0, -1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= _FOUND:
            return permutations // rows, rows
    raise ValueError(
        f"threshold: got {threshold}, too small for {permutations} permutations: raise one of them",
    )


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.8,
    size: int = 5,
    unit: str = "words",
    permutations: int = _PERMUTATIONS,
    seed: int = 1,
    progress: bool = False,
) -> Duplicates:
    """The rows to leave out so that of near duplicates only the longest stays.

    Rows are looked at from the longest to the shortest; one whose Jaccard similarity to a row already kept is
    `threshold` or more is left out for the most similar of them. So every row left out has a near duplicate
    that is kept, and no chain of similar rows takes out what resembles nothing that stays. Memory: 8 bytes a
    permutation and row that is kept.

    Args:
        size, unit: of the shingles, "words" or (for languages written without spaces, and short rows)
            "characters".
        seed: of the permutations.
    Raises: InputError for no rows, a threshold outside (0, 1], another unit.
    Source: Broder, 1997, On the resemblance and containment of documents; Lee et al., 2021, arXiv:2107.06499.
    """
    require_data("datasketch")
    if not len(texts):
        raise InputError("there are no rows to compare: give at least one")
    if not 0 < threshold <= 1:
        raise InputError(f"the threshold of near duplicates must be above 0 and at most 1, got {threshold}")
    if unit not in UNITS or size < 1:
        raise InputError(f"shingles must be of 1 or more {' or '.join(UNITS)}, got {size} {unit}")
    search = _Search(texts, threshold, permutations, seed, lambda text: shingles(text, size, unit))
    dropped = search.run(progress)
    found = 1 - (1 - threshold**search.lsh.r) ** search.lsh.b
    return Duplicates(len(texts), threshold, tuple(dropped), search.candidates, found)


class _Search:
    """The rows kept so far, and what each further one is compared with."""

    def __init__(
        self,
        texts: Sequence[str],
        threshold: float,
        permutations: int,
        seed: int,
        cut: Callable[[str], set[str]],
    ) -> None:
        self.texts, self.threshold, self.cut = texts, threshold, cut
        self.lsh: MinHashLSH = _index(threshold, permutations)
        self.permutations, self.seed = permutations, seed
        self.same: dict[frozenset[str], int] = {}
        self.candidates = 0
        self._empty: MinHash | None = None

    def run(self, progress: bool) -> list[Duplicate]:
        from tqdm import tqdm

        order = sorted(range(len(self.texts)), key=lambda row: (-len(self.texts[row]), row))
        rows = tqdm(order, desc="near duplicates", unit="row", disable=not progress)
        found = [duplicate for row in rows if (duplicate := self._look(row)) is not None]
        return sorted(found, key=lambda duplicate: duplicate.row)

    def _look(self, row: int) -> Duplicate | None:
        """Its near duplicate among the kept rows; without one it is kept itself."""
        pieces = frozenset(self.cut(self.texts[row]))
        if not pieces:
            return None
        if pieces in self.same:
            return Duplicate(row, self.same[pieces], 1.0)
        signature = self._signature(pieces)
        best = max(
            self._verified(row, pieces, signature),
            key=lambda d: (d.similarity, -d.kept),
            default=None,
        )
        if best is not None and best.similarity >= self.threshold:
            return best
        self.same[pieces] = row
        self.lsh.insert(row, signature, check_duplication=False)
        return None

    def _verified(self, row: int, pieces: frozenset[str], signature: MinHash) -> Iterator[Duplicate]:
        for kept in self.lsh.query(signature):
            self.candidates += 1
            yield Duplicate(row, kept, jaccard(set(pieces), self.cut(self.texts[kept])))

    def _signature(self, pieces: frozenset[str]) -> MinHash:
        from datasketch import MinHash

        if self._empty is None:  # to copy: drawing the permutations costs more than a short row's hashes
            self._empty = MinHash(num_perm=self.permutations, seed=self.seed)
        signature = self._empty.copy()
        signature.update_batch([piece.encode() for piece in pieces])
        return signature


def _index(threshold: float, permutations: int) -> MinHashLSH:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=permutations, params=bands(threshold, permutations))
