"""Scores without target labels, and the estimate of the target's class proportions."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from peftkern.finetune.errors import InputError
from peftkern.transfer import validators
from peftkern.transfer.validators import information_maximization, label_shift, soft_neighborhood_density


def test_information_maximization_is_the_mutual_information() -> None:
    sure = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, 50.0]])
    assert information_maximization(sure) == pytest.approx(math.log(3), abs=1e-9)
    assert information_maximization(sure[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-9)
    assert information_maximization(torch.zeros(4, 3)) == pytest.approx(0, abs=1e-9)


def test_density_is_the_definition_s_and_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 4, dtype=torch.float64)
    p = torch.softmax(logits, 1)
    p = p / p.norm(dim=1, keepdim=True)
    entropies = []
    for i in range(23):
        others = torch.tensor([float(p[i] @ p[j]) / 0.05 for j in range(23) if j != i], dtype=torch.float64)
        q = torch.softmax(others, 0)
        entropies.append(float(-(q * q.log()).sum()))
    expected = sum(entropies) / 23
    for tile in (1024, 5, 23):
        monkeypatch.setattr(validators, "_TILE", tile)
        assert soft_neighborhood_density(logits) == pytest.approx(expected, abs=1e-9)


def classified(proportions: list[float], rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a fair classifier and labels of rows whose classes have these proportions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(proportions), rows, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(labels, 3) * 1.5 + torch.randn(rows, 3, generator=generator), labels


def test_proportions_are_recovered_from_predictions() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    logits, labels = classified([1 / 3, 1 / 3, 1 / 3], 3000, 0)
    for proportions in ([1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1], [0.0, 0.5, 0.5]):
        target, _ = classified(proportions, 3000, 1)
        found = label_shift(logits, labels, target, warn=False)
        assert found.target == pytest.approx(proportions, abs=0.05) and sum(found.target) == pytest.approx(1)
        true = 0.5 * sum(abs(p - 1 / 3) for p in proportions)
        assert found.low <= true + 0.03 and true - 0.03 <= found.high
        assert found.shifted == (true > 0.2)


def test_a_shift_is_warned_of_and_chance_is_not() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    logits, labels = classified([1 / 3, 1 / 3, 1 / 3], 1000, 0)
    with pytest.warns(UserWarning, match="aligning the domains may hurt"):
        shifted = label_shift(logits, labels, classified([0.8, 0.1, 0.1], 1000, 1)[0])
    assert shifted.verdict.startswith("the predictions speak for other class proportions")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = label_shift(logits, labels, classified([1 / 3, 1 / 3, 1 / 3], 40, 2)[0])
    assert alike.verdict.startswith("cannot tell")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    alike.draw(figure.add_subplot())


def test_bad_input_is_named() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    logits, labels = classified([0.5, 0.5, 0.0], 50, 0)
    with pytest.raises(InputError, match=r"source_labels: got \[.*, 0\] rows"):
        label_shift(logits, labels, logits)
    with pytest.raises(InputError, match="got 49 labels and 3 target classes, expected 50 and 3"):
        label_shift(logits, labels[1:], logits)
    for bad, message in (
        (torch.randn(1, 3), "at least 2 rows"),
        (torch.randn(5, 1), "at least 2 rows of at least 2 classes"),
        (torch.full((5, 2), math.nan), "NaN or infinite"),
    ):
        with pytest.raises(InputError, match=message):
            information_maximization(bad)
