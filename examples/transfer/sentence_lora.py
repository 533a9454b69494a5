"""LoRA on a sentence encoder for a domain without labels: `peftkern adapt` by DANN, by MMD and on the source
alone.

MiniLM learns from 4,000 labelled sentences of film reviews and is aligned with unlabelled tweets, with the
command's own options (strength 1, rank 8, 300 steps of 16 + 16 sentences), which no target label has chosen.
Labelled tweets of other documents score it. Beside it, in docs/transfer/adaptation.md: the same sentences
with a frozen encoder. Run as `python -m examples.transfer.sentence_lora` (`--seeds 0`, `--target nyt`): a
line of results/sentence_lora.csv for every run, as soon as it is done (a run that is there is not made
again), and sentence_lora.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftkern.transfer.adapt import AdaptConfig, adapt
from peftkern.transfer.intervals import over_runs, paired_runs

from .results_files import RESULTS, save_plot, save_rows
from .samples import minilm_folder, sentences

NAMES = {"none": "source only", "dann": "DANN", "mmd": "MMD"}
LENGTH, TRAIN, TEST = 48, 4000, 1000
Row = dict[str, "str | int | float"]


def write_rows(folder: Path, domain: str) -> tuple[Path, Path]:
    """Files of a domain's sentences with their labels, to learn from and to score with; whole documents are
    in one or the other."""
    data = sentences(domain)
    documents = np.random.default_rng(0).permutation(np.unique(data.documents))
    testing = np.isin(data.documents, documents[: len(documents) // 3])
    order = np.random.default_rng(1).permutation(len(data.texts))
    parts = {"train": order[~testing[order]][:TRAIN], "test": order[testing[order]][:TEST]}
    paths = []
    for part, rows in parts.items():
        lines = [json.dumps({"text": data.texts[row], "label": int(data.labels[row])}) for row in rows]
        paths.append(folder / f"{domain}-{part}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths[0], paths[1]


def measured(target: str, method: str, seed: int) -> Row:
    """One run of the command."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source, _ = write_rows(folder, "movie")
        unlabelled, scored = write_rows(folder, target)
        begin = time.perf_counter()
        report = adapt(
            AdaptConfig(
                model=minilm_folder(),
                data=str(source),
                target_data=str(unlabelled),
                test_data=str(scored),
                output=str(folder / "out"),
                method=method,
                seq_length=LENGTH,
                seed=seed,
            )
        )
    return {
        "target": target,
        "method": method,
        "seed": seed,
        "source_accuracy": report.source_accuracy,
        "target_accuracy": report.target_accuracy,
        "information": report.information,
        "density": report.density,
        "probe": report.probe.linear.accuracy.mean,
        "seconds": time.perf_counter() - begin,
    }


def read() -> list[Row]:
    """The runs that were made."""
    path = RESULTS / "sentence_lora.csv"
    if not path.exists():
        return []
    with path.open() as file:
        kinds = {"target": str, "method": str, "seed": lambda text: int(float(text))}
        return [
            {name: kinds.get(name, float)(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def of(rows: Sequence[Row], target: str, method: str, name: str = "target_accuracy") -> list[float]:
    """A figure of each seed, in percent."""
    chosen = [row for row in rows if row["target"] == target and row["method"] == method]
    return [100 * row[name] for row in sorted(chosen, key=lambda row: row["seed"])]


def summary(rows: Sequence[Row], target: str) -> str:
    """A line a method: accuracies with standard errors over seeds, the gain over the source alone by seed."""
    lines = []
    for method, name in NAMES.items():
        accuracy, source = over_runs(of(rows, target, method)), of(rows, target, method, "source_accuracy")
        line = f"movie → {target} {name:12s} {accuracy.mean:.1f} ± {accuracy.se:.1f} %, "
        line += f"source {over_runs(source).mean:.1f} %, "
        line += f"probe {over_runs(of(rows, target, method, 'probe')).mean / 100:.2f}"
        if method != "none":
            gain = paired_runs(of(rows, target, method), of(rows, target, "none"))
            line += f", gain {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] points"
        lines.append(line)
    return "\n".join(lines)


def draw(rows: Sequence[Row], targets: Sequence[str], seeds: int) -> None:
    """Target accuracy by method, a group of bars a target."""

    def bars(axes: object) -> None:
        for number, (method, name) in enumerate(NAMES.items()):
            found = [over_runs(of(rows, target, method)) for target in targets]
            places = [place + 0.25 * (number - 1) for place in range(len(targets))]
            heights, errors = [one.mean for one in found], [one.se for one in found]
            axes.bar(places, heights, width=0.23, yerr=errors, capsize=3, label=name)
        axes.set_xticks(range(len(targets)), [f"film reviews → {target}" for target in targets])
        axes.axhline(50, color="gray", linestyle=":", label="chance")
        axes.set(ylim=(0, 100), ylabel="accuracy on the target's held-out documents (%)")
        axes.set_title(f"MiniLM with LoRA, aligned without target labels ({seeds} seeds, ± s.e.)")
        axes.legend(ncols=3)
        axes.grid(axis="y", alpha=0.3)

    save_plot("sentence_lora", bars)


def main() -> None:
    """Make the runs that are missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--target", nargs="+", default=["tweets"], choices=("amazon", "nyt", "tweets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = read()
    for target in args.target:
        for seed in args.seeds:
            for method in NAMES:
                if any((row["target"], row["method"], row["seed"]) == (target, method, seed) for row in rows):
                    continue
                rows.append(measured(target, method, seed))
                rows.sort(key=lambda row: (row["target"], list(NAMES).index(row["method"]), row["seed"]))
                save_rows("sentence_lora", rows)
        print(summary(rows, target))
    whole = [one for one in ("amazon", "nyt", "tweets") if len(of(rows, one, "mmd")) >= 2]
    if whole:
        draw(rows, whole, len(of(rows, whole[0], "mmd")))


if __name__ == "__main__":
    main()
