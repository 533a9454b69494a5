"""AUM and cartography against their definitions, and on labels that were changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftkern.finetune.errors import InputError
from peftkern.transfer.data.dynamics import LossDynamics, aum_suspects, probe_dynamics, with_fake_class


def test_margins_and_probabilities_are_their_definitions() -> None:
    dynamics = LossDynamics(rows=6, epochs=3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    margins, probabilities = [], []
    for epoch in range(3):
        logits = torch.randn(6, 3, generator=generator)
        order = torch.randperm(6, generator=generator)
        for rows in order.split(4):
            dynamics.note(epoch, rows, logits=logits[rows], labels=labels[rows])
        margins.append(
            [
                row[y] - max(v for j, v in enumerate(row) if j != y)
                for row, y in zip(logits.tolist(), labels, strict=True)
            ]
        )
        probabilities.append(F.softmax(logits, 1)[torch.arange(6), labels].tolist())
    assert dynamics.aum() == pytest.approx(np.mean(margins, 0), abs=1e-6)
    card = dynamics.cartography()
    assert card.confidence == pytest.approx(np.mean(probabilities, 0), abs=1e-6)
    assert card.variability == pytest.approx(np.std(probabilities, 0), abs=1e-6)
    assert card.correct == pytest.approx((np.array(margins) > 0).mean(0))
    assert card.hard[0] == card.confidence.argmin()


def test_losses_alone_make_the_map_and_no_margin() -> None:
    dynamics = LossDynamics(rows=2, epochs=2)
    for epoch, losses in enumerate(([0.0, 1.0], [0.5, 3.0])):
        dynamics.note(epoch, [0, 1], losses=torch.tensor(losses))
    card = dynamics.cartography()
    assert card.confidence == pytest.approx([(1 + np.exp(-0.5)) / 2, (np.exp(-1) + np.exp(-3)) / 2])
    assert np.isnan(card.correct).all()
    with pytest.raises(ValueError, match="row 0 and 1 more have no margins"):
        dynamics.aum()


def test_wrong_labels_have_a_small_area() -> None:
    """Against a class of wrong labels by construction, as in the paper, in two trainings that together judge
    every row."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 600)
    features = 3 * np.eye(3)[labels] @ generator.standard_normal((3, 16)) + generator.standard_normal(
        (600, 16)
    )
    wrong = generator.choice(600, 60, replace=False)
    noisy = labels.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 3
    found: set[int] = set()
    for part in range(2):
        changed, fake = with_fake_class(noisy, classes=3, part=part)
        assert (changed[fake] == 3).all() and len(fake) == 150
        suspects = aum_suspects(probe_dynamics(features, changed, epochs=10).aum(), fake)
        assert not set(suspects.rows) & set(fake.tolist())
        found |= set(suspects.rows)
    assert len(found & set(wrong.tolist())) >= 54
    assert len(found & set(wrong.tolist())) / len(found) > 0.6
    assert "rows" in suspects.verdict


def test_the_fake_classes_of_two_parts_are_of_other_rows() -> None:
    labels = np.arange(90) % 2
    fakes = [set(with_fake_class(labels, classes=2, part=part)[1].tolist()) for part in range(3)]
    assert not fakes[0] & fakes[1] and len(set.union(*fakes)) == 90


def test_it_draws_itself() -> None:
    from matplotlib.figure import Figure

    dynamics = probe_dynamics(np.random.default_rng(0).standard_normal((30, 4)), [0, 1] * 15, epochs=2)
    dynamics.cartography().draw(Figure().add_subplot())
    aum_suspects(dynamics.aum(), [0, 1]).draw(Figure().add_subplot())


def test_bad_input() -> None:
    dynamics = LossDynamics(rows=2, epochs=1)
    with pytest.raises(ValueError, match="give logits and labels, or losses"):
        dynamics.note(0, [0], logits=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="rows, epochs: got 0 and 1"):
        LossDynamics(rows=0, epochs=1)
    with pytest.raises(InputError, match="two classes"):
        probe_dynamics(np.zeros((3, 2)), [0, 0, 0])
    with pytest.raises(ValueError, match="fake: got no rows"):
        aum_suspects(np.zeros(3), [])
