"""The paired rise, its test, the replay's draws, the overlap check, the budget and the Pareto front."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from peftkern.transfer.forgetting import (
    Calibration,
    ForgetBudget,
    ParetoFront,
    Point,
    Replay,
    SourceRise,
    WindowLosses,
    measure_forgetting,
    source_rise,
    window_losses,
)
from peftkern.transfer.forgetting.overlap import overlapping

from . import tiny


def test_before_is_the_model_without_its_adapter() -> None:
    model, windows = tiny.lora(tiny.base()), tiny.one_by_one(tiny.batches())
    plain = window_losses(tiny.base(), windows)
    rise = measure_forgetting(model, windows)
    assert rise.nats == pytest.approx(window_losses(model, windows).mean - plain.mean, rel=1e-9)
    assert rise.nats != 0 and (rise.windows, rise.predictions) == (5, sum(plain.counts)) == (5, 34)
    nothing = measure_forgetting(tiny.lora(tiny.base(), moved=False), windows)
    assert (nothing.nats, nothing.standard_error) == (0, 0)


def test_the_error_of_equal_windows_is_that_of_scipy_s_paired_test() -> None:
    from scipy import stats

    generator = random.Random(0)
    before = [generator.gauss(100, 20) for _ in range(12)]
    now = [value + generator.gauss(1, 2) for value in before]
    rise = source_rise(*(WindowLosses(tuple(each), (50,) * 12) for each in (before, now)))
    test = stats.ttest_rel(now, before, alternative="greater")
    assert rise.nats / rise.standard_error == pytest.approx(test.statistic)
    for level in (0.5, 0.05, 0.001):
        assert rise.exceeds(0.0, level=level) == (test.pvalue < level)
    interval = stats.ttest_rel(now, before).confidence_interval(0.95)
    assert rise.bounds(0.05) == pytest.approx((interval.low / 50, interval.high / 50))


def test_verdicts_name_what_cannot_be_told() -> None:
    assert SourceRise(0.05, 0.001, 30, 900).verdict(0.02).startswith("Forgets more than 0.02")
    assert SourceRise(0.01, 0.001, 30, 900).verdict(0.02).startswith("Within 0.02")
    assert SourceRise(0.02, 0.010, 30, 900).verdict(0.02).startswith("Cannot tell")


def test_losses_of_other_windows_and_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="losses of other windows"):
        source_rise(WindowLosses((1.0, 2.0), (3, 4)), WindowLosses((1.0, 2.0), (4, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        window_losses(tiny.base(), tiny.batches((1,)))


def test_replay_is_exact_in_its_ratio_without_replacement_and_a_function_of_the_step() -> None:
    plan = Replay(rows=7, ratio=0.3, slots=5, seed=2)
    drawn = [plan.rows_of(step) for step in range(70)]
    flat = [row for rows in drawn for row in rows]
    assert len(flat) == 105 and {len(rows) for rows in drawn} == {1, 2}
    turns = [flat[start : start + 7] for start in range(0, 105, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns) and len({tuple(turn) for turn in turns}) > 10
    assert [
        Replay(rows=7, ratio=0.3, slots=5, seed=2).rows_of(step) for step in reversed(range(70))
    ] == drawn[::-1]
    assert drawn != [Replay(rows=7, ratio=0.3, slots=5, seed=3).rows_of(step) for step in range(70)]
    assert [len(Replay(rows=3, ratio=0.1, slots=1).rows_of(step)) for step in range(20)].count(1) == 2


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"weight": 0.0}, {"slots": 0}]
)
def test_a_replay_of_nothing_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        Replay(**{"rows": 3, "ratio": 0.5, "slots": 2} | options)


def test_shared_passages_are_found_whatever_their_case_and_place() -> None:
    long = " ".join(f"word{number}" for number in range(100))
    texts = [long, f"Before it. {long.upper()} And after.", "another text " * 20, "short", ""]
    assert overlapping(texts, ["Nothing of the kind", f"intro {' '.join(long.split()[:20])} end"]) == [0, 1]
    assert overlapping(texts, ["short"]) == [3]
    assert overlapping(texts, []) == []


def test_calibration_is_one_before_any_measurement_and_then_what_was_measured() -> None:
    calibration = Calibration()
    assert calibration.slope == 1
    calibration.add(0.01, SourceRise(0.03, 0.001, 20, 900))
    assert calibration.slope == pytest.approx(3.0, rel=1e-3)
    calibration.add(0.02, SourceRise(-0.5, 0.001, 20, 900))
    assert calibration.slope == 0.05


def test_the_multiplier_rises_while_the_budget_is_exceeded_and_its_state_is_exact() -> None:
    budget = ForgetBudget(0.02)
    weights = []
    for forecast in (0.0, 0.01, 0.02, 0.03, 0.03, 0.03, 0.015):
        budget.observe(forecast)
        weights.append(budget.weight)
    assert (
        weights[:2] == [0, 0]
        and 0 < weights[2] < weights[3] < weights[4] < weights[5]
        and weights[6] < weights[2]
    )
    twin = ForgetBudget(0.02)
    twin.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    for each in (budget, twin):
        each.observe(0.0234567)
    assert twin.weight == budget.weight
    with pytest.raises(ValueError, match="expected a budget above 0"):
        ForgetBudget(0.0)


def test_the_budget_is_met_on_a_quadratic_by_its_optimum() -> None:
    """min (w - 1)^2 with a forecast of w^2 <= 0.09: gradient descent with the weight settles at nine tenths
    of the budget."""
    budget, w = ForgetBudget(0.1), torch.tensor(0.0, dtype=torch.float64)
    for _ in range(3000):
        w = w - 0.02 * (2 * (w - 1) + budget.weight * 2 * w)
        budget.observe(w.item() ** 2)
    assert w.item() ** 2 == pytest.approx(0.09, rel=1e-3)
    assert budget.weight == pytest.approx((1 - w.item()) / w.item(), rel=1e-2)


def test_only_adapters_on_the_front_are_kept_and_the_best_is_within_the_budget(tmp_path: Path) -> None:
    front = ParetoFront(tmp_path / "pareto")

    def save(folder: Path) -> None:
        (folder / "adapter").write_text("weights")

    points = [
        Point(1, 3.0, 0.0, 0.1),
        Point(2, 2.0, 0.01, 0.1),
        Point(3, 2.5, 0.02, 0.1),
        Point(4, 1.5, 0.05, 0.1),
    ]
    for point in points:
        front.add(point, save)
    assert [point.step for point in front.front] == [1, 2, 4]
    front.add(Point(5, 1.9, 0.01, 0.1), save)
    assert sorted(path.name for path in (tmp_path / "pareto").iterdir()) == [
        "step-00001",
        "step-00004",
        "step-00005",
    ]
    assert front.best(0.02).step == 5 and front.best(-0.01) is None and front.best(1.0).step == 4
    resumed = ParetoFront(tmp_path / "pareto")
    resumed.load_state_dict(json.loads(json.dumps(front.state_dict()[:4])))
    assert not (tmp_path / "pareto" / "step-00005").exists() and resumed.points == points


def test_results_draw_themselves() -> None:
    from matplotlib.figure import Figure

    from peftkern.transfer.forgetting import DeltaPenalty, ExpansionTerms
    from peftkern.transfer.forgetting.plots import draw_layers

    figure = Figure()
    axes = figure.subplots(1, 3)
    SourceRise(0.05, 0.001, 30, 900).draw(axes[0], 0.02)
    ExpansionTerms(0.01, 0.04, 0.03, 0.02).draw(axes[1])
    draw_layers(axes[2], DeltaPenalty(tiny.lora(tiny.base())).by_layer())
    titles = [each.get_title() for each in axes]
    assert titles[:2] == ["Forgets more than 0.02 nats", "The diagonal shows 50.0% of the second order"]
    assert titles[2] in ("Layer 0 forgets most, by the forecast", "Layer 1 forgets most, by the forecast")
