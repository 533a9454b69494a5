"""The plan of a run: what takes how much at which phase, whether it fits, and how far one could go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .budgets import Limits
from .cards import CPU, Card, this_card
from .ledger import PHASES, Ledger, Part
from .options import RunOptions
from .parts import fixed_parts, host_parts, total
from .schedule import run_step
from .shapes import Shape
from .step import Step
from .steptime import StepTime, step_time

__all__ = ["LONGEST", "Plan", "PhasePeak", "largest_batch", "longest", "phase_peaks", "plan", "predict"]

LONGEST = 1 << 24  # tokens that a search for the longest sequence goes up to


@dataclass(frozen=True)
class PhasePeak:
    """The fullest moment of a phase: bytes on the device, the operator that ran, and every part there
    then."""

    phase: str
    nbytes: int
    at: str
    parts: tuple[Part, ...]

    @property
    def allocated(self) -> int:
        """Of `nbytes`, what torch's allocator knows of."""
        return sum(part.nbytes for part in self.parts if part.allocator)


@dataclass(frozen=True)
class Plan:
    """What a run needs, and whether that is there.

    peaks: of every phase. host: parts that are not on the device. longest: the longest sequence that fits at
    this batch size; largest_batch: sequences of this length at a time; 0 where none fits. refusals: why the
    run cannot be planned as asked, though its bytes may fit. warnings: what may go otherwise.
    """

    shape: Shape
    options: RunOptions
    card: Card
    limits: Limits
    peaks: tuple[PhasePeak, ...]
    host: tuple[Part, ...]
    longest: int
    largest_batch: int
    time: StepTime
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def peak(self) -> PhasePeak:
        """The fullest phase."""
        return max(self.peaks, key=lambda peak: peak.nbytes)

    @property
    def device_bytes(self) -> int:
        return self.peak.nbytes

    def tier_bytes(self, tier: str) -> int:
        """Of "pinned", "host" or "disk"."""
        return total(list(self.host), tier)

    @property
    def shortages(self) -> dict[str, int]:
        """Bytes that are missing, by budget."""
        return _shortages(self.device_bytes, list(self.host), self.limits)

    @property
    def fits(self) -> bool:
        return not self.shortages and not self.refusals

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = asdict(self)
        plain |= {"fits": self.fits, "shortages": self.shortages, "device_bytes": self.device_bytes}
        plain |= {"peak_phase": self.peak.phase, "host_bytes": self.tier_bytes("host")}
        return plain | {"pinned_bytes": self.tier_bytes("pinned"), "disk_bytes": self.tier_bytes("disk")}


def phase_peaks(step: Step) -> tuple[PhasePeak, ...]:
    """Every phase's fullest moment."""
    always = fixed_parts(step)
    ledger = run_step(step, Ledger())
    found = []
    for phase in PHASES:
        fixed = [part for part in always if phase in part.phases and (phase != "load" or _loaded(part))]
        moving, at = _moving(ledger, phase, step)
        parts = (*fixed, *moving)
        found.append(PhasePeak(phase, sum(part.nbytes for part in parts), at, parts))
    return tuple(found)


def _loaded(part: Part) -> bool:
    return part.group not in ("adapters", "optimizer")


def _moving(ledger: Ledger, phase: str, step: Step) -> tuple[tuple[Part, ...], str]:
    if phase == "load":
        return (), "the last tensor"
    if phase == "optimizer":
        nbytes = step.shape.layers * step.layer_gradient // step.options.cards
        gradients = Part("gradients", nbytes, formula="adapters' elements", group="gradients")
        return ((gradients,) if nbytes else ()), "the update"
    peak = ledger.peaks[phase]
    return peak.parts, peak.at


def predict(shape: Shape, options: RunOptions, card: Card | None = None, *, allocated: bool = True) -> int:
    """Bytes at the peak of a training step on `card` (default: the current CUDA device, else the CPU).

    allocated: as `torch.cuda.max_memory_allocated` counts, without the CUDA context and paged optimizer
    states;
    False: all of it.
    """
    peaks = phase_peaks(Step(shape, options, card or this_card(), _isa(card)))
    return max(peak.allocated if allocated else peak.nbytes for peak in peaks)


def _isa(card: Card | None) -> str | None:
    """The CPU's instruction set, where the plan is for this CPU."""
    if card is not None and card is not CPU:
        return None
    try:
        from ...runtime.backends import native

        return native().isa()
    except (ImportError, RuntimeError, AttributeError):
        return None


def plan(shape: Shape, options: RunOptions, limits: Limits, card: Card | None = None) -> Plan:
    """The table of a run, what fits beside it, and how long a step takes."""
    from .refusals import refusals_of, warnings_of

    card = card or this_card()
    step = Step(shape, options, card, _isa(card))
    return Plan(
        shape=shape,
        options=options,
        card=card,
        limits=limits,
        peaks=phase_peaks(step),
        host=tuple(host_parts(step, limits)),
        longest=longest(shape, options, limits, card),
        largest_batch=largest_batch(shape, options, limits, card),
        time=step_time(step),
        refusals=tuple(refusals_of(step, limits)),
        warnings=tuple(warnings_of(step, limits)),
    )


def fits(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> bool:
    """Whether the bytes of every tier are within the limits."""
    step = Step(shape, options, card)
    return not _shortages(max(peak.nbytes for peak in phase_peaks(step)), host_parts(step, limits), limits)


def _shortages(device: int, host: list[Part], limits: Limits) -> dict[str, int]:
    missing = {
        "gpu": device - limits.gpu,
        "host": total(host, "pinned", "host") - limits.host,
        "pinned": total(host, "pinned") - limits.pinned,
        "disk": total(host, "disk") - limits.disk,
    }
    return {name: nbytes for name, nbytes in missing.items() if nbytes > 0}


def longest(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> int:
    """The most tokens of a sequence, at this batch size, that fit; 0 where one does not."""
    return _most(lambda length: fits(shape, options.but(length=length), limits, card), LONGEST)


def largest_batch(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> int:
    """The most sequences of this length at a time that fit; 0 where one does not."""
    return _most(lambda batch: fits(shape, options.but(batch=batch), limits, card), 1 << 14)


def _most(works: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that works, of those below which all do; memory grows with tokens."""
    if not works(1):
        return 0
    low, high = 1, 2
    while high <= limit and works(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
