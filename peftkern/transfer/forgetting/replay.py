"""Source text mixed into training: which rows a step replays depends on the step alone."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay:
    """The plan of which of `rows` source rows each step takes beside its `slots` training rows.

    ratio: source rows for each training row, exactly so over the whole run (0.05: every twentieth row brings
        one source row along).
    weight: of their loss, beside the sampling: the replay term of a step is weight / slots times the sum of
        the drawn rows' mean losses, in expectation ratio * weight times the source loss. The rows are drawn
        without replacement and shuffled anew each time round. Everything is a function of (seed, step): a
        resumed run draws what the unbroken one does.
    """

    rows: int
    ratio: float
    slots: int
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, expected at least 1: the source has no rows to replay")
        if not 0 < self.ratio <= 1 or self.slots < 1 or not self.weight > 0:
            raise ValueError(
                f"ratio, slots, weight: got {self.ratio}, {self.slots}, {self.weight}; expected 0 < ratio <="
                " 1, slots >= 1, weight > 0"
            )

    def rows_of(self, step: int) -> list[int]:
        """The source rows of optimizer step `step`, counted from 0."""
        return [
            self._row(number)
            for number in range(self._drawn(step * self.slots), self._drawn((step + 1) * self.slots))
        ]

    def _drawn(self, slots: int) -> int:
        """How many rows the first so many training rows have brought along."""
        return int(slots * self.ratio + 1e-9)

    def _row(self, number: int) -> int:
        turn, place = divmod(number, self.rows)
        seed = hashlib.blake2b(f"replay {self.seed} {turn}".encode(), digest_size=8).digest()
        order = list(range(self.rows))
        random.Random(int.from_bytes(seed, "little")).shuffle(order)
        return order[place]
