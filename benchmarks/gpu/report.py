"""The CSVs of a folder as a markdown report: the targets with what was measured for them, every row, and
plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness import OURS
from .run import DENSE, NO_DROPOUT, read_rows

__all__ = ["TARGETS", "Target", "judge", "load", "main", "plot", "table", "target_table"]

Line = dict[str, str]
KEY = ("device", "what", "mode", "dtype", "shape", "M", "timed")


@dataclass(frozen=True)
class Target:
    """A bound on rows of the CSVs. value: what of a row is compared with the limit; `at_least`: from below,
    else from above."""

    words: str
    provider: str
    limit: float
    value: Callable[[Line], float]
    what: str
    mode: str = ""
    shapes: tuple[str, ...] = ()
    m: tuple[int, ...] = ()
    timed: str = ""
    at_least: bool = False
    dtype: str = "bfloat16"

    def applies(self, line: Line) -> bool:
        wanted = (
            ("provider", self.provider),
            ("what", self.what),
            ("mode", self.mode),
            ("timed", self.timed),
            ("dtype", self.dtype),
        )
        sized = (not self.m or int(line["M"]) in self.m) and (not self.shapes or line["shape"] in self.shapes)
        return sized and all(line[k] == v for k, v in wanted if v)

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _number(name: str) -> Callable[[Line], float]:
    return lambda line: float(line[name] or "nan")


def _ours_over(line: Line) -> float:
    """Our time divided by this provider's."""
    return 1 / float(line["ratio"] or "nan")


SQUARE, WIDE = "4096x4096", "14336x4096"
BNB = "bitsandbytes"
TARGETS = (
    *(
        Target(
            f"QLoRA linear ÷ frozen bf16, M = {m} ≤ {limit}",
            DENSE,
            limit,
            _ours_over,
            "linear",
            "r 16, dropout 0",
            (SQUARE, WIDE),
            (m,),
        )
        for m, limit in ((8192, 1.12), (2048, 1.25))
    ),
    Target(
        "dropout 0.1 ÷ no dropout ≤ 1.02",
        NO_DROPOUT,
        1.02,
        _ours_over,
        "linear",
        "r 16, dropout 0.1",
        (SQUARE, WIDE),
        (2048, 8192),
    ),
    Target(
        "dequantize nested ≥ 85 % of copy",
        OURS,
        85,
        _number("percent_bandwidth"),
        "dequantize",
        "nested",
        timed="graph",
        at_least=True,
    ),
    Target("dequantize in one launch", OURS, 1, _number("p50"), "launches", "dequantize"),
    Target(
        "decode ≥ 70 % of copy, M = 1 ... 8",
        OURS,
        70,
        _number("percent_bandwidth"),
        "decode",
        "nested",
        (SQUARE, WIDE),
        (1, 2, 4, 8),
        "graph",
        True,
    ),
    Target(
        "decode ≥ 1.3 x bitsandbytes",
        BNB,
        1.3,
        _number("ratio"),
        "decode",
        "nested",
        (SQUARE, WIDE),
        (1, 2, 4, 8),
        "graph",
        True,
    ),
    *(
        Target(
            f"{mode} ≥ {limit} x bitsandbytes, M = 32 ... 256",
            BNB,
            limit,
            _number("ratio"),
            "small",
            mode,
            (),
            (32, 64, 128, 256),
            "graph",
            True,
        )
        for mode, limit in (("forward", 1.0), ("dx", 1.3))
    ),
    *(
        Target(
            f"launches forward + backward ≤ {limit}, {mode[14:]}",
            OURS,
            limit,
            _number("p50"),
            "launches",
            mode,
        )
        # With dropout one more draws the seed.
        for mode, limit in (("linear, r 16, dropout 0", 7), ("linear, r 16, dropout 0.1", 8))
    ),
)


def load(folder: Path) -> list[Line]:
    """Every row of every CSV of a folder; of a row measured twice the last."""
    found: dict[tuple[str, ...], Line] = {}
    for path in sorted(folder.glob("*.csv")):
        for line in read_rows(path):
            found[tuple(line[k] for k in (*KEY, "provider", "unit"))] = line
    if not found:
        raise FileNotFoundError(
            f"{folder}: no CSV with rows; run python -m benchmarks.gpu --part all --out {folder}"
        )
    return list(found.values())


def judge(lines: Iterable[Line], target: Target) -> list[tuple[str, float]]:
    """(what row, value) of every measured row that a target applies to."""
    rows = [line for line in lines if target.applies(line) and line["p50"] and line["unit"] != "operators"]
    return [
        (f"{line['shape']} M={line['M']}", value)
        for line in rows
        if not math.isnan(value := target.value(line))
    ]


def target_table(lines: Sequence[Line]) -> str:
    """Markdown: each target, the worst value measured for it and where, and whether all rows reach it."""
    out = ["| target (for an H200) | worst | at | rows | reached |", "|---|---|---|---|---|"]
    for target in TARGETS:
        found = judge(lines, target)
        if not found:
            out.append(f"| {target.words} | | | 0 | not measured |")
            continue
        where, worst = (min if target.at_least else max)(found, key=lambda pair: pair[1])
        reached = sum(target.reached(value) for _, value in found)
        out.append(
            f"| {target.words} | {worst:.3g} | {where} | {len(found)} | "
            f"{'yes' if reached == len(found) else f'NO ({reached} do)'} |"
        )
    return "\n".join([*out, _saved(lines)])


def _saved(lines: Sequence[Line]) -> str:
    """Whether dropout keeps more bytes for the backward."""
    held: dict[str, dict[str, float]] = defaultdict(dict)
    for line in lines:
        if (
            line["what"] == "memory"
            and line["provider"] == OURS
            and line["mode"].startswith("saved")
            and line["p50"]
        ):
            held[f"{line['shape']} M={line['M']}"][line["mode"].rpartition(" ")[2]] = float(line["p50"])
    extra = {where: by["0.1"] - by["0"] for where, by in held.items() if {"0", "0.1"} <= by.keys()}
    if not extra:
        return "| dropout saves no extra bytes | | | 0 | not measured |"
    where = max(extra, key=extra.__getitem__)
    # The seed is 8 bytes; the CSV's six digits of a megabyte figure show no less than 1 kB.
    reached = "yes" if extra[where] < 0.002 else "NO"
    return f"| dropout saves no extra bytes (MB) | {extra[where]:.3g} | {where} | {len(extra)} | {reached} |"


def table(lines: Sequence[Line]) -> str:
    """Markdown: every row, grouped by what was measured."""
    head = (
        "what",
        "mode",
        "dtype",
        "shape",
        "M",
        "timed",
        "provider",
        "p20",
        "p50",
        "p80",
        "unit",
        "÷ ours",
        "% copy",
        "% GEMM",
        "note",
    )
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for line in lines:
        numbers = [f"{float(line[name]):.4g}" if line[name] else "" for name in ("p20", "p50", "p80")]
        rates = [
            f"{float(line[name]):.3g}" if line[name] else ""
            for name in ("ratio", "percent_bandwidth", "percent_gemm")
        ]
        cells = [
            *(line[k] for k in (*KEY[1:], "provider")),
            *numbers,
            line["unit"] if line["p50"] else "",
            *rates,
            line["note"][:120],
        ]
        out.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(out)


def plot(lines: Sequence[Line], folder: Path) -> list[Path]:
    """One picture a kind of measurement: every provider's p50 over M, a panel a shape and mode; [] where
    matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    made = []
    for what in ("linear", "decode", "small", "step"):
        panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            if line["what"] == what and line["p50"] and line["unit"] in ("ms", "tokens/s") and int(line["M"]):
                title = " ".join(filter(None, (line["shape"], line["mode"], line["timed"])))
                panels[title][line["provider"]].append((int(line["M"]), float(line["p50"])))
        if not panels:
            continue
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False)
        for axis, (title, providers) in zip(axes.flat, panels.items(), strict=False):
            for provider, points in sorted(providers.items()):
                axis.plot(
                    *zip(*sorted(points), strict=True),
                    marker="o",
                    linewidth=2.5 if provider == OURS else 1,
                    label=provider,
                )
            axis.set(
                title=title,
                xlabel="M",
                ylabel="tokens/s" if what == "step" else "ms",
                xscale="log",
                yscale="log",
            )
            axis.title.set_fontsize(8)
            axis.legend(fontsize=5)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        figure.tight_layout()
        made.append(folder / f"{what}.png")
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def main(folder: Path) -> int:
    """Write report.md and the plots into the folder; 1 where it holds no rows."""
    try:
        lines = load(folder)
    except FileNotFoundError as error:
        print(error)
        return 1
    versions = lines[0]["versions"]
    devices = ", ".join(sorted({line["device"] for line in lines}))
    failed = [line for line in lines if line["note"].startswith("error")]
    text = [f"{devices}; {versions}.", target_table(lines)]
    if failed:
        text.append(
            "Failed:\n\n"
            + "\n".join(
                f"- {' '.join(line[k] for k in KEY[1:])}, {line['provider']}: {line['note']}"
                for line in failed
            )
        )
    text.append(table(lines))
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text[:-1]))
    made = plot(lines, folder)
    print(
        f"{folder / 'report.md'}; plots: "
        f"{', '.join(p.name for p in made) or 'none, matplotlib is not installed or nothing to draw'}"
    )
    return 0
