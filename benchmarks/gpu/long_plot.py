"""The picture of `long_context.csv`: memory by tokens, measured and planned, beside published tables of
others.

    python -m benchmarks.gpu.long_plot benchmarks/results/h100-80gb-hbm3
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

__all__ = ["draw", "main"]

GROUPS = "attention by key/value heads"
CARD_GIB = 23  # what a 24 GB card leaves after its CUDA context
# Bytes a token and bytes: the lines through the tables of longest contexts of an 8B Llama in Unsloth's
# documentation (rank 32, batch 1). The tables give tokens a card, and were not measured card by card.
PUBLISHED = {
    "Unsloth, its published table": (227.5e3, 7.37e9),
    "Hugging Face + FlashAttention 2, same table": (2653e3, 9.70e9),
}


def draw(rows: list[dict[str, str]], file: Path) -> None:
    """rows: of `long_context.csv`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    longest = max(int(row["tokens"]) for row in rows)
    for grouped, color in ((False, "tab:blue"), (True, "tab:green")):
        found = [row for row in rows if (GROUPS in row["options"]) == grouped]
        tokens = [int(row["tokens"]) / 1e3 for row in found]
        name = "attention's backward by groups" if grouped else "peftkern"
        axes.plot(
            tokens,
            [int(row["planned"]) / 1e9 for row in found],
            color=color,
            lw=1.5,
            label=f"{name}, planned",
        )
        measured = [int(row["peak_allocated"]) / 1e9 for row in found]
        axes.plot(tokens, measured, "o", color=color, label=f"{name}, measured")
    for (name, (slope, fixed)), style in zip(PUBLISHED.items(), ("--", ":"), strict=True):
        ends = [0, min(longest, (CARD_GIB * 2**30 - fixed) / slope)]
        axes.plot(
            [end / 1e3 for end in ends],
            [(fixed + slope * end) / 1e9 for end in ends],
            style,
            color="gray",
            label=name,
        )
    axes.axhline(CARD_GIB * 2**30 / 1e9, color="black", lw=0.8)
    axes.text(1, CARD_GIB * 2**30 / 1e9, "24 GB card", va="bottom", fontsize=9)
    best = [
        max(int(r["tokens"]) for r in rows if (GROUPS in r["options"]) == grouped)
        for grouped in (False, True)
    ]
    title = f"QLoRA of an 8B Llama within 24 GB: {best[0]:,} tokens, {best[1]:,} with groups"
    axes.set_title(f"{title}\n(an H100 held to {CARD_GIB} GiB)", fontsize=11)
    axes.set(
        xlabel="thousand tokens in one sequence",
        ylabel="GB allocated at the peak",
        xlim=(0, None),
        ylim=(0, 27),
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> int:
    """Exit status."""
    folder = Path(sys.argv[1])
    with (folder / "long_context.csv").open(newline="") as lines:
        draw(list(csv.DictReader(lines)), folder / "long_context.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
