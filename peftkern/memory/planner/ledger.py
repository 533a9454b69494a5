"""A running account of what is in memory: pieces are made and freed in the order of a training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

__all__ = ["PHASES", "Ledger", "Part"]

PHASES = ("load", "forward", "loss", "mlp_backward", "attention_backward", "optimizer")


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    name: what it is. nbytes: how much. tier: "device", "pinned", "host" or "disk". phases: those of PHASES in
    which it is there. formula: how `nbytes` comes about, in the sizes of the model. source: where the formula
    is from, or how it is proven. group: the coloured band it belongs to in a picture. allocator: whether
    torch's allocator knows of it (`torch.cuda.max_memory_allocated`).
    """

    name: str
    nbytes: int
    tier: str = "device"
    phases: tuple[str, ...] = PHASES
    formula: str = ""
    source: str = ""
    group: str = "other"
    allocator: bool = True


@dataclass
class _Peak:
    nbytes: int = -1
    at: str = ""
    parts: tuple[Part, ...] = ()


@dataclass
class Ledger:
    """Parts alive now; of each phase the most bytes at once, where that was, and what was there.

    >>> ledger = Ledger()
    >>> ledger.make("forward", "norm", n1=(8, "h"))
    >>> ledger.free("n1")
    >>> ledger.total, ledger.peaks["forward"].nbytes
    (0, 8)
    """

    group: str = "activations"
    total: int = 0
    peaks: dict[str, _Peak] = field(default_factory=dict)
    _live: dict[str, Part] = field(default_factory=dict)

    def hold(self, parts: Iterable[Part]) -> None:
        """Parts that are there already, or come without an operator."""
        for part in parts:
            if part.name in self._live:
                part = _larger(part, self._live[part.name])
                self.free(part.name)
            self._live[part.name] = part
            self.total += part.nbytes

    def make(
        self, phase: str, at: str, *, scratch: tuple[int, str] = (0, ""), **pieces: tuple[int, str]
    ) -> None:
        """One operator: its results (bytes, formula) join what is there; `scratch` is there while it runs."""
        self.hold(
            Part(name, nbytes, phases=(phase,), formula=formula, group=self.group)
            for name, (nbytes, formula) in pieces.items()
            if nbytes
        )
        self.note(phase, at, scratch)

    def note(self, phase: str, at: str, scratch: tuple[int, str] = (0, "")) -> None:
        """What is there now, and `scratch`, may be the phase's peak."""
        peak = self.peaks.setdefault(phase, _Peak())
        if self.total + scratch[0] <= peak.nbytes:
            return
        peak.nbytes, peak.at, peak.parts = self.total + scratch[0], at, tuple(self._live.values())
        if scratch[0]:
            extra = Part(f"scratch: {at}", scratch[0], phases=(phase,), formula=scratch[1], group="scratch")
            peak.parts += (extra,)

    def free(self, *names: str) -> None:
        """Those of these parts that are there are gone."""
        for name in names:
            part = self._live.pop(name, None)
            if part is not None:
                self.total -= part.nbytes

    def keep(self, name: str, nbytes: int, formula: str, group: str) -> None:
        """Sets a part's size; 0 frees it."""
        self.free(name)
        if nbytes:
            self.hold([Part(name, nbytes, formula=formula, group=group)])

    def bytes_of(self, name: str) -> int:
        return self._live[name].nbytes if name in self._live else 0


def _larger(part: Part, old: Part) -> Part:
    return replace(part, nbytes=part.nbytes + old.nbytes)
