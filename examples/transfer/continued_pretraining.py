"""Continued pretraining on real text, and its control: SmolLM2 or MiniLM on the King James Bible, and on
Python's library.

Three arms on held-out chapters (Ruth, Jonah, Mark, James, Esther): the model as it is; after pretraining on
the other books; and after as many steps on source code, which has nothing to do with them. Causal: SmolLM2,
bits per byte of whole chapters. Masked: the encoder MiniLM, whose masked head is new and learns in both arms,
masked bits per byte, so that only the two arms can be compared. Paired intervals over chapters for each seed,
and over seeds. Run as `python -m examples.transfer.continued_pretraining` (with seeds: `... --seeds 0 1`, the
encoder: `... --masked`): minutes a seed; CSV and PNG into examples/transfer/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkern.finetune import FinetuneConfig
from peftkern.transfer.intervals import over_runs
from peftkern.transfer.pretrain import continued_pretraining
from peftkern.transfer.pretraining import PretrainingReport

from .samples import code_pairs, minilm_folder

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS, RANK, EVAL_TOKENS = 20, 64, 4096
MASKED_STEPS, MASK_RATE = 40, 0.15
ARMS = {"before": "before", "adapted": "after the other books", "control": "after source code (control)"}


def run(seed: int, *, masked: bool) -> PretrainingReport:
    """All three arms with one seed; the runs' folders are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "code.jsonl"
        with control.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": pair.source}) + "\n" for pair in code_pairs(held_out=False))
        steps = MASKED_STEPS if masked else STEPS
        options: dict[str, Any] = {"steps": steps, "save_steps": steps, "seed": seed, "lr": 5e-4}
        if masked:
            options |= {"model": minilm_folder(), "seq_length": 128, "batch_size": 8, "grad_accumulation": 1}
            options |= {"lr": 2e-3, "eval_data": "sample"}
        config = FinetuneConfig(
            output=str(Path(folder) / "out"),
            r=RANK,
            document_boundaries=True,
            quantization="none",
            eval_tokens=EVAL_TOKENS,
            sample_tokens=1,
            **options,
        )
        return continued_pretraining(config, (str(control),), mask_rate=MASK_RATE if masked else None)


def _path(masked: bool) -> Path:
    return RESULTS / f"continued_pretraining{'_masked' if masked else ''}.csv"


def _record(seed: int, report: PretrainingReport, masked: bool) -> None:
    """The seed's lines in the CSV, in the place of what it had."""
    RESULTS.mkdir(exist_ok=True)
    rows = [row for row in _rows(masked) if row["seed"] != str(seed)]
    for arm, documents in report.arms.items():
        saved = report.gain(arm)
        values = (documents.per_byte.mean, documents.per_byte.se, saved.mean, saved.low, saved.high)
        names = ("bits_per_byte", "se", "saved", "saved_low", "saved_high")
        rows.append({"seed": str(seed), "arm": arm, "documents": str(len(documents.sizes))})
        rows[-1] |= {name: f"{value:.5f}" for name, value in zip(names, values, strict=True)}
    with _path(masked).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["seed"])))


def _rows(masked: bool) -> list[dict[str, str]]:
    if not _path(masked).exists():
        return []
    with _path(masked).open() as file:
        return list(csv.DictReader(file))


def plot(masked: bool) -> None:
    """Bits per byte by arm, the seeds' mean with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(masked)
    found = {arm: [float(row["bits_per_byte"]) for row in rows if row["arm"] == arm] for arm in ARMS}
    shown = {arm: values for arm, values in found.items() if not (masked and arm == "before")}
    means = {arm: over_runs(values) for arm, values in shown.items()}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heights, errors = [mean.mean for mean in means.values()], [mean.se for mean in means.values()]
    if len(found["adapted"]) == 1:  # over documents then
        errors = [float(row["se"]) for row in rows if row["arm"] in shown]
    colors = {"before": "0.6", "adapted": "C0", "control": "C1"}
    axes.bar(
        [ARMS[arm] for arm in means], heights, yerr=errors, capsize=4, color=[colors[arm] for arm in means]
    )
    for place, height in enumerate(heights):
        axes.text(place, height, f"{height:.3f}", ha="center", va="bottom")
    pairs = zip(found["control"], found["adapted"], strict=True)
    over = over_runs([control - adapted for control, adapted in pairs])
    steps = MASKED_STEPS if masked else STEPS
    title = f"{steps} steps on the Bible save {over.mean:.3f} bits per byte\nmore than as many on source code"
    measure = "masked bits per byte" if masked else "bits per byte"
    axes.set(ylabel=f"{measure} of held-out chapters", title=title, ylim=(0, 1.15 * max(heights)))
    figure.savefig(_path(masked).with_suffix(".png"), dpi=110)
    for arm, mean in means.items():
        print(f"{arm}: {mean.mean:.4f} ± {mean.se:.4f}")
    print(f"control less adapted, paired: {over.mean:+.4f} [{over.low:+.4f}, {over.high:+.4f}]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run these seeds, or all, and draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--masked", action="store_true", help="the encoder MiniLM, masked")
    args = parser.parse_args(arguments)
    for seed in args.seeds:
        report = run(seed, masked=args.masked)
        _record(seed, report, args.masked)
        print(f"seed {seed}: {report.verdict}\n{report.table()}", flush=True)
    plot(args.masked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
