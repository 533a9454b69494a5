"""Which combinations of libraries the matrix runs, and what is written down of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "CAPPED",
    "CAPPED_TESTS",
    "ISAS",
    "LIBRARIES",
    "NEWEST",
    "Combination",
    "Result",
    "combinations",
    "lower_bounds",
    "pairs",
]

NEWEST = "newest"
TORCHES = ("2.11.0", "2.13.0", NEWEST)
# They are taken together, all at their oldest supported version or all at their newest.
LIBRARIES = ("peft", "bitsandbytes", "trl")
ISAS = ("native", "avx2")
CAPPED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CAPPED_TESTS = ("-m", "not slow and not gpu and not any_isa")


@dataclass(frozen=True)
class Combination:
    """One environment: versions, each exact or "newest". libraries: of PEFT, bitsandbytes and TRL, in this
    order."""

    torch: str
    transformers: str
    libraries: tuple[str, ...]

    @property
    def name(self) -> str:
        """A folder's name."""
        return "-".join(
            (f"transformers-{self.transformers}", *map("-".join, zip(LIBRARIES, self.libraries, strict=True)))
        )

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for, beside torch."""
        wanted = zip(("transformers", *LIBRARIES), (self.transformers, *self.libraries), strict=True)
        return [name if version == NEWEST else f"{name}=={version}" for name, version in wanted]


@dataclass(frozen=True)
class Result:
    """A line of the record. versions: what was really installed; outcome: "passed", "failed", or why nothing
    could be run."""

    torch: str
    transformers: str
    peft: str
    bitsandbytes: str
    trl: str
    python: str
    cpu: str
    isa: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    outcome: str

    @property
    def key(self) -> tuple[str, ...]:
        """A later line with the same key takes this one's place."""
        return (
            self.torch,
            self.transformers,
            self.peft,
            self.bitsandbytes,
            self.trl,
            self.python,
            self.cpu,
            self.isa,
        )


def lower_bounds(pyproject: str) -> dict[str, str]:
    """The oldest supported version of each library, from the text of pyproject.toml: {"transformers": "5.17",
    ...}.

    Raises: ValueError where a library has no lower bound, or two different ones.
    """
    found: dict[str, str] = {}
    for name in ("transformers", *LIBRARIES):
        bounds = set(re.findall(rf'"{name}>=([\d.]+)', pyproject))
        if len(bounds) != 1:
            raise ValueError(
                f"pyproject.toml: got the lower bounds {sorted(bounds)} for {name}, expected one"
            )
        found[name] = bounds.pop()
    return found


def combinations(oldest: dict[str, str], torches: Sequence[str] = TORCHES) -> list[Combination]:
    """Every torch with the oldest and the newest transformers, and with the oldest and the newest of the
    other libraries."""
    libraries = (tuple(oldest[name] for name in LIBRARIES), (NEWEST,) * len(LIBRARIES))
    return [
        Combination(*parts)
        for parts in itertools.product(torches, (oldest["transformers"], NEWEST), libraries)
    ]


def pairs(all_of_them: Iterable[Combination]) -> list[Combination]:
    """A part of them in which every two choices still meet: the one with the most pairs not yet met, again
    and again."""
    left = list(all_of_them)
    missing = set().union(*map(_choices, left)) if left else set()
    chosen = []
    while missing:
        best = max(left, key=lambda item: len(_choices(item) & missing))
        chosen.append(best)
        missing -= _choices(best)
    return chosen


def _choices(item: Combination) -> set[tuple[object, ...]]:
    parts = (("torch", item.torch), ("transformers", item.transformers), ("libraries", item.libraries))
    return set(itertools.combinations(parts, 2))
