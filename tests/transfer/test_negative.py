"""Arms on one budget: known help and harm are found, equal arms are not told apart, and numbers are those of
the curves.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from peftkern.finetune.errors import InputError
from peftkern.transfer.calibration import brier_score, expected_calibration_error
from peftkern.transfer.negative import NegativeReport, Run, arms_of, compare_arms, negative_transfer
from peftkern.transfer.tasks import Score, Task, classification, language_modelling


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def _teacher() -> _Net:
    torch.manual_seed(0)
    model = _Net()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(4)
    return model


def _data(n: int = 400) -> tuple[dict[str, Tensor], Tensor]:
    """Labels that are linear in the teacher's hidden features, and in nothing before them."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = _teacher()(x)
    return {"x": x}, (logits[:, 1] - logits[:, 0] > (logits[:, 1] - logits[:, 0]).median()).long()


def _task(**options: object) -> Task:
    return classification(*_data(), batch_size=16, **options)


@pytest.fixture
def trained() -> _Net:
    """A network that knows the task's hidden features."""
    return _teacher()


_QUICK = {"steps": 60, "rates": (1e-2,), "evaluations": 4}


def test_pretraining_that_fits_helps(trained: _Net) -> None:
    report = negative_transfer(trained, _task(), head=("head",), depths=[1], **_QUICK)
    assert report.verdict() == "helps" and report.gain(of="accuracy").sign == 1
    value, _ = report.worth()
    assert value > 1.5 and "The pretrained weights help against random ones" in report.describe()
    assert report.verdict("shuffled") != "helps"
    assert {run.arm for run in report.runs} == {"pretrained", "random", "shuffled", "first 1"}
    axes = Figure().subplots()
    report.draw(axes)
    assert (
        axes.get_title() == "The pretrained weights help against random ones"
        and "| first 1 |" in report.table()
    )


def test_weights_that_block_learning_hurt_and_equal_arms_cannot_be_told(trained: _Net) -> None:
    arms = arms_of(trained, head=("head",))

    def constant(seed: int) -> nn.Module:
        model = arms["random"](seed)
        with torch.no_grad():
            model.layers[1].bias.add_(30)  # tanh is 1 whatever comes in, and its gradient is zero
        return model

    report = compare_arms(
        {"source": constant, "random": arms["random"], "again": arms["random"]},
        _task(),
        **_QUICK,
    )
    assert report.verdict("again") == "cannot tell" and report.gain("again").mean == 0.0
    assert report.verdict("source") == "hurts" and report.worth("source")[0] < 1
    assert report.describe("source").startswith("The weights of arm 'source' hurt against random ones")
    with pytest.raises(ValueError, match="arm: got 'pretrained'"):
        report.verdict()


def _run(arm: str, seed: int, losses: list[float]) -> Run:
    return Run(
        arm,
        seed,
        1e-3,
        tuple(range(0, 100 * len(losses), 100)),
        tuple(Score(loss, 0.5, 0.1, 0.2) for loss in losses),
    )


def test_areas_verdicts_and_worth_are_those_of_the_curves() -> None:
    slow = [_run("random", seed, [4.0, 3.0, 2.0 + 0.01 * seed, 1.0]) for seed in range(3)]
    fast = [_run("pretrained", seed, [3.0, 1.0 + 0.01 * seed, 0.5, 0.4]) for seed in range(3)]
    report = NegativeReport((*slow, *fast), 0.0)
    assert slow[0].area == pytest.approx((2.5 + 1.5) / 2)  # from the first evaluation of a trained model on
    assert slow[0].reaches(2.5) == 150 and slow[0].reaches(0.5) == math.inf and slow[0].reaches(9) == 0
    assert report.verdict() == "helps" and report.verdict("random", "pretrained") == "hurts"
    value, bound = report.worth()  # the loss of 1.0 after 300 examples against 100, 102 and 104
    assert not bound and value == pytest.approx((3 * 300 / 102 * 300 / 104) ** (1 / 3), rel=1e-3)
    assert report.worth("random", "pretrained")[0] == pytest.approx(1 / value)
    ready = NegativeReport(
        (*slow, *(_run("pretrained", seed, [0.9, 0.5, 0.4, 0.3]) for seed in range(3))),
        0.0,
    )
    assert ready.worth() == (pytest.approx(3.0), True) and "worth at least 3.0 times" in ready.describe()
    noisy = [_run("pretrained", seed, [4.0, 3.0 + (-1) ** seed, 2.0, 1.0]) for seed in range(3)]
    report = NegativeReport((*slow, *noisy), 0.0)
    assert report.verdict() == "cannot tell" and report.describe().startswith(
        "Cannot tell whether the pretrained"
    )
    assert report.gain(of="brier").mean == 0.0
    with pytest.raises(ValueError, match="of: got 'f1'"):
        report.gain(of="f1")


def test_the_cost_is_said_before_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    def arm(seed: int) -> nn.Module:
        made.append(seed)
        return _Net()

    with pytest.raises(
        InputError,
        match=r"2 arms x \(3 seeds x 1000 steps \+ 4 rates x 200 steps\) = 7600 steps.*steps would fit",
    ):
        compare_arms({"a": arm, "random": arm}, _task(), steps=1000, budget=1e-3)
    assert made == [0] and "7600 steps, about" in capsys.readouterr().err


def test_learning_rates_are_searched_for_each_arm_apart_from_the_test_set(trained: _Net) -> None:
    arms = arms_of(trained, head=("head",))
    options = {"steps": 20, "rates": (1e-9, 1e-2), "seeds": (0, 1), "evaluations": 2}
    report = compare_arms({"pretrained": arms["pretrained"]}, _task(), **options)
    assert {run.rate for run in report.runs} == {1e-2}
    again = compare_arms({"pretrained": arms["pretrained"]}, _task(), **options)
    assert again.runs == report.runs  # to the bit


def test_batches_are_a_function_of_seed_and_step() -> None:
    task, device = _task(), torch.device("cpu")
    n = len(task.train[1])
    first = [task.batch(1, step, device)[0]["x"] for step in range(n // 16)]
    assert torch.equal(first[3], task.batch(1, 3, device)[0]["x"])
    assert not torch.equal(first[3], task.batch(2, 3, device)[0]["x"])
    rows = torch.cat(first)
    assert len(rows.unique(dim=0)) == len(rows)  # a pass over the data holds no row twice


def test_documents_are_in_one_part_alone() -> None:
    inputs, labels = _data()
    groups = [index % 40 for index in range(400)]
    task = classification({**inputs, "group": torch.tensor(groups)}, labels, groups=groups)
    parts = [set(part[0]["group"].tolist()) for part in (task.train, task.validation, task.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert [len(part) for part in parts] == [24, 4, 12]


def test_language_models_have_arms_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    windows = torch.randint(0, 32, (40, 8))
    task = language_modelling(windows, groups=[i // 2 for i in range(40)], batch_size=4)
    with torch.no_grad():
        wanted = model.eval()(input_ids=task.test[1], labels=task.test[1]).loss
    assert task.score(model, task.test).loss == pytest.approx(wanted.item(), rel=1e-5)
    report = negative_transfer(model, task, steps=4, seeds=(0, 1), rates=(1e-3,), evaluations=2)
    assert math.isnan(report.gain(of="accuracy").mean) and "| - |" in report.table()


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 1])
    sklearn = pytest.importorskip("sklearn.metrics")
    assert brier_score(probabilities, labels) == pytest.approx(
        2 * sklearn.brier_score_loss(labels, probabilities[:, 1]),
    )
    assert expected_calibration_error(
        probabilities,
        labels,
        bins=10,
    ) == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4)
    rng = np.random.default_rng(0)
    fair = rng.random(200_000)
    pairs = np.stack([1 - fair, fair], axis=1)
    assert expected_calibration_error(pairs, (rng.random(200_000) < fair).astype(int)) < 0.005


def test_bad_input_is_named() -> None:
    inputs, labels = _data(30)
    with pytest.raises(InputError, match="all 30 labels are of one class"):
        classification(inputs, torch.zeros_like(labels))
    with pytest.raises(InputError, match="part of 30 rows is empty"):
        classification(inputs, labels, groups=[0] * 15 + [1] * 15)
    with pytest.raises(InputError, match="do not fill three parts"):
        language_modelling(torch.zeros(4, 8, dtype=torch.long), groups=[0, 0, 1, 1])
    with pytest.raises(InputError, match="at least two are needed"):
        compare_arms({"random": lambda _: _Net()}, _task(), seeds=(1,))
