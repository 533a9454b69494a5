"""What a run of `finetune --row-losses` noted of each row: which are learnt late, or never."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from .dynamics import Cartography

__all__ = ["RowDynamics", "row_dynamics"]


@dataclass(frozen=True)
class RowDynamics:
    """nats [epochs, rows]: a row's loss a token when it was trained on, NaN where it was not.

    A row whose loss stays high while those of others fall is mislabelled, garbled or simply hard: look at it.
    """

    nats: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """The rows that were trained on at all."""
        import numpy as np

        return np.flatnonzero(np.isfinite(self.nats).any(0))

    @property
    def mean(self) -> np.ndarray:
        """[rows]: the mean over the epochs in which a row was trained on, NaN for the others."""
        import numpy as np

        means = np.full(self.nats.shape[1], np.nan)
        means[self.seen] = np.nanmean(self.nats[:, self.seen], axis=0)
        return means

    def cartography(self) -> Cartography:
        """Confidence and variability of the rows `seen`, in their order; a probability is a token's."""
        import torch

        from .dynamics import LossDynamics

        seen = self.seen
        dynamics = LossDynamics(len(seen), len(self.nats))
        for epoch, losses in enumerate(self.nats[:, seen]):
            dynamics.note(epoch, range(len(seen)), losses=torch.from_numpy(losses))
        return dynamics.cartography()

    def above(self, percentile: float) -> tuple[int, ...]:
        """Rows whose mean loss is above that percentile of them, the largest first."""
        import numpy as np

        if not 0 <= percentile <= 100:
            raise InputError(f"the percentile of losses must be from 0 to 100, got {percentile}")
        mean = self.mean
        rows = np.flatnonzero(mean > np.nanpercentile(mean, percentile))
        return tuple(int(row) for row in rows[(-mean[rows]).argsort(kind="stable")])

    def course(self, row: int) -> str:
        """A row's losses, for people."""
        import numpy as np

        values = self.nats[:, row][np.isfinite(self.nats[:, row])]
        return f"{values[0]:.2f} nats a token when first seen, {values[-1]:.2f} when last"

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        import numpy as np

        epochs, rows = self.nats.shape
        trained = f"{len(self.seen)} of {rows} rows were trained on"
        first, last = (np.nanmedian(self.nats[epoch]) for epoch in (0, -1))
        if epochs == 1:
            return (
                f"{trained}, once each: a row's loss ({first:.2f} nats a token, the median) is from before it"
            )
        stays = np.nanpercentile(self.nats[-1], 95)
        course = f"the median row goes from {first:.2f} to {last:.2f} nats a token in {epochs} epochs"
        return f"{trained}; {course}, and one in twenty stays above {stays:.2f}"

    def draw(self, axes: Any) -> None:
        """The rows on the map of Swayamdipta et al. (2020)."""
        self.cartography().draw(axes)


def row_dynamics(path: Path, sources: Sequence[str], rows: int) -> RowDynamics:
    """What the run that wrote `path` noted of the rows of `sources`.

    Raises: InputError for a file that is none, or of a run on other data; FileNotFoundError.
    """
    from ...finetune.data import fingerprint
    from ...finetune.row_losses import read_recorded

    found = read_recorded(path, rows)
    record = path.with_name("run.json")
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        trained = [stored["data"].get(source) for source in stored["config"]["data"]]
        if trained != [fingerprint(source) for source in sources]:
            given = " ".join(sources)
            raise InputError(
                f"--row-losses {path} is of a run on other data than {given}: give the data of that run"
            )
    return RowDynamics(found.nats)
