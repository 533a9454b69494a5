"""Interleaved timing of several providers of one result: verified first, then measured in turn within every
round."""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .machine import Load, describe

__all__ = [
    "CAP_S",
    "OURS",
    "Provider",
    "Row",
    "Spec",
    "Timing",
    "main",
    "measure",
    "measure_spec",
    "write_csv",
]

OURS = "peftkern"
CAP_S = 5.0  # a provider whose one call takes longer is measured once, and its row says so
# a sample repeats a call until it takes this long: the clock and the scheduler stay below a percent
SAMPLE_S = 0.004


@dataclass(frozen=True)
class Spec:
    """What is measured: one kernel on one shape."""

    kernel: str
    mode: str
    dtype: str
    n: int
    k: int
    m: int = 0

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.k}"

    @property
    def id(self) -> str:
        return "-".join(str(v) for v in (self.kernel, self.mode, self.dtype, self.shape, self.m)).replace(
            " ", "_"
        )


@dataclass(frozen=True)
class Provider:
    """One way to compute it. `check` gets what `call` returned and raises where it is wrong; `moved`: bytes a
    call must read and write."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], None]
    moved: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds a call, by round, and `other/ours` by round; `once`: over the cap, measured once."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    once: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the CSV. `ratio`: this provider's time divided by peftkern's, per round, then the median;
    above 1, peftkern is faster."""

    device: str
    isa: str
    threads: int
    versions: str
    kernel: str
    provider: str
    mode: str
    dtype: str
    shape: str
    M: int
    p20: float
    p50: float
    p80: float
    ratio: float
    unit: str
    load: str
    gb_per_s: float = 0.0
    note: str = ""


def _once(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    providers: Sequence[Provider], *, rounds: int = 15, cap_s: float = CAP_S, ours: str = OURS
) -> dict[str, Timing]:
    """Every provider checked on its first call, which is also its warm-up; then `rounds` rounds in which each
    is timed in turn.

    The order turns by one each round, so that nobody always runs in the caches (or the clock speed) another
    left behind. A peer whose result is wrong here is named and left out: bitsandbytes' repacked weights, say,
    round fp32 activations to bf16.
    """
    first: dict[str, float] = {}
    for provider in providers:
        seconds, result = _once(provider.call)
        try:
            provider.check(result)
        except AssertionError as error:
            if provider.name == ours:
                raise
            words = f"{provider.name}: left out, as its result is wrong on this machine ({error})"
            print(words, file=sys.stderr)
            continue
        first[provider.name] = seconds
    providers = [p for p in providers if p.name in first]
    timed = [p for p in providers if first[p.name] <= cap_s]
    repeats = {p.name: max(1, int(SAMPLE_S / max(_once(p.call)[0], 1e-7))) for p in timed}
    samples: dict[str, list[float]] = {p.name: [] for p in timed}
    for number in range(rounds):
        turn = number % len(timed) if timed else 0
        for provider in timed[turn:] + timed[:turn]:
            samples[provider.name].append(_sample(provider.call, repeats[provider.name]))
    return {p.name: _timing(p.name, samples, first, ours) for p in providers}


def _timing(name: str, seconds: dict[str, list[float]], first: dict[str, float], ours: str) -> Timing:
    once = name not in seconds
    own = (first[name],) if once else tuple(seconds[name])
    if ours not in seconds:
        return Timing(own, (), once)
    reference = seconds[ours]
    ratios = (
        tuple(own[0] / r for r in reference)
        if once
        else tuple(a / b for a, b in zip(own, reference, strict=True))
    )
    return Timing(own, ratios, once)


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure_spec(
    spec: Spec, providers: Sequence[Provider], *, rounds: int, cap_s: float = CAP_S
) -> list[Row]:
    """The CSV rows of one spec, milliseconds a call."""
    load = Load()
    timings = measure(providers, rounds=rounds, cap_s=cap_s)
    words = load.words()
    rows = []
    for provider in (p for p in providers if p.name in timings):
        timing = timings[provider.name]
        p20, p50, p80 = (_quantile(timing.seconds, q) * 1e3 for q in (0.2, 0.5, 0.8))
        ratio = statistics.median(timing.ratios) if timing.ratios else float("nan")
        rate = provider.moved / p50 / 1e6 if provider.moved else 0.0
        note = "one call only, over the time cap" if timing.once else ""
        what = (spec.kernel, provider.name, spec.mode, spec.dtype, spec.shape, spec.m)
        rows.append(Row(*describe(), *what, p20, p50, p80, ratio, "ms", words, rate, note))
    return rows


def show(row: Row) -> None:
    rate = f"  {row.gb_per_s:6.1f} GB/s" if row.gb_per_s else ""
    what = f"{row.kernel:13s} {row.mode:22s} {row.dtype:9s} {row.shape:11s} M={row.M:<5d} {row.provider:26s}"
    print(f"{what} {row.p50:11.4f} {row.unit}  x{row.ratio:8.3f}{rate}  {row.note}", flush=True)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Append to a CSV, with its header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument(
        "--small", action="store_true", help="small shapes, seconds in all; a smoke run, not a result"
    )
    p.add_argument("--isa", help="force a level the CPU has: baseline, avx2, avx512, avx512bf16, amx")
    p.add_argument("--out", type=Path, help="append the rows to this CSV")
    p.add_argument("--rounds", type=int, default=0, help="rounds; default 15, small 3")
    p.add_argument(
        "--cap", type=float, default=CAP_S, help="seconds above which a provider's one call is measured once"
    )
    return p


def force_isa(name: str | None) -> None:
    if name:
        from peftkern.runtime import backends

        backends.native().set_isa(name)


def main(
    specs: Callable[[bool], list[Spec]], build: Callable[[Spec], list[Provider]], description: str | None
) -> int:
    """The command line of a benchmark of kernels."""
    p = parser(description)
    p.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only the measurements whose name holds this, as float32-49152x576",
    )
    args = p.parse_args()
    os.environ.setdefault("PEFTKERN_BNB_BACKEND", "0")
    force_isa(args.isa)
    rounds = args.rounds or (3 if args.small else 15)
    busy, chosen = False, [spec for spec in specs(args.small) if args.only in spec.id]
    if not chosen:
        p.error(
            f"--only {args.only}: no such measurement; there are: "
            f"{', '.join(spec.id for spec in specs(args.small))}"
        )
    for spec in chosen:
        rows = measure_spec(spec, build(spec), rounds=rounds, cap_s=args.cap)
        for row in rows:
            show(row)
        if args.out:
            write_csv(args.out, rows)
        busy |= rows[0].load.endswith("BUSY")
    if busy:
        print(
            "warning: other processes used the CPU meanwhile; the load column says how much. Do not "
            "record these numbers.",
            file=sys.stderr,
        )
    return 0
