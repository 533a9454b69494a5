"""The recorded ratios as a few panels: each answers one question, in its title, with at most a dozen bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MOST_BARS", "Panel", "bars_of", "draw", "title_of"]

OURS = "peftkern"
MOST_BARS = 12
FASTER, SLOWER = "#3b6ea5", "#c8722c"
Line = dict[str, str]


@dataclass(frozen=True)
class Panel:
    """What is compared, with what, which rows of the CSVs say so, and what names a bar beside the
    provider."""

    subject: str
    against: str
    rows: dict[str, tuple[str, ...]]
    named_by: tuple[str, ...]
    verb: str = "peftkern is {} times as fast as"

    def holds(self, line: Line) -> bool:
        return all(line[key] in values for key, values in self.rows.items())


PANELS = (
    Panel(
        "Training SmolLM2-135M, 512 tokens a step",
        "PEFT",
        dict(kernel=("step",), mode=("all linears, r 16",), provider=("peft+bitsandbytes", "peft dense")),
        ("dtype",),
    ),
    Panel(
        "Generating with SmolLM2-135M and an adapter", "the others", dict(kernel=("generate",)), ("dtype",)
    ),
    *(
        Panel(
            f"One QLoRA linear, 512 rows, forward and backward, {dtype}",
            "a dense one and PEFT's 4-bit one",
            dict(
                kernel=("qlora_linear",),
                mode=("dropout 0",),
                dtype=(dtype,),
                M=("512",),
                provider=(f"dense {dtype}", "peft+bitsandbytes"),
            ),
            ("shape",),
        )
        for dtype in ("bfloat16", "float32")
    ),
    Panel(
        "A 4-bit weight of 4096 x 4096 times few rows, bfloat16",
        "dense and bitsandbytes' products",
        dict(kernel=("gemv",), shape=("4096x4096",), dtype=("bfloat16",)),
        ("M",),
    ),
    Panel(
        "Quantizing and decoding 4096 x 4096",
        "a plain copy and bitsandbytes",
        dict(kernel=("quantize", "dequantize"), shape=("4096x4096",)),
        ("kernel", "mode", "dtype"),
    ),
    Panel(
        "What dropout, DoRA and four adapters cost, float32",
        "what it takes with them",
        dict(kernel=("options linear", "options step"), dtype=("float32",)),
        ("kernel", "mode"),
        "without them it takes {} of",
    ),
)
REST = Panel("Everything recorded here", "the others", {}, ("kernel", "shape", "M", "dtype", "mode"))


def bars_of(panel: Panel, lines: Sequence[Line]) -> list[tuple[str, float]]:
    """(name, the provider's time divided by ours in the same round) of a panel's bars, at most a dozen."""
    held = [x for x in lines if panel.holds(x) and x["provider"] != OURS and x["unit"] in ("ms", "tokens/s")]
    timed = [x for x in held if not math.isnan(float(x["ratio"])) and float(x["ratio"]) > 0]
    return [(_name(panel, line), float(line["ratio"])) for line in timed][:MOST_BARS]


def _name(panel: Panel, line: Line) -> str:
    words = [line["provider"]]
    for key in panel.named_by:
        words.append(f"M {line[key]}" if key == "M" else line[key].removeprefix("options "))
    return ", ".join(words)


def title_of(panel: Panel, ratios: Sequence[float]) -> str:
    """The answer in words, from the bars."""
    low, high = (f"{value:.3g}" for value in (min(ratios), max(ratios)))
    span = low if low == high else f"{low} to {high}"
    return f"{panel.subject}: {panel.verb.format(span)} {panel.against}"


def draw(lines: Sequence[Line], out: Path) -> bool:
    """Every panel that has bars, one below the other in two columns; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    shown = [(panel, bars) for panel in PANELS if (bars := bars_of(panel, lines))]
    shown = shown or [(REST, bars) for bars in (bars_of(REST, lines),) if bars]
    rows = max(1, -(-len(shown) // 2))
    figure, axes = plt.subplots(rows, 2, figsize=(13, 1 + 3.3 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (panel, bars) in zip(axes.flat, shown, strict=False):
        _draw(axis, panel, bars)
    first = lines[0]
    hardware = (
        f"{first['device']}; {', '.join(sorted({x['isa'] for x in lines}))}; {first['threads']} threads; "
        f"{first['versions']}"
    )
    figure.suptitle(hardware, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return True


def _draw(axis: Any, panel: Panel, bars: Sequence[tuple[str, float]]) -> None:
    names, ratios = zip(*bars, strict=True)
    wide = max(ratios) / min(ratios) > 8
    start = 1.0 if wide else 0.0  # on a logarithmic axis a bar begins where both are equal
    colours = [FASTER if ratio >= 1 else SLOWER for ratio in ratios]
    axis.barh(range(len(bars)), [ratio - start for ratio in ratios], left=start, color=colours, height=0.7)
    axis.set_yticks(range(len(bars)), names, fontsize=8)
    axis.invert_yaxis()
    if wide:
        axis.set_xscale("log")
    _limits(axis, ratios, wide)
    for at, ratio in enumerate(ratios):
        axis.text(max(ratio, 1.0), at, f"  {ratio:.3g}×", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_title("\n".join(textwrap.wrap(title_of(panel, ratios), 58)), fontsize=9, loc="left")
    axis.set_xlabel("time ÷ peftkern's, no unit (blue: peftkern is faster)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _limits(axis: Any, ratios: Sequence[float], wide: bool) -> None:
    """Room for the numbers behind the bars."""
    if wide:
        axis.set_xlim(min(0.8, 0.9 * min(ratios)), 2 * max(ratios))
        axis.xaxis.set_major_formatter(_plain)
        axis.xaxis.set_minor_formatter("")
    else:
        axis.set_xlim(0, 1.15 * max(1.0, *ratios))
