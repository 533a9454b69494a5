"""Wrong labels put into real sentences and found again, and the accuracy that leaving them out regains.

MiniLM's features of the movie sentences: 4,000 to train on, whole reviews of the others to test on. In each
seed a tenth of the training labels is flipped; confident learning on out-of-fold probabilities, the same on
in-sample ones (the mistake to see), and AUM look for them. A probe is then trained on what is left, beside
one on all rows, on as many rows left out at random, and on the clean rows alone. Run as `python -m
examples.transfer.label_noise`; about two minutes on a core.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkern.transfer.data.dynamics import aum_suspects, probe_dynamics, with_fake_class
from peftkern.transfer.data.labels import LabelNoise, label_noise, out_of_fold
from peftkern.transfer.features import pooled_features
from peftkern.transfer.intervals import over_runs, paired_runs

from .samples import minilm, sentences

RESULTS = Path(__file__).parent / "results"
TRAIN, FLIPPED, SEEDS = 4000, 0.1, (0, 1, 2, 3, 4)
FINDERS = ("confident learning, out of fold", "confident learning, in sample", "AUM", "at random")


def _features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 384], labels and documents of the movie sentences."""
    movie, (model, tokenizer) = sentences("movie"), minilm()
    model = model.to(torch.bfloat16)  # the pooling is fp32
    found = pooled_features(
        model,
        movie.texts,
        tokenizer=tokenizer,
        pools=("mean",),
        depths=(-1,),
        batch_size=64,
        skip_first=False,
        progress=sys.stderr.isatty(),
    )
    return np.array(found.at(-1)), movie.labels, movie.documents


def _probe(features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(features, labels)


def _in_sample(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities of a probe that has seen every label, with as little penalty as a network has."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e3, max_iter=1000)).fit(features, labels)
    return model.predict_proba(features)


def _by_aum(features: np.ndarray, labels: np.ndarray, seed: int) -> list[int]:
    """Suspects of two trainings, in each of which another third of the rows is the class of wrong labels, by
    the area without it."""
    suspects: set[int] = set()
    for part in range(2):
        changed, fake = with_fake_class(labels, classes=2, seed=seed, part=part)
        suspects |= set(aum_suspects(probe_dynamics(features, changed, seed=seed).aum(), fake).rows)
    order = probe_dynamics(features, labels, seed=seed).aum().argsort(kind="stable")
    return [row for row in order.tolist() if row in suspects]


def _found(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> tuple[dict[str, list[int]], LabelNoise]:
    """The suspects of each finder, the worst first, and what the first says of the share."""
    noise = label_noise(labels, out_of_fold(features, labels, groups=groups, seed=seed), seed=seed)
    naive = label_noise(labels, _in_sample(features, labels), draws=1)
    drawn = np.random.default_rng(seed).choice(len(labels), len(noise.suspects), replace=False)
    ranked = [list(noise.suspects), list(naive.suspects), _by_aum(features, labels, seed), drawn.tolist()]
    return dict(zip(FINDERS, ranked, strict=True)), noise


def _seed(
    features: np.ndarray,
    labels: np.ndarray,
    documents: np.ndarray,
    seed: int,
) -> tuple[list[list[Any]], LabelNoise]:
    """Rows of the CSV: finder, seed, suspects, precision, recall, precision of the first as many as were
    flipped, test accuracy."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.unique(documents))
    reach = np.cumsum([np.sum(documents == document) for document in order]) <= TRAIN
    train, test = np.isin(documents, order[reach]), np.isin(documents, order[~reach])
    x, clean, y = features[train], labels[train], labels[train].copy()
    wrong = generator.choice(len(y), round(FLIPPED * len(y)), replace=False)
    y[wrong] = 1 - y[wrong]
    found, noise = _found(x, y, documents[train], seed)

    def accuracy(rows: np.ndarray, targets: np.ndarray) -> float:
        return 100 * float(_probe(x[rows], targets[rows]).score(features[test], labels[test]))

    everything, right = np.arange(len(y)), np.setdiff1d(np.arange(len(y)), wrong)
    lines: list[list[Any]] = [
        ["clean labels", seed, "", "", "", "", accuracy(everything, clean)],
        ["flipped labels", seed, "", "", "", "", accuracy(everything, y)],
        ["flipped rows left out", seed, len(wrong), 1.0, 1.0, 1.0, accuracy(right, y)],
    ]
    for name, suspects in found.items():
        hit = np.isin(suspects, wrong)
        kept = np.setdiff1d(everything, np.array(suspects, dtype=int))
        first = hit[: len(wrong)].mean()
        lines.append(
            [name, seed, len(suspects), hit.mean(), hit.sum() / len(wrong), first, accuracy(kept, y)],
        )
    return lines, noise


def _natural(features: np.ndarray, labels: np.ndarray, documents: np.ndarray) -> LabelNoise:
    """What is suspected in the labels as they come."""
    return label_noise(labels, out_of_fold(features, labels, groups=documents))


def _table(lines: list[list[Any]]) -> None:
    print(
        "| left out by | suspects | precision | recall | precision of the first 400 | test accuracy, % |"
        " gained, points |"
    )
    print("|---|---|---|---|---|---|---|")
    flipped = [line[-1] for line in lines if line[0] == "flipped labels"]
    for name in dict.fromkeys(line[0] for line in lines):
        chosen = [line for line in lines if line[0] == name]
        score, gain = (
            over_runs([line[-1] for line in chosen]),
            paired_runs(
                [line[-1] for line in chosen],
                flipped,
            ),
        )
        means = (
            [np.mean([line[column] for line in chosen]) for column in range(2, 6)]
            if chosen[0][2] != ""
            else []
        )
        found = [f"{means[0]:.0f}", *(f"{mean:.2f}" for mean in means[1:])] if means else [""] * 4
        against = "" if name == "flipped labels" else f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        print(f"| {name} | {' | '.join(found)} | {score.mean:.2f} ± {score.se:.2f} | {against} |")


def _plot(lines: list[list[Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(line[0] for line in lines))
    scores = [over_runs([line[-1] for line in lines if line[0] == name]) for name in names]
    places = range(len(names), 0, -1)
    axes.errorbar([s.mean for s in scores], places, xerr=[s.mean - s.low for s in scores], fmt="o", capsize=3)
    axes.set_yticks(list(places), names)
    lost, left = scores[0].mean - scores[1].mean, scores[0].mean - scores[names.index(FINDERS[0])].mean
    title = f"A tenth of the labels flipped costs {lost:.1f} points; without the suspects {left:.1f}"
    axes.set(xlabel="test accuracy (%), mean and 95 % interval over 5 seeds", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "label-noise.png", dpi=110)


def main() -> None:
    """All seeds, the table, the CSV and the plot."""
    RESULTS.mkdir(exist_ok=True)
    features, labels, documents = _features()
    print(f"Labels as they come: {_natural(features, labels, documents).verdict}", flush=True)
    lines: list[list[Any]] = []
    for seed in SEEDS:
        more, noise = _seed(features, labels, documents, seed)
        lines += more
        print(f"seed {seed}: {noise.verdict}", flush=True)
    with (RESULTS / "label-noise.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["left_out_by", "seed", "suspects", "precision", "recall", "precision_of_first", "accuracy"],
        )
        writer.writerows(lines)
    _table(lines)
    _plot(lines)


if __name__ == "__main__":
    main()
