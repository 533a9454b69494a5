"""The report of where to cut: on a network whose layers are known, its controls, costs and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from peftkern.finetune.errors import InputError
from peftkern.transfer.cut import scaled, step_cost, step_share, where_to_cut


class _Net(nn.Module):
    """Four layers: the second makes the XOR of two inputs linear (as a product), the fourth forgets it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Keep(), _Product(), _Keep(), _Forget()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Keep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Product(_Keep):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :5], 10 * x[:, :1] * x[:, 1:2]], dim=1) @ self.weight


class _Forget(_Keep):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :5], torch.zeros_like(x[:, :1])], dim=1) @ self.weight


def _task(n: int = 240) -> tuple[list[dict[str, Tensor]], list[int]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return [{"x": x}], (x[:, 0] * x[:, 1] > 0).long().tolist()


def test_the_cut_is_where_the_task_becomes_linear() -> None:
    batches, labels = _task()
    report = where_to_cut(_Net(), batches, labels, folds=4, repeats=2, random_twin=False)
    accuracy = [row.accuracy.mean for row in report.rows]
    assert report.recommended == 2 and accuracy[2] > 0.85 > 0.65 > max(accuracy[1], accuracy[4])
    assert np.argmax([row.logme for row in report.rows]) in (2, 3)
    assert report.rows[4].to_last.value == pytest.approx(1.0) and "Cut at 2 of 4" in report.verdict
    assert report.rows[2].step == pytest.approx(0.75) and report.rows[2].activations == 0.5
    figure = Figure()
    axes = figure.subplots()
    report.draw(axes)
    assert "From layer 2 on" in axes.get_title() and "| 2 | 0." in report.table()


def test_without_structure_there_is_no_cut() -> None:
    batches, _ = _task()
    labels = np.random.default_rng(0).integers(0, 2, 240).tolist()
    report = where_to_cut(_Net(), batches, labels, folds=4, repeats=2)
    assert report.recommended is None and "random network's" in report.verdict
    assert report.rows[1].random is not None


def test_shares_of_a_step() -> None:
    assert step_share(0, 30) == 1.0 and step_share(30, 30) == 0.5
    assert step_share(30, 30, trained="all") == pytest.approx(1 / 3) == step_share(30, 30, recompute=True)
    assert step_share(
        77,
        80,
        recompute=True,
    ) == pytest.approx(86 / 240)  # LlamaFactory#5398's arithmetic: 240 / 86 = 2.79
    with pytest.raises(ValueError, match="trained: got"):
        step_share(0, 1, trained="some")


def test_below_a_cut_nothing_is_saved() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=40,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    model.lm_head.weight.requires_grad_(False)
    ids = torch.arange(20).view(2, 10)
    costs = [step_cost(model, {"input_ids": ids, "labels": ids}, first, repeats=1) for first in range(5)]
    sizes = [cost.saved_bytes for cost in costs]
    assert (
        np.diff(sizes[:4])
        == pytest.approx(
            sizes[1] - sizes[0],
            rel=0.2,
        )
        and sizes[4] < sizes[3] < sizes[0]
    )
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_scaling_divides_each_dimension_by_its_spread() -> None:
    features = np.random.default_rng(0).standard_normal((50, 3)) * [1, 1000, 0] + [0, 0, 7]
    np.testing.assert_allclose(scaled(features).std(0), [1, 1, 0], atol=1e-12)


def test_bad_input_is_named() -> None:
    batches, labels = _task()
    with pytest.raises(InputError, match="labels are needed"):
        where_to_cut(_Net(), batches, [None] * 240)
    with pytest.raises(InputError, match="all 240 labels"):
        where_to_cut(_Net(), batches, [1] * 240)
    with pytest.raises(InputError, match="3 documents, fewer than 5 folds"):
        where_to_cut(_Net(), batches, labels, groups=[i % 3 for i in range(240)])
