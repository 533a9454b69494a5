"""Cuts tried out by training: what is trained, what is compared, and that the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from peftkern.finetune.errors import InputError
from peftkern.transfer.cut import StepCost
from peftkern.transfer.tasks import Task, language_modelling
from peftkern.transfer.trained_cuts import TrainedCut, TrainedCuts, trained_cuts

transformers = pytest.importorskip(
    "transformers",
    reason="transformers is not installed: pip install 'peftkern[transfer]'",
)
pytest.importorskip("peft", reason="peft is not installed: pip install 'peftkern[transfer]'")


def _model() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def _task() -> Task:
    windows = torch.arange(60)[:, None] % 7 + torch.arange(8)[None] * 3
    return language_modelling(windows % 32, groups=list(range(60)), batch_size=8)


def test_runs_train_the_layers_above_the_cut_alone() -> None:
    model, task = _model(), _task()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tried = trained_cuts(model, task, firsts=(0, 2, 4), steps=15, seeds=(0, 1), rate=1e-2)
    assert [cut.first for cut in tried.cuts] == [0, 2, 4] and tried.layers == 4
    uncut, half, none = tried.cuts
    assert set(none.losses) == {tried.before}  # at 4 of 4 nothing is trained
    assert max(uncut.losses) < max(half.losses) < tried.before
    assert none.cost.saved_bytes < half.cost.saved_bytes < uncut.cost.saved_bytes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(
            after[name],
            value,
        )
        for name, value in before.items()
    )
    again = trained_cuts(model, task, firsts=(0, 2), steps=15, seeds=(0, 1), rate=1e-2)
    assert [cut.losses for cut in again.cuts] == [cut.losses for cut in tried.cuts[:2]]


def _cut(first: int, losses: tuple[float, ...]) -> TrainedCut:
    return TrainedCut(first, losses, losses, StepCost(first, 1.0 - first / 20, 1000 - 50 * first))


def test_the_verdict_is_the_deepest_cut_that_loses_nothing() -> None:
    cuts = (
        _cut(0, (2.0, 2.1, 2.2)),
        _cut(4, (2.01, 2.09, 2.2)),
        _cut(8, (2.3, 2.41, 2.5)),
        _cut(12, (2.0, 2.1, 2.2)),
    )
    tried = TrainedCuts(cuts, 16, 3.0, 30)
    assert (
        tried.recommended.first == 4
        and "Cut at 4 of 16" in tried.verdict
        and "×0.80 of the time" in tried.verdict
    )
    nowhere = TrainedCuts((cuts[0], cuts[2]), 16, 3.0, 30)
    assert nowhere.verdict.startswith("Cut nowhere above 0: 8 of 16 already loses 0.3")
    axes = Figure().subplots()
    tried.draw(axes)
    assert axes.get_title() == "Cut at 4 of 16" and "| 8 | 2.4" in tried.table()


def test_bad_input_is_named_and_leaves_no_adapter() -> None:
    model = _model()
    with pytest.raises(InputError, match="at least two of each"):
        trained_cuts(model, _task(), firsts=(0,))
    with pytest.raises(InputError, match="more than the budget of 0 s"):
        trained_cuts(model, _task(), steps=10, budget=0.0)
    assert not any("lora" in name for name, _ in model.named_parameters())
