"""How several task vectors become one: their sum, TIES with one threshold for the whole vector, DARE by a
seeded mask.

A task vector is seen in pieces, in the same order at every pass, so that none is ever whole in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "METHODS",
    "KthMagnitude",
    "Method",
    "Piece",
    "Rule",
    "dare_keeps",
    "disjoint_mean",
    "elect",
    "prepare_rule",
    "trim",
]

METHODS = ("sum", "ties", "dare", "dare_ties")
_FINE_BITS = (
    15  # of the 31 bits of a magnitude, the first pass counts by the upper 16, the second by the lower 15
)
_INFINITE = 0x7F800000 >> _FINE_BITS
_A_BLOCK = 8  # numbers of 32 bits that one step of Philox's counter gives


class Piece(NamedTuple):
    """Elements `start`, `start + 1`, ... of the tensor `name`: of each task vector, fp32, all of one shape,
    scaled by its coefficient."""

    name: str
    start: int
    vectors: list[Tensor]


@dataclass(frozen=True)
class Method:
    """What becomes of the task vectors: "sum"; "ties" (trim, elect, disjoint mean); "dare" (drop, rescale,
    sum); "dare_ties" (drop, rescale, elect, disjoint mean). density: the part that TIES keeps. drop: DARE's
    probability. scale: the lambda of the result."""

    name: str = "sum"
    density: float = 0.2
    drop: float = 0.9
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method: got {self.name!r}, expected one of {', '.join(METHODS)}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(
                f"density: got {self.density}, expected more than 0 and at most 1 (the part of the entries"
                " that TIES keeps)"
            )
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(
                f"drop: got {self.drop}, expected at least 0 and less than 1 (the part of the entries that"
                " DARE drops)"
            )
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"scale: got {self.scale}, expected a finite number")

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return self.name in ("ties", "dare_ties")


class KthMagnitude:
    """The exact k-th greatest magnitude of an fp32 vector, seen twice in pieces: a histogram of the upper 16
    bits, then one of the lower 15 bits within the bin that holds it."""

    def __init__(self) -> None:
        self.coarse = torch.zeros(1 << 16, dtype=torch.int64)
        self.fine = torch.zeros(1 << _FINE_BITS, dtype=torch.int64)
        self.bin, self.rest = -1, 0

    def count(self, piece: Tensor) -> None:
        """The first pass."""
        bits = _bits(piece) >> _FINE_BITS
        self.coarse += torch.bincount(bits, minlength=len(self.coarse)).cpu()

    def narrow(self, k: int) -> None:
        """Between the passes: which bin holds the k-th."""
        if int(self.coarse[_INFINITE:].sum()):
            raise ValueError(
                "a task vector is not finite (NaN or infinite entries): its checkpoint or its base is damaged"
            )
        self.bin, self.rest = _from_above(self.coarse, k)

    def refine(self, piece: Tensor) -> None:
        """The second pass."""
        bits = _bits(piece)
        within = bits[(bits >> _FINE_BITS) == self.bin] & ((1 << _FINE_BITS) - 1)
        self.fine += torch.bincount(within, minlength=len(self.fine)).cpu()

    def value(self) -> float:
        """The k-th greatest magnitude."""
        low, _ = _from_above(self.fine, self.rest)
        return torch.tensor((self.bin << _FINE_BITS) | low, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: Tensor) -> Tensor:
    return piece.abs().reshape(-1).view(torch.int32)


def _from_above(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th greatest, and how manieth greatest in its bin it is."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, k))
    before = int(above[index - 1]) if index else 0
    return len(counts) - 1 - index, k - before


def trim(vector: Tensor, threshold: float) -> Tensor:
    """The entries whose magnitude reaches the threshold, a number of fp32; 0 elsewhere."""
    if threshold == 0.0:
        return vector
    # hardshrink keeps what is greater than its bound, and is fifteen times as fast as torch.where (Emerald
    # Rapids, torch 2.13).
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()
    return torch.nn.functional.hardshrink(vector, below)


def elect(total: Tensor, majority: float) -> Tensor:
    """The sign of every entry of the summed task vectors; where they cancel, the sign of the sum of all
    signs, as in the code of TIES' authors."""
    signs = total.sign()
    return signs.add_(1.0 - signs.abs(), alpha=majority)


def disjoint_mean(vectors: Sequence[Tensor], signs: Tensor) -> Tensor:
    """The mean, entry by entry, of those task vectors that are not zero there and have the elected sign; 0
    where none has."""
    total, count = torch.zeros_like(signs), torch.zeros_like(signs)
    for vector in vectors:
        agreeing = (vector * signs).clamp_(min=0.0)
        total += agreeing
        count += agreeing.sign()
    return total.mul_(signs).div_(count.clamp_(min=1.0))


def dare_keeps(count: int, start: int, *, drop: float, seed: int, tensor: str, term: str) -> Tensor:
    """Which of the elements start, ..., start + count - 1 of a tensor DARE keeps: bool [count], each by
    itself with probability 1 - drop.

    A pure function of its arguments: Philox 4x64-10, its key a hash of seed, tensor and term, its counter the
    element. It does not depend on how the tensor is cut into pieces, nor on the device.
    """
    import numpy

    digest = hashlib.blake2b(f"{seed}\0{tensor}\0{term}".encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    block, skip = divmod(start, _A_BLOCK)
    bits = numpy.random.Philox(key=key).advance(block).random_raw((skip + count + 1) // 2 + _A_BLOCK)
    uniform = bits.astype("<u8").view("<u4")[skip : skip + count]
    return torch.from_numpy(uniform >= numpy.uint64(int(drop * 2**32)))


class Rule:
    """A method made ready for its task vectors: with TIES it knows the thresholds and the majority sign of
    the whole."""

    def __init__(
        self,
        method: Method,
        terms: Sequence[str],
        thresholds: Sequence[float] = (),
        majority: float = 0.0,
    ) -> None:
        self.method, self.terms = method, tuple(terms)
        self.thresholds, self.majority = tuple(thresholds), majority

    def sparse(self, piece: Piece) -> list[Tensor]:
        """The piece's task vectors as trimmed or dropped."""
        method = self.method
        if method.name == "ties" and self.thresholds:
            return [
                trim(vector, threshold)
                for vector, threshold in zip(piece.vectors, self.thresholds, strict=True)
            ]
        if method.name not in ("dare", "dare_ties"):
            return piece.vectors
        return [
            self._dropped(piece, vector, term) for vector, term in zip(piece.vectors, self.terms, strict=True)
        ]

    def _dropped(self, piece: Piece, vector: Tensor, term: str) -> Tensor:
        method = self.method
        keeps = dare_keeps(
            vector.numel(),
            piece.start,
            drop=method.drop,
            seed=method.seed,
            tensor=piece.name,
            term=term,
        )
        return (vector * keeps.to(vector.device).view(vector.shape)).div_(1.0 - method.drop)

    def merge(self, piece: Piece) -> Tensor:
        """The merged entries of the piece."""
        vectors = self.sparse(piece)
        merged = (
            disjoint_mean(vectors, elect(_total(vectors), self.majority))
            if self.method.elects
            else _total(
                vectors,
            )
        )
        return merged if self.method.scale == 1.0 else merged * self.method.scale


def _total(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def prepare_rule(method: Method, terms: Sequence[str], pieces: Callable[[str], Iterable[Piece]]) -> Rule:
    """The rule of a method for the task vectors `terms`; `pieces(purpose)` gives all of their pieces, once
    for each pass.

    "ties" takes three passes: two histograms for the thresholds, exact to the bit, and the sum of the signs;
    "dare_ties" the last only.
    """
    rule = Rule(method, terms)
    if method.name == "ties":
        rule = Rule(method, terms, _thresholds(method.density, len(terms), pieces))
    if method.elects:
        votes = sum(
            float(_total(rule.sparse(piece)).sign().sum(dtype=torch.float64))
            for piece in pieces("majority sign")
        )
        rule.majority = float((votes > 0) - (votes < 0))
    return rule


def _thresholds(density: float, terms: int, pieces: Callable[[str], Iterable[Piece]]) -> list[float]:
    counters, length = [KthMagnitude() for _ in range(terms)], 0
    for piece in pieces("threshold, pass 1"):
        length += piece.vectors[0].numel()
        for counter, vector in zip(counters, piece.vectors, strict=True):
            counter.count(vector)
    for counter in counters:
        counter.narrow(max(1, int(density * length)))
    for piece in pieces("threshold, pass 2"):
        for counter, vector in zip(counters, piece.vectors, strict=True):
            counter.refine(vector)
    return [counter.value() for counter in counters]
