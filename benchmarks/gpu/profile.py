"""The profile of a card in ten minutes: build, compile, test, measure two shapes against the peers, count
launches and bytes, report. `python -m benchmarks.gpu` without a part runs it."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .run import read_rows

__all__ = ["STAGES", "Stage", "command", "deadlines", "profile"]

SHAPES = ("4096x4096", "14336x4096")
LEAST_S = 3.0  # a stage with less time left is not begun
START_S = 12.0  # of a stage's time go to importing, and to ending in order


def _linears() -> Iterator[str]:
    """The graphs of two shapes, and one shape as a caller's Python runs it."""
    for dropout, shape, m in itertools.product(("0", "0.1"), SHAPES, (2048, 8192)):
        yield f"r 16, dropout {dropout} bfloat16 {shape} M={m} graph"
    yield f"r 16, dropout 0 bfloat16 {SHAPES[0]} M=2048 eager"


@dataclass(frozen=True)
class Stage:
    """A part, in a process of its own. seconds: of ten minutes; only: which of the part's cases, "|" between
    alternatives; options: beside."""

    part: str
    seconds: int
    only: str = ""
    options: tuple[str, ...] = ()


STAGES = (
    Stage("build", 180),
    Stage("warm", 75),
    Stage("tests", 75, options=("--first-cases",)),
    Stage("dequantize", 25, "|".join(f"nested bfloat16 {shape}" for shape in SHAPES)),
    Stage("decode", 45, "|".join(f"{s} M={m} graph" for m, s in itertools.product((1, 4, 16), SHAPES))),
    Stage("linear", 130, "|".join(_linears()), ("--no-compile",)),
    Stage("launches", 25),
    Stage("memory", 25, "4096x4096 M=2048"),
    Stage("report", 20),
)


def deadlines(minutes: float) -> dict[str, float]:
    """Seconds from the start by which each stage is stopped: what one leaves over, the next may use."""
    whole = sum(stage.seconds for stage in STAGES)
    ends = itertools.accumulate(stage.seconds * 60 * minutes / whole for stage in STAGES)
    return dict(zip((stage.part for stage in STAGES), ends, strict=True))


def command(stage: Stage, args: argparse.Namespace, limit_s: float) -> list[str]:
    """The stage's command line; shapes of `--small` are others, so that no case is left out there."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", stage.part, "--out", str(args.out)]
    words += ["--device", args.device, "--peers", str(args.peers), *stage.options]
    words += ["--rounds", str(args.rounds or (2 if args.small else 9))]
    words += ["--budget", f"{max(1.0, limit_s - START_S):.0f}"]
    words += ["--small"] if args.small else ["--only", stage.only] if stage.only else []
    return words + [f"--{name}" for name in ("interpret", "flush", "resume") if getattr(args, name)]


def profile(args: argparse.Namespace) -> int:
    """Every stage in its turn, whatever became of the ones before; 1 where one failed, had no time, or has
    rows that say error, such as tests that failed."""
    start, ends = time.monotonic(), deadlines(args.minutes)
    outcomes: dict[str, str] = {}
    for stage in STAGES:
        begun = time.monotonic()
        limit = start + ends[stage.part] - begun
        outcomes[stage.part] = _run(command(stage, args, limit), limit)
        if outcomes[stage.part] == "done" and (count := _errors(args.out / f"{stage.part}.csv")):
            outcomes[stage.part] = f"rows with errors: {count}"
        print(f"== {stage.part}: {outcomes[stage.part]}, {time.monotonic() - begun:.0f} s", flush=True)
    print(
        f"{time.monotonic() - start:.0f} s of {60 * args.minutes:.0f}; rows, logs and report.md in {args.out}"
    )
    failed = [f"{part} ({outcome})" for part, outcome in outcomes.items() if outcome != "done"]
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _errors(path: Path) -> int:
    return sum(row["note"].startswith("error") for row in read_rows(path))


def _run(words: Sequence[str], limit_s: float) -> str:
    if limit_s < LEAST_S:
        return "no time left"
    print("+", " ".join(words[1:]), flush=True)
    try:
        status = subprocess.run(words, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s, its rows so far are kept"
    return "done" if status == 0 else f"status {status}"
