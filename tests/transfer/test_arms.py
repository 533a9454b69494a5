"""The four arms: which layers each gets, which are frozen, and what the differences are called."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from peftkern.transfer.arms import ArmsReport, four_arms


class _Net(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))
        for layer in self.layers:
            nn.init.constant_(layer.weight, value)


def _weights(model: nn.Module) -> list[float]:
    return [round(layer.weight.item(), 6) for layer in model.layers]


def test_each_arm_gets_its_layers() -> None:
    seen = []

    def train(model: nn.Module, task: str, seed: int) -> None:
        seen.append((task, _weights(model), [layer.weight.requires_grad for layer in model.layers]))
        with torch.no_grad():
            for layer in model.layers:
                if layer.weight.requires_grad:
                    layer.weight.add_(100 if task == "A" else 200)

    report = four_arms(
        lambda seed: _Net(float(seed)),
        train,
        lambda model: sum(_weights(model)),
        depths=[2],
        seeds=[0, 3],
    )
    of_seed_3 = seen[6:]  # networks of seed 6 as donors, of seed 7 as targets
    assert of_seed_3[:2] == [("A", [6, 6, 6], [True] * 3), ("B", [6, 6, 6], [True] * 3)]
    assert of_seed_3[2] == ("B", [206, 206, 7], [False, False, True])  # BnB
    assert of_seed_3[3] == ("B", [206, 206, 7], [True] * 3)  # BnB+
    assert of_seed_3[4] == ("B", [106, 106, 7], [False, False, True])  # AnB
    assert of_seed_3[5] == ("B", [106, 106, 7], [True] * 3)  # AnB+
    assert report.base == (600.0, 618.0) and report.scores["AnB"][2] == (401.0, 419.0)
    assert report.specificity(2).mean == -200


def test_the_verdict_names_the_reason() -> None:
    base = (0.9, 0.91, 0.92)
    fine, lost = (0.9, 0.92, 0.91), (0.70, 0.71, 0.73)
    same = {1: fine, 2: fine}
    report = ArmsReport(base, {"BnB": same, "BnB+": same, "AnB": {1: fine, 2: lost}, "AnB+": same})
    assert report.verdict.startswith("1 frozen layer of A loses nothing") and report.verdict.endswith(
        "by specificity."
    )
    both = ArmsReport(
        base,
        {"BnB": {1: fine, 2: lost}, "BnB+": same, "AnB": {1: fine, 2: lost}, "AnB+": same},
    )
    assert both.verdict.endswith("by no measurable specificity and broken co-adaptation.")
    nothing = ArmsReport(base, {arm: same for arm in ("BnB", "BnB+", "AnB", "AnB+")})
    assert "nothing measurable on B, up to all 2" in nothing.verdict
    axes = Figure().subplots()
    report.draw(axes)
    assert (
        axes.get_title() == "1 frozen layer of A loses nothing measurable on B"
        and "| AnB |" in report.table()
    )


def test_one_seed_has_no_error() -> None:
    with pytest.raises(ValueError, match="at least two"):
        four_arms(lambda seed: _Net(0.0), lambda *_: None, lambda _: 0.0, depths=[1], seeds=[0])
    with pytest.raises(ValueError, match="arms: got"):
        four_arms(lambda seed: _Net(0.0), lambda *_: None, lambda _: 0.0, depths=[1], arms=["CnB"])
