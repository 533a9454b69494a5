"""Probes under cross-validation: what leaks, what the intervals cover, and which input is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftkern.finetune.errors import InputError
from peftkern.transfer.grouped_ridge import choose_penalty
from peftkern.transfer.intervals import cross_validated, over_runs, paired_runs
from peftkern.transfer.probes import bag_of_words, probe, splits


def _task(n: int = 200, d: int = 10, *, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, d))
    return features, (features[:, 0] + noise * rng.standard_normal(n) > 0).astype(int)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_probe_finds_what_is_linear_and_nothing_in_noise(kind: str) -> None:
    features, labels = _task(noise=0.1)
    where = splits(labels, folds=4, repeats=2)
    found = probe(features, labels, where, kind=kind)
    assert found.accuracy.mean > 0.9 and len(found.scores) == 8
    nothing = probe(np.random.default_rng(1).standard_normal((200, 10)), labels, where, kind=kind)
    assert abs(nothing.accuracy.mean - 0.5) < 3 * nothing.accuracy.se
    assert found.minus(nothing).sign == 1 and nothing.minus(found).sign == -1


def test_documents_stay_on_one_side() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 10)
    labels = rng.integers(
        0,
        2,
        40,
    )[documents]  # a document has one label, and features that give away the document alone
    features = rng.standard_normal((40, 30))[documents] + 0.01 * rng.standard_normal((400, 30))
    leaking = probe(features, labels, splits(labels, folds=4, repeats=1)).accuracy
    grouped = splits(labels, groups=documents, folds=4, repeats=1)
    assert all(not set(documents[train]) & set(documents[test]) for train, test in grouped.rows)
    assert leaking.mean > 0.85 and probe(features, labels, grouped).accuracy.mean < 0.7


def test_labels_may_be_tensors() -> None:
    features, labels = _task(60)
    plain = splits(labels.tolist(), groups=list(range(60)), folds=3, repeats=1)
    where = splits(torch.tensor(labels), groups=torch.arange(60), folds=3, repeats=1)
    assert all(np.array_equal(a, b) for a, b in zip(plain.rows[0], where.rows[0], strict=True))
    assert probe(features, torch.tensor(labels), where) == probe(features, labels, plain)


def test_the_penalty_is_chosen_as_by_fitting_each() -> None:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GroupKFold, cross_val_score

    for seed, classes, width in ((0, 2, 40), (1, 3, 20), (2, 2, 200)):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(15), 6)
        features = rng.standard_normal((90, width))
        labels = rng.integers(0, classes, 90)
        features[:, 0] += 2 * labels
        inner = list(GroupKFold(3).split(features, labels, groups))
        penalties = (0.1, 1.0, 10.0, 100.0, 1000.0)
        means = [
            cross_val_score(RidgeClassifier(alpha=a), features, labels, cv=inner).mean() for a in penalties
        ]
        best = max(zip(means, penalties, strict=True))[1]
        assert choose_penalty(features, labels, inner, penalties) == best


def test_bags_of_words_are_probed_too() -> None:
    texts = [f"{'good' if i % 2 else 'bad'} film number {i % 7}" for i in range(60)]
    labels = [i % 2 for i in range(60)]
    where = splits(labels, folds=3, repeats=1)
    assert probe(bag_of_words(texts), labels, where).accuracy.mean == 1.0
    assert probe(bag_of_words(texts, characters=True), labels, where).accuracy.mean == 1.0
    with pytest.raises(InputError, match="no words"):
        bag_of_words(["!", "?"])


def test_intervals() -> None:
    runs = over_runs([1.0, 2.0, 3.0])
    assert runs.se == pytest.approx(1 / 3**0.5)
    assert runs.high - runs.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert paired_runs([1.0, 2.1, 3.0], [0.0, 1.0, 2.0]).sign == 1 and over_runs([1.0]).sign == 0
    scores = np.random.default_rng(0).standard_normal(25)
    wanted = (scores.var(ddof=1) * (1 / 25 + 1 / 4)) ** 0.5  # Nadeau and Bengio, n_test / n_train = 1 / 4
    assert cross_validated(scores, folds=5).se == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([], None, "labels are needed"),
        ([0, None] * 10, None, "row 1 and 9 more have none"),
        ([1] * 20, None, "all 20 labels are 1"),
        ([0] * 20 + [1] * 3, None, "class 1 has 3 rows, fewer than 5 folds"),
        ([0, 1] * 10, [0, 1, 2, 3] * 5, "4 documents, fewer than 5 folds"),
        ([0, 1] * 10, [0], "1 groups for 20 labels"),
    ],
)
def test_bad_input_is_named(labels: list, groups: list | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        splits(labels, groups=groups)
