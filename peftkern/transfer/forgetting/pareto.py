"""The checkpoints worth keeping when two losses matter: those that no other beats in both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import atomic_directory, remove_directory

__all__ = ["ParetoFront", "Point"]


@dataclass(frozen=True)
class Point:
    """What was measured after a step: the target loss, the rise of the source loss with its standard error
    and its forecast, in nats."""

    step: int
    target: float
    rise: float
    standard_error: float
    forecast: float | None = None
    weight: float = 0.0

    def dominates(self, other: Point) -> bool:
        """Whether it is as good in both losses, and better in one."""
        no_worse = self.target <= other.target and self.rise <= other.rise
        return no_worse and (self.target, self.rise) != (other.target, other.rise)


class ParetoFront:
    """Points, and in `folder` (step-00010, ...) the adapters of those that no other dominates."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.points: list[Point] = []

    @property
    def front(self) -> list[Point]:
        """The points that none dominates, by step."""
        return [point for point in self.points if not any(other.dominates(point) for other in self.points)]

    def add(self, point: Point, save: Callable[[Path], None] | None = None) -> None:
        """Note a point; `save` writes its adapter where it is on the front, and adapters that it dominates
        are removed."""
        self.points.append(point)
        if self.folder is None:
            return
        front = {kept.step for kept in self.front}
        if save is not None and point.step in front:
            with atomic_directory(self.path(point.step)) as temporary:
                save(temporary)
        self._remove(lambda step: step not in front)

    def best(self, budget: float) -> Point | None:
        """The least target loss among the kept points whose measured rise is within the budget; None where no
        point is."""
        within = [
            point
            for point in self.front
            if point.rise <= budget and (self.folder is None or self.path(point.step).is_dir())
        ]
        return min(within, key=lambda point: point.target, default=None)

    def path(self, step: int) -> Path:
        """Where the adapter of a step is kept."""
        if self.folder is None:
            raise ValueError("this front keeps no adapters: it was made without a folder")
        return self.folder / f"step-{step:05d}"

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [dataclasses.asdict(point) for point in self.points]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on from it; adapters of later steps, which the run will come to again, are removed."""
        self.points = [Point(**values) for values in state]
        last = max((point.step for point in self.points), default=-1)
        self._remove(lambda step: step > last)

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.glob("step-*"):
            if path.name.removeprefix("step-").isdigit() and unwanted(int(path.name.removeprefix("step-"))):
                remove_directory(path)
