"""Wrong answers found by the loss dynamics that a run notes of itself: SmolLM2 learns to sum up functions.

Functions of the standard library with the first line of their docstrings; a tenth of the rows have another
row's line. `peftkern finetune --row-losses` notes each row's loss in each of three epochs. Compared are
rankings of the rows by the mean over the epochs, by the first and by the last epoch: the area under the ROC
curve, and how many of the wrong rows are among as many of the highest ranked. A line of CSV for each seed and
ranking; a seed that is there is not run again. Run as `python -m examples.transfer.row_dynamics [SEED ...]`.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peftkern.finetune import FinetuneConfig, finetune
from peftkern.transfer.data.recorded import row_dynamics
from peftkern.transfer.intervals import over_runs, paired_runs

from .results_files import RESULTS, save_plot
from .samples import code_pairs

SEEDS, ROWS, WRONG, EPOCHS, LENGTH = (0, 1, 2), 80, 8, 3.0, 96
MOST = 240  # characters of a function
FIELDS = ("seed", "ranking", "auc", "found", "wrong", "rows")
PATH = RESULTS / "row_dynamics.csv"


def rows(seed: int) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of prompt and completion, and the numbers of those with another row's completion."""
    draw = random.Random(seed)
    short = [pair for pair in code_pairs(held_out=False) if len(pair.source) <= MOST]
    chosen = draw.sample(short, ROWS)
    made = [{"prompt": f"{pair.source}\n# What it does: ", "completion": pair.summary} for pair in chosen]
    wrong = draw.sample(range(ROWS), WRONG)
    answers = [made[number]["completion"] for number in wrong]
    for number, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
        made[number]["completion"] = answer
    return made, sorted(wrong)


def run(seed: int) -> list[dict[str, Any]]:
    """A line for each ranking."""
    made, wrong = rows(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        config = FinetuneConfig(
            data=str(data),
            eval_data="python-reference",
            output=str(Path(folder) / "out"),
            r=16,
            quantization="none",
            seq_length=LENGTH,
            batch_size=4,
            grad_accumulation=1,
            epochs=EPOCHS,
            lr=5e-4,
            eval_tokens=2 * LENGTH,
            sample_tokens=1,
            save_steps=1000,
            row_losses=True,
            seed=seed,
        )
        finetune(config)
        found = row_dynamics(Path(config.output) / "row_losses.csv", (str(data),), ROWS)
    print(f"seed {seed}: {found.verdict}", flush=True)
    rankings = {"mean of the epochs": found.mean, "first epoch": found.nats[0], "last epoch": found.nats[-1]}
    return [{"seed": seed, "ranking": name, **_scores(values, wrong)} for name, values in rankings.items()]


def _scores(losses: np.ndarray, wrong: list[int]) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    seen = np.flatnonzero(np.isfinite(losses))
    truth = np.isin(seen, wrong)
    top = seen[(-losses[seen]).argsort(kind="stable")[: truth.sum()]]
    auc = roc_auc_score(truth, losses[seen])
    return {"auc": f"{auc:.4f}", "found": int(np.isin(top, wrong).sum()), "wrong": WRONG, "rows": len(seen)}


def table() -> list[dict[str, str]]:
    """The lines that there are."""
    if not PATH.exists():
        return []
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(axes: Any) -> None:
    """The area under the curve of each ranking, with standard errors."""
    names = list(dict.fromkeys(row["ranking"] for row in table()))
    values = {name: [float(row["auc"]) for row in table() if row["ranking"] == name] for name in names}
    means = [over_runs(values[name]) for name in names]
    axes.bar(names, [mean.mean for mean in means], yerr=[mean.se for mean in means], capsize=4)
    axes.axhline(0.5, color="black", linestyle=":", label="chance")
    best = max(zip(names, means, strict=True), key=lambda each: each[1].mean)
    share = f"{WRONG} of {ROWS} answers wrong, {len(values[names[0]])} seeds"
    axes.set(
        ylabel="area under the ROC curve (± s.e.)",
        title=f"Wrong answers rank best by the {best[0]}\n({share})",
    )
    axes.set_ylim(0, 1.05)
    axes.legend()
    for name, mean in zip(names, means, strict=True):
        found = [int(row["found"]) for row in table() if row["ranking"] == name]
        against = paired_runs(values[name], values["first epoch"])
        words = f"AUC {mean.mean:.3f} ± {mean.se:.3f}, {sum(found)} of {WRONG * len(found)} found"
        print(
            f"{name}: {words}; over the first epoch {against.mean:+.3f} [{against.low:+.3f}, "
            f"{against.high:+.3f}]"
        )


def main(seeds: list[int]) -> None:
    """Run the seeds that the table lacks, and draw."""
    RESULTS.mkdir(exist_ok=True)
    for seed in seeds or SEEDS:
        if any(row["seed"] == str(seed) for row in table()):
            continue
        lines = [*table(), *run(seed)]
        with PATH.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    save_plot("row_dynamics", draw)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
