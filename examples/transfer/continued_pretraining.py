"""Continued pretraining on real text, and its control: SmolLM2 on the King James Bible, and on Python's
library.

Three arms on held-out chapters (Ruth, Jonah, Mark, James, Esther): the model as it is; after pretraining on
the other books; and after as many steps on source code, which has nothing to do with them. Bits per byte of
whole chapters, with paired intervals over chapters for each seed, and over seeds. Run as `python -m
examples.transfer.continued_pretraining` (or with seeds: `... 0 1`): about two minutes a seed on two free
cores; CSV and PNG into examples/transfer/results.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peftkern.finetune import FinetuneConfig
from peftkern.transfer.intervals import over_runs
from peftkern.transfer.pretrain import continued_pretraining
from peftkern.transfer.pretraining import PretrainingReport

from .samples import code_pairs

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS, RANK, EVAL_TOKENS = 30, 64, 8192
ARMS = {"before": "before", "adapted": "after the other books", "control": "after source code (control)"}


def run(seed: int) -> PretrainingReport:
    """All three arms with one seed; the runs' folders are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "code.jsonl"
        with control.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": pair.source}) + "\n" for pair in code_pairs(held_out=False))
        config = FinetuneConfig(
            output=str(Path(folder) / "out"),
            r=RANK,
            document_boundaries=True,
            quantization="none",
            steps=STEPS,
            lr=5e-4,
            eval_tokens=EVAL_TOKENS,
            sample_tokens=1,
            save_steps=STEPS,
            seed=seed,
        )
        return continued_pretraining(config, (str(control),))


def _record(seed: int, report: PretrainingReport) -> None:
    """The seed's lines in the CSV, in the place of what it had."""
    path = RESULTS / "continued_pretraining.csv"
    RESULTS.mkdir(exist_ok=True)
    rows = [row for row in _rows() if row["seed"] != str(seed)]
    for arm, documents in report.arms.items():
        saved = report.gain(arm)
        values = (documents.per_byte.mean, documents.per_byte.se, saved.mean, saved.low, saved.high)
        names = ("bits_per_byte", "se", "saved", "saved_low", "saved_high")
        rows.append({"seed": str(seed), "arm": arm, "documents": str(len(documents.sizes))})
        rows[-1] |= {name: f"{value:.5f}" for name, value in zip(names, values, strict=True)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _rows() -> list[dict[str, str]]:
    path = RESULTS / "continued_pretraining.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def plot() -> None:
    """Bits per byte by arm, the seeds' mean with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {arm: [float(row["bits_per_byte"]) for row in _rows() if row["arm"] == arm] for arm in ARMS}
    means = {arm: over_runs(values) for arm, values in found.items()}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heights, errors = [mean.mean for mean in means.values()], [mean.se for mean in means.values()]
    axes.bar(list(ARMS.values()), heights, yerr=errors, capsize=4, color=["0.6", "C0", "C1"])
    for place, height in enumerate(heights):
        axes.text(place, height, f"{height:.3f}", ha="center", va="bottom")
    saved = {arm: means["before"].mean - means[arm].mean for arm in ("adapted", "control")}
    title = f"{STEPS} steps on the Bible save {saved['adapted']:+.3f} bits per byte of its other books,"
    axes.set(
        ylabel="bits per byte of held-out chapters",
        title=f"{title}\nas many on source code {saved['control']:+.3f}",
    )
    axes.set_ylim(0, 1.15 * max(heights))
    figure.savefig(RESULTS / "continued_pretraining.png", dpi=110)


def main(seeds: Sequence[int]) -> int:
    """Run these seeds, or all."""
    for seed in seeds or SEEDS:
        report = run(seed)
        _record(seed, report)
        print(f"seed {seed}: {report.verdict}\n{report.table()}", flush=True)
    plot()
    return 0


if __name__ == "__main__":
    sys.exit(main([int(seed) for seed in sys.argv[1:]]))
