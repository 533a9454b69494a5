"""python -m benchmarks.report DIR: the recorded CSVs as a markdown table with the targets, and a plot of a
few panels."""

from __future__ import annotations

import csv
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import panels

__all__ = ["TARGETS", "Target", "judge", "load", "main", "table"]

OURS = "peftkern"
Line = dict[str, str]


@dataclass(frozen=True)
class Target:
    """`over`: peers whose time, divided by ours, must reach `limit`. `under`: ours ÷ the fastest of these is
    at most `limit`."""

    kernel: str
    limit: float
    over: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    mode: str = ""
    dtype: str = ""
    shapes: tuple[str, ...] = ()
    m: tuple[int, ...] = ()

    def applies(self, line: Line) -> bool:
        wanted = (("kernel", self.kernel), ("mode", self.mode), ("dtype", self.dtype))
        sized = (not self.m or int(line["M"]) in self.m) and (not self.shapes or line["shape"] in self.shapes)
        return sized and all(line[k] == v for k, v in wanted if v)


BNB, DENSE = ("bitsandbytes",), ("dense bfloat16", "dense float32")
SQUARE, WIDE = ("4096x4096",), ("14336x4096",)
TARGETS = (
    Target("dequantize", 12, over=BNB, mode="allocating", dtype="bfloat16", shapes=SQUARE),
    Target("dequantize", 1.3, under=("copy",), dtype="bfloat16", shapes=SQUARE),
    Target("quantize", 10, over=BNB, shapes=SQUARE),
    Target("gemv", 4.5, over=("dense bfloat16",), shapes=SQUARE, m=(1,)),
    Target("gemv", 3.2, over=("dense bfloat16",), shapes=WIDE, m=(1,)),
    Target("gemv", 1.2, over=("bitsandbytes eval",), shapes=SQUARE + WIDE, m=(1, 4, 16)),
    Target("gemv", 30, over=("bitsandbytes train",), shapes=SQUARE + WIDE, m=(1,)),
    Target("gemv", 1.0, under=DENSE, shapes=SQUARE + WIDE, m=(4, 16)),
    Target("qlora_linear", 1.06, under=DENSE, dtype="bfloat16", shapes=SQUARE, m=(512,)),
    Target("qlora_linear", 1.05, under=DENSE, dtype="bfloat16", shapes=SQUARE, m=(2048,)),
    Target("qlora_linear", 1.04, under=DENSE, dtype="bfloat16", shapes=WIDE, m=(512,)),
    Target("qlora_linear", 1.20, under=DENSE, dtype="bfloat16", shapes=("1536x576",), m=(512,)),
    Target(
        "step",
        2.2,
        over=("peft+bitsandbytes",),
        mode="all linears, r 16",
        dtype="bfloat16",
        shapes=("SmolLM2-135M",),
    ),
    Target(
        "step",
        1.6,
        over=("peft dense",),
        mode="all linears, r 16",
        dtype="bfloat16",
        shapes=("SmolLM2-135M",),
    ),
    Target("switching", 1.0, under=("alone",)),
    Target("linear_cross_entropy", 1.15, under=("GEMMs alone",), shapes=("49152x576",), m=(512,)),
    Target("bottleneck step", 1.05, under=("LoRA",), m=(512,)),
    *(
        Target(f"options {what}", 1.03, under=("without dropout",), m=(512,))
        for what in ("layer", "linear", "step")
    ),
    *(Target(f"options {what}", 1.10, under=("LoRA",), m=(512,)) for what in ("layer", "linear", "step")),
    *(
        Target(f"options {what}", 1.08, under=("1 adapter",), m=(512,))
        for what in ("layer", "linear", "step")
    ),
    Target("generate", 1.5, over=("peft+bitsandbytes",), shapes=("SmolLM2-135M",)),
    Target("generate", 1.0, over=DENSE, shapes=("SmolLM2-135M",)),
)
KEY = ("device", "isa", "threads", "kernel", "mode", "dtype", "shape", "M")


def load(folder: Path) -> list[Line]:
    """Every row of every CSV of a folder that holds timings; loss curves, whose columns are others, are no
    such rows."""
    lines: list[Line] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            lines += [line for line in csv.DictReader(file) if all(key in line for key in KEY)]
    if not lines:
        raise FileNotFoundError(
            f"{folder}: no CSV with rows; run python -m benchmarks.run_all --out {folder}"
        )
    return lines


def _groups(lines: Iterable[Line]) -> dict[tuple[str, ...], list[Line]]:
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[tuple(line[k] for k in KEY)].append(line)
    return groups


def judge(line: Line, group: Sequence[Line]) -> list[tuple[str, float, bool]]:
    """(words, measured, reached) of every target on this provider's row; a peer's row carries the targets it
    is named in."""
    found = []
    for target in TARGETS:
        if not target.applies(line):
            continue
        ratio = float(line["ratio"])
        if line["provider"] in target.over:
            found.append((f"≥ {target.limit:g}×", ratio, ratio >= target.limit))
        if target.under and line["provider"] == _fastest(group, target.under):
            found.append((f"ours ≤ {target.limit:g}×", 1 / ratio, 1 / ratio <= target.limit))
    return found


def _fastest(group: Sequence[Line], names: Sequence[str]) -> str | None:
    present = [line for line in group if line["provider"] in names]
    return min(present, key=lambda line: float(line["ratio"]))["provider"] if present else None


def table(lines: Sequence[Line]) -> str:
    """Markdown: one line a provider, with times, the ratio to ours, GB/s, and targets with what was measured
    for them."""
    head = (
        "kernel",
        "mode",
        "dtype",
        "shape",
        "M",
        "provider",
        "p20",
        "p50",
        "p80",
        "unit",
        "÷ ours",
        "GB/s",
        "target",
        "reached",
    )
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for group in _groups(lines).values():
        for line in group:
            targets = judge(line, group)
            numbers = [f"{float(line[p]):.4g}" for p in ("p20", "p50", "p80")]
            ratio = float(line["ratio"])
            rate = float(line["gb_per_s"] or 0)
            cells = (
                [line[k] for k in ("kernel", "mode", "dtype", "shape", "M", "provider")]
                + numbers
                + [line["unit"]]
            )
            cells += [
                "" if math.isnan(ratio) else f"{ratio:.3g}",
                f"{rate:.1f}" if rate else "",
                "; ".join(t[0] for t in targets),
            ]
            cells += ["; ".join(f"{'yes' if ok else 'NO'} ({value:.3g})" for _, value, ok in targets)]
            starred = (
                cell + " *" if cell == line["provider"] and line["note"].startswith("one ") else cell
                for cell in cells
            )
            out.append(f"| {' | '.join(starred)} |")
    return "\n".join(out)


def preface(lines: Sequence[Line]) -> str:
    first = lines[0]
    levels = ", ".join(sorted({x["isa"] for x in lines}))
    words = [f"{first['device']}; ISA {levels}; threads {first['threads']}; {first['versions']}."]
    busy = sorted({x["load"] for x in lines if x["load"].endswith("BUSY")})
    if busy:
        words.append(
            "**Not a quiet machine: other processes used the CPU meanwhile "
            f"({len(busy)} of the runs; {busy[-1]}).**"
        )
    words.append(
        "÷ ours: the provider's time divided by peftkern's in the same round, median. "
        "* one call only, over the time cap."
    )
    return "\n\n".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        lines = load(folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    text = f"{preface(lines)}\n\n{table(lines)}\n"
    (folder / "report.md").write_text(text)
    print(text)
    print(
        f"plot: {folder / 'report.png'}"
        if panels.draw(lines, folder / "report.png")
        else "no plot: matplotlib is not installed (pip install '.[bench]')"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
