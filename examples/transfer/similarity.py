"""How far apart are four domains of sentences, measured before training, and does the distance forecast what
a transfer loses?

MiniLM's pooled features of movie, Amazon, New York Times and tweet sentences: proxy A-distance with its null,
MMD with p, words in common, and beside them the accuracy of a linear sentiment probe on the other domain. CSV
and PNG go into results/. Run as `python -m examples.transfer.similarity`.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch

from peftkern.transfer.features import pooled_features
from peftkern.transfer.lexical import lexicon, surface
from peftkern.transfer.mmd import mmd_test
from peftkern.transfer.similarity import proxy_a_distance

from .results_files import save_plot, save_rows
from .samples import DOMAINS, minilm, sentences

ROWS = 600


def main() -> None:
    """Measure the six pairs, and the twelve transfers."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, tokenizer = minilm()
    domains = {}
    for name in DOMAINS:
        data = sentences(name)
        rows = np.sort(np.random.default_rng(0).permutation(len(data.texts))[:ROWS])
        texts = [data.texts[row] for row in rows]
        features = pooled_features(
            model,
            texts,
            tokenizer=tokenizer,
            pools=("mean",),
            depths=[-1],
            max_length=64,
            progress=True,
        )
        domains[name] = (texts, features.at(-1), data.labels[rows], data.documents[rows].tolist())
    accuracy = {}
    for source, (_, x, y, _) in domains.items():
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 11))).fit(x, y)
        for target, (_, other, labels, _) in domains.items():
            accuracy[source, target] = float(probe.score(other, labels))
    table = []
    for first, second in combinations(domains, 2):
        (texts, x, _, ours), (others, z, _, theirs) = domains[first], domains[second]
        owners = {"source_documents": ours, "target_documents": theirs, "repeats": 2, "null_draws": 6}
        distance = proxy_a_distance(x, z, **owners)
        form = proxy_a_distance(surface(texts), surface(others), **owners)
        test = mmd_test(torch.tensor(x), torch.tensor(z), documents=(ours, theirs))
        words = lexicon(texts, others)
        table.append(
            {
                "first": first,
                "second": second,
                "a_distance": round(distance.value, 3),
                "low": round(distance.interval.low, 3),
                "high": round(distance.interval.high, 3),
                "null_high": round(distance.null_high, 3),
                "a_distance_of_form": round(form.value, 3),
                "mmd2": round(test.value, 4),
                "mmd_p": round(test.p_value, 4),
                "words_in_common": round(words.overlap, 3),
                "words_within": round(words.within_overlap, 3),
                "accuracy_there": round(accuracy[first, second], 4),
                "accuracy_back": round(accuracy[second, first], 4),
            }
        )
        print(table[-1])
    _written(table)


def _written(table: list[dict[str, Any]]) -> None:
    from scipy.stats import kendalltau

    save_rows("similarity", table)
    distances = [row["a_distance"] for row in table]
    means = [(row["accuracy_there"] + row["accuracy_back"]) / 2 for row in table]
    tau = kendalltau(distances, means)
    print(f"Kendall's tau of distance and accuracy: {tau.statistic:.2f}, p = {tau.pvalue:.2f}")

    def draw(axes: Any) -> None:
        lower = [row["a_distance"] - row["low"] for row in table]
        upper = [min(2, row["high"]) - row["a_distance"] for row in table]
        axes.errorbar(distances, means, xerr=[lower, upper], fmt="o")
        for row, x, y in zip(table, distances, means, strict=True):
            name = f"{row['first']}, {row['second']}"
            below = -12 if name == "nyt, tweets" else 6
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(-8, below), ha="right")
        null = max(row["null_high"] for row in table)
        axes.axvline(null, color="gray", linestyle=":", label="halves of one domain (95 %)")
        axes.set(
            xlabel="proxy A-distance of MiniLM's features (95 % interval)",
            ylabel="accuracy of a probe across, mean of both ways",
            title=(
                f"Six pairs of domains: τ of distance and accuracy {tau.statistic:.2f}, p = {tau.pvalue:.2f}"
            ),
        )
        axes.legend()

    save_plot("similarity", draw)


if __name__ == "__main__":
    main()
