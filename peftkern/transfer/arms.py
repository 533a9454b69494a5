"""Yosinski's four arms: what is lost when layers of one network are put under new ones, and whether by
specificity or co-adaptation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .controls import copy_first
from .depth import below
from .intervals import Interval, over_runs, paired_runs

__all__ = ["ARMS", "ArmsReport", "four_arms"]

ARMS = ("BnB", "BnB+", "AnB", "AnB+")


@dataclass(frozen=True)
class ArmsReport:
    """Scores on task B, one a seed: `scores[arm][n]` with n layers transferred, and `base` of networks
    trained on B alone.

    BnB: layers of a network trained on B itself, frozen; AnB: of one trained on A, frozen; with +: fine-tuned
    too.
    """

    base: tuple[float, ...]
    scores: Mapping[str, Mapping[int, tuple[float, ...]]]

    def minus_base(self, arm: str, n: int) -> Interval:
        """The paired difference of an arm and the networks trained on B alone."""
        return paired_runs(self.scores[arm][n], self.base)

    def coadaptation(self, n: int) -> Interval:
        """BnB - base: what freezing loses although the layers are B's own, as those above were made together
        with them.
        """
        return self.minus_base("BnB", n)

    def specificity(self, n: int) -> Interval:
        """AnB - BnB: what the layers lose by being A's."""
        return paired_runs(self.scores["AnB"][n], self.scores["BnB"][n])

    @property
    def verdict(self) -> str:
        """The deepest transfer of frozen layers that loses nothing measurable, and what is lost beyond it."""
        depths = sorted(self.scores["AnB"])
        free = [n for n in depths if self.minus_base("AnB", n).sign != -1]
        lost = [n for n in depths if self.minus_base("AnB", n).sign == -1]
        if not lost:
            return (
                f"Frozen layers of A lose nothing measurable on B, up to all {depths[-1]} that were tried"
                f" ({len(self.base)} seeds)."
            )
        first = lost[0]
        why = "specificity" if self.specificity(first).sign == -1 else "no measurable specificity"
        if self.coadaptation(first).sign == -1:
            why += " and broken co-adaptation"
        deepest = max((n for n in free if n < first), default=0)
        lose = "layer of A loses" if deepest == 1 else "layers of A lose"
        kept = f"{deepest} frozen {lose} nothing measurable on B"
        return f"{kept}; {first} lose {self.minus_base('AnB', first)} by {why}."

    def table(self) -> str:
        """Mean and standard error of each arm by n, as a table of Markdown."""
        depths = sorted(self.scores["AnB"])
        lines = ["| arm | " + " | ".join(f"n = {n}" for n in depths) + " |", "|---|" + "--:|" * len(depths)]
        for arm in self.scores:
            cells = (over_runs(self.scores[arm][n]) for n in depths)
            lines.append(
                f"| {arm} | " + " | ".join(f"{cell.mean:.4f} ± {cell.se:.4f}" for cell in cells) + " |",
            )
        base = over_runs(self.base)
        return "\n".join([*lines, "", f"Base: {base.mean:.4f} ± {base.se:.4f}. {self.verdict}"])

    def draw(self, axes: Any) -> None:
        """The arms by the number of transferred layers, with standard errors."""
        base = over_runs(self.base)
        axes.axhline(base.mean, color="black", linestyle=":", label="base B")
        for arm in self.scores:
            depths = sorted(self.scores[arm])
            cells = [over_runs(self.scores[arm][n]) for n in depths]
            style = {
                "color": "tab:blue" if arm[0] == "A" else "tab:gray",
                "linestyle": "--" if arm.endswith("+") else "-",
            }
            axes.errorbar(
                depths,
                [cell.mean for cell in cells],
                [cell.se for cell in cells],
                marker="o",
                label=arm,
                **style,
            )
        axes.set_xticks(sorted({n for by in self.scores.values() for n in by}))
        axes.set(
            xlabel="layers transferred",
            ylabel="score on task B (± s.e.)",
            title=self.verdict.split(";")[0].split(" (")[0],
        )
        axes.legend()


def four_arms(
    make: Callable[[int], nn.Module],
    train: Callable[[nn.Module, str, int], None],
    score: Callable[[nn.Module], float],
    *,
    depths: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[str] = ARMS,
    progress: bool = False,
) -> ArmsReport:
    """Train a network on task A and one on task B, transfer the first n layers of each into new ones, train
    those on B, score them.

    Args:
        make: a new network for a seed.
        train: trains a network's trainable parameters in place on task "A" or "B", with a seed for its order
            of data.
        score: of a network on held-out data of B, higher is better.
        depths: the n to try.
    Source: Yosinski, Clune, Bengio and Lipson, 2014, How transferable are features in deep neural networks?,
    section 2.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"arms: got {unknown}, expected some of {ARMS}")
    if len(seeds) < 2:
        raise ValueError(f"seeds: got {tuple(seeds)}, expected at least two, else there is no standard error")
    scores: dict[str, dict[int, list[float]]] = {arm: {n: [] for n in depths} for arm in arms}
    base: list[float] = []
    bar = _bar(len(seeds) * (2 + len(arms) * len(depths)), progress)
    for seed in seeds:
        donors = {task: _trained(make(2 * seed), train, task, seed, bar) for task in "AB"}
        base.append(score(donors["B"]))
        for arm in arms:
            for n in depths:
                model = copy_first(donors[arm[0]], make(2 * seed + 1), n)
                for _, parameter in below(model, n):
                    parameter.requires_grad_(arm.endswith("+"))
                scores[arm][n].append(score(_trained(model, train, "B", seed, bar)))
    bar.close()
    return ArmsReport(
        tuple(base),
        {arm: {n: tuple(values) for n, values in by.items()} for arm, by in scores.items()},
    )


def _trained(
    model: nn.Module,
    train: Callable[[nn.Module, str, int], None],
    task: str,
    seed: int,
    bar: Any,
) -> nn.Module:
    train(model, task, seed)
    bar.update()
    return model


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="arms", unit="run", disable=not progress)
