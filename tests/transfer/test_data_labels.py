"""Confident learning on out-of-fold probabilities, against its definition and on labels that were changed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cleanlab", reason="cleanlab is not installed: pip install 'peftkern[data]'")

from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.data.labels import label_noise, out_of_fold  # noqa: E402


def blobs(
    rows: int = 400, classes: int = 3, spread: float = 0.7, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clusters [rows, 8] with their class."""
    generator = np.random.default_rng(seed)
    centres = 2 * generator.standard_normal((classes, 8))
    labels = generator.integers(0, classes, rows)
    return centres[labels] + spread * generator.standard_normal((rows, 8)), labels


def flipped(labels: np.ndarray, share: float, classes: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels with `share` of them moved to another class, and which."""
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(labels), round(share * len(labels)), replace=False)
    changed = labels.copy()
    changed[rows] = (changed[rows] + generator.integers(1, classes, len(rows))) % classes
    return changed, rows


def test_wrong_labels_are_found_and_counted() -> None:
    features, labels = blobs()
    noisy, wrong = flipped(labels, 0.1, 3)
    found = label_noise(noisy, out_of_fold(features, noisy))
    hits = len(set(found.suspects) & set(wrong.tolist()))
    assert hits / len(wrong) > 0.8 and hits / len(found.suspects) > 0.9
    assert found.low <= 0.1 <= found.high and abs(found.rate - 0.1) < 0.03
    assert (found.suggested[wrong] == labels[wrong]).mean() > 0.9
    assert "labels are suspected" in found.verdict
    assert list(found.confidence[list(found.suspects)]) == sorted(found.confidence[list(found.suspects)])


def test_thresholds_and_joint_are_those_of_the_paper() -> None:
    """Northcutt et al. (2021): t_j, the confident counts, and their calibration to the labels' counts."""
    features, labels = blobs(spread=1.5)
    noisy, _ = flipped(labels, 0.2, 3)
    p = out_of_fold(features, noisy)
    found = label_noise(noisy, p)
    thresholds = np.array([p[noisy == j, j].mean() for j in range(3)])
    assert found.thresholds == pytest.approx(thresholds)
    counts = np.zeros((3, 3))
    for given, row in zip(noisy, p, strict=True):
        confident = [j for j in range(3) if row[j] >= thresholds[j] - 1e-9]
        if confident:
            counts[given, max(confident, key=lambda j: row[j])] += 1
    calibrated = counts / counts.sum(1, keepdims=True) * np.bincount(noisy)[:, None]
    # cleanlab rounds the calibrated counts to whole rows.
    assert np.abs(found.joint - calibrated / calibrated.sum()).max() < 1 / len(labels)
    assert found.rate == pytest.approx(1 - np.trace(found.joint))


def test_probabilities_are_of_probes_that_have_not_seen_the_row() -> None:
    """Of random labels on many features, a probe that has seen them is sure; out of fold it is not right more
    often than chance."""
    generator = np.random.default_rng(0)
    features, labels = generator.standard_normal((120, 200)), generator.integers(0, 2, 120)
    p = out_of_fold(features, labels)
    assert (p.argmax(1) == labels).mean() < 0.65
    assert "cannot tell" in label_noise(labels, p).verdict


def test_rows_of_one_document_are_never_on_both_sides() -> None:
    """Documents of one label each whose rows are alike: seen through another row of the document, each would
    be known."""
    generator = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 5)
    features = np.eye(40)[documents] + 0.01 * generator.standard_normal((200, 40))
    labels = generator.integers(0, 2, 40)[documents]
    assert (out_of_fold(features, labels).argmax(1) == labels).mean() == 1.0
    assert (out_of_fold(features, labels, groups=documents).argmax(1) == labels).mean() < 0.75


def test_clean_labels_are_called_clean() -> None:
    features, labels = blobs(spread=0.2)
    found = label_noise(labels, out_of_fold(features, labels))
    assert found.suspects == () and found.rate == 0.0 and "clean" in found.verdict


def test_labels_may_be_words_and_features_sparse() -> None:
    from scipy.sparse import csr_matrix

    features, labels = blobs(classes=2)
    named = np.array(["bad", "good"])[labels]
    p = out_of_fold(csr_matrix(features), named.tolist())
    assert label_noise(named.tolist(), p).classes == ("bad", "good")


def test_the_same_seed_gives_the_same_numbers() -> None:
    features, labels = blobs(rows=100, classes=2)
    p = out_of_fold(features, labels, seed=5)
    assert np.array_equal(p, out_of_fold(features, labels, seed=5))
    one, two = (label_noise(labels, p, seed=2) for _ in range(2))
    assert (one.low, one.high) == (two.low, two.high)


def test_it_draws_itself() -> None:
    from matplotlib.figure import Figure

    features, labels = blobs(rows=100)
    axes = Figure().add_subplot()
    label_noise(labels, out_of_fold(features, labels)).draw(axes)
    assert axes.get_title()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 20, "a probe needs at least two classes"),
        ([0] * 18 + [1] * 2, "class 1 has 2 rows, fewer than 5 folds"),
        ([0] * 10 + [None] * 10, "labels are needed here, and row 10 and 9 more have none"),
        ([], "labels are needed here, and there are none"),
    ],
)
def test_labels_that_cannot_be_checked(labels: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        out_of_fold(np.zeros((len(labels), 3)), labels)


def test_other_bad_input() -> None:
    features, labels = blobs(rows=40, classes=2)
    with pytest.raises(InputError, match="there are 3 documents, fewer than 5 folds"):
        out_of_fold(features, labels, groups=np.arange(40) % 3)
    with pytest.raises(InputError, match=r"features: got shape \(39, 8\) for 40 labels"):
        out_of_fold(features[1:], labels)
    with pytest.raises(InputError, match="NaN or infinite"):
        out_of_fold(np.full((40, 8), np.nan), labels)
    with pytest.raises(ValueError, match=r"probabilities: got shape \(40, 3\), expected \(40, 2\)"):
        label_noise(labels, np.full((40, 3), 1 / 3))
    with pytest.raises(ValueError, match="add up to 1"):
        label_noise(labels, np.full((40, 2), 0.9))
