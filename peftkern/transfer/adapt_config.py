"""What `peftkern adapt` is told, and what it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from .dann import DomainProbe
    from .validators import LabelShift

__all__ = ["METHODS", "AdaptConfig", "AdaptReport"]

METHODS = ("dann", "mmd", "none")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Options of `adapt`: rows of text and label to learn from, rows of text to adapt to, and how."""

    model: str
    data: str
    target_data: str
    output: str = "out"
    test_data: str | None = None
    method: str = "mmd"
    strength: float = 1.0
    r: int = 8
    seq_length: int = 128
    batch_size: int = 16
    steps: int = 300
    lr: float = 1e-3
    eval_fraction: float = 0.1
    seed: int = 0
    patch: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name, least in (("r", 1), ("seq_length", 2), ("batch_size", 2), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} must be at least {least}, got {getattr(self, name)}")
        for name in ("strength", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 < self.eval_fraction < 1:
            raise InputError(f"--eval-fraction must be between 0 and 1, got {self.eval_fraction}")


@dataclass(frozen=True)
class AdaptReport:
    """What is known of the adapted model: accuracies where there are labels, and what needs none.

    majority: the part of the held-out source rows that have the commonest label; rows: their number.
    """

    source_accuracy: float
    majority: float
    rows: int
    target_accuracy: float | None
    information: float
    density: float
    shift: LabelShift
    probe: DomainProbe

    @property
    def collapsed(self) -> bool:
        """Whether the model may as well name the commonest class for all: its accuracy on held-out source
        rows is not two standard errors above that."""
        error = math.sqrt(self.source_accuracy * (1 - self.source_accuracy) / self.rows)
        return self.source_accuracy - 2 * error <= self.majority

    @property
    def verdict(self) -> str:
        """In words, a line each."""
        lines = [f"Accuracy on held-out source rows:  {self.source_accuracy:.3f}"]
        if self.collapsed:
            lines.append(
                f"Classes lost:  the commonest label alone is right in {self.majority:.3f}; "
                "give a smaller --strength, --method mmd, or more --steps"
            )
        if self.target_accuracy is not None:
            lines.append(f"Accuracy on --test-data:  {self.target_accuracy:.3f}")
        scores = f"information {self.information:.3f} nats, density {self.density:.3f}"
        lines.append(f"Target without labels:  {scores} (higher is better)")
        lines += [f"Classes:  {self.shift.verdict}", f"Domains:  {self.probe.verdict}"]
        return "\n".join(lines)
