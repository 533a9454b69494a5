"""Loss curves: the same fine-tuning with and without peftkern's kernels, over several seeds.

A kernel that is wrong by a little shows here, where errors of hundreds of steps add up: the curves of the
patched model must lie within the noise that another seed makes among the stock ones. Runs `peftkern finetune`
on its sample; an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Window", "judge", "main", "windows"]

KINDS = {"peftkern": "--patch", "stock": "--no-patch"}


@dataclass(frozen=True)
class Window:
    """Steps [first, last]. means: each seed's mean loss, by kind. difference: patched - stock, the mean over
    seeds; same_seed: the largest of one seed. noise: the standard deviation of stock's means over seeds."""

    first: int
    last: int
    means: dict[str, list[float]]

    @property
    def pairs(self) -> list[float]:
        return [ours - stock for ours, stock in zip(self.means["peftkern"], self.means["stock"], strict=True)]

    @property
    def difference(self) -> float:
        return statistics.fmean(self.pairs)

    @property
    def same_seed(self) -> float:
        return max(self.pairs, key=abs)

    @property
    def noise(self) -> float:
        return statistics.stdev(self.means["stock"])


def windows(losses: dict[tuple[str, int], Sequence[float]], size: int) -> list[Window]:
    """losses[kind, seed] of every step, cut into windows of `size` steps."""
    seeds = sorted({seed for _, seed in losses})
    steps = {len(curve) for curve in losses.values()}
    if len(seeds) < 2 or len(steps) != 1 or set(losses) != {(kind, seed) for kind in KINDS for seed in seeds}:
        raise ValueError("losses: expected curves of one length, of both kinds, for at least two seeds")
    found = []
    for start in range(0, steps.pop(), size):
        part = {
            kind: [statistics.fmean(losses[kind, seed][start : start + size]) for seed in seeds]
            for kind in KINDS
        }
        found.append(Window(start + 1, start + len(losses["stock", seeds[0]][start : start + size]), part))
    return found


def judge(found: Sequence[Window]) -> list[str]:
    """The windows whose mean difference exceeds the noise between stock's seeds; none of them is what is
    wanted."""
    return [
        f"steps {w.first}-{w.last}: {w.difference:+.4f}, noise {w.noise:.4f}"
        for w in found
        if not abs(w.difference) <= w.noise
    ]


def _run(kind: str, seed: int, args: argparse.Namespace) -> list[float]:
    """The losses of one run, by step."""
    folder = args.work / f"{kind}-{seed}"
    if not (folder / "result.json").exists():
        options = [
            "--steps",
            args.steps,
            "--seq-length",
            args.seq_length,
            "--batch-size",
            args.batch_size,
            "--save-steps",
            args.steps,
        ]
        fixed = ["--dtype", "fp32", "--eval-tokens", "2048", "--sample-tokens", "1", "--resume", KINDS[kind]]
        command = [
            sys.executable,
            "-m",
            "peftkern",
            "finetune",
            "--output",
            folder,
            "--seed",
            seed,
            *options,
            *fixed,
        ]
        subprocess.run(list(map(str, command)), check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {row["step"]: row["loss"] for row in rows}
    if sorted(losses) != list(range(1, args.steps + 1)):
        raise RuntimeError(
            f"{folder}: {len(losses)} steps were logged, expected 1 to {args.steps}; delete the folder "
            "and run again"
        )
    return [losses[step] for step in sorted(losses)]


def _write_csv(path: Path, losses: dict[tuple[str, int], Sequence[float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = sorted(losses)
        writer.writerow(["step", *(f"{kind} seed {seed}" for kind, seed in keys)])
        writer.writerows(
            [step + 1, *(f"{losses[key][step]:.5f}" for key in keys)] for step in range(len(losses[keys[0]]))
        )


def _plot(path: Path, found: Sequence[Window]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    at = [(w.first + w.last) / 2 for w in found]
    for seed in range(len(found[0].means["stock"])):
        for kind, style in (("stock", "C7-"), ("peftkern", "C0--")):
            above.plot(
                at,
                [w.means[kind][seed] for w in found],
                style,
                label=kind if seed == 0 else None,
                linewidth=1,
            )
    below.fill_between(
        at,
        [-w.noise for w in found],
        [w.noise for w in found],
        color="C7",
        alpha=0.3,
        label="noise between stock's seeds",
    )
    below.plot(at, [w.difference for w in found], "C0-", label="peftkern - stock, mean over seeds")
    above.set_ylabel("training loss"), below.set_ylabel("difference"), below.set_xlabel("step")
    above.legend(), below.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_curves", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--window", type=int, default=25, help="steps to average over (default: 25)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("curves"),
        help="folder of the runs, kept for going on (default: curves)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for loss_curves.csv and loss_curves.png (default: --work)"
    )
    args = parser.parse_args(arguments)
    losses = {(kind, seed): _run(kind, seed, args) for seed in range(args.seeds) for kind in KINDS}
    found, out = windows(losses, args.window), args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "loss_curves.csv", losses)
    _plot(out / "loss_curves.png", found)
    print(f"{'steps':>9} {'stock':>8} {'peftkern':>9} {'mean diff':>10} {'one seed':>9} {'noise':>7}")
    for w in found:
        ours, stock = (statistics.fmean(w.means[kind]) for kind in ("peftkern", "stock"))
        print(
            f"{w.first:>4}-{w.last:<4} {stock:8.4f} {ours:9.4f} {w.difference:+10.5f} "
            f"{w.same_seed:+9.5f} {w.noise:7.4f}"
        )
    outside = judge(found)
    print(
        "every window lies within the noise between seeds"
        if not outside
        else "OUTSIDE THE NOISE\n" + "\n".join(outside)
    )
    return 1 if outside else 0


if __name__ == "__main__":
    raise SystemExit(main())
