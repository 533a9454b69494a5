"""What is trained at a step is a function of the step alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftkern.transfer.depth import parameter_depths
from peftkern.transfer.rates import Rates, check_groups
from peftkern.transfer.unfreezing import GradualUnfreezing, UnfreezingPlan

from .models import bert, llama, lora, tokens


def trained_depths(model: nn.Module) -> set[int]:
    depths = parameter_depths(model)
    return {depths[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_stage_every_so_many_steps() -> None:
    plan = UnfreezingPlan.every(5, [1, 2, 3])
    assert [plan.lowest(step) for step in (0, 4, 5, 9, 10, 99)] == [3, 3, 2, 2, 1, 1]
    assert plan.last_step == 10 and plan == UnfreezingPlan.parse("5", [3, 2, 1])


def test_stages_by_layer() -> None:
    plan = UnfreezingPlan.parse("24:0, 12:40,0:80", range(31))
    assert plan.stages == ((0, 25), (40, 13), (80, 0))
    assert [plan.lowest(step) for step in (0, 39, 40, 80)] == [25, 25, 13, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "'soon' is neither a number of steps"),
        ("3:0,1", "'1' is neither"),
        ("3:5,0:9", "expected a first stage at step 0"),
        ("0:0,3:9", "expected rising steps and falling depths"),
        ("3:0,2:9", "never trains what lies below layer 2"),
        ("0", "steps: got 0"),
    ],
)
def test_plans_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnfreezingPlan.parse(text, [1, 2, 3, 4])


def test_the_model_follows_the_plan_from_any_step() -> None:
    """Also downwards: a process that begins at a later or an earlier step is in the state of that step."""
    model = lora(llama(layers=4))
    work = GradualUnfreezing(model, UnfreezingPlan.every(10, trained_depths(model)))
    for step, expected in ((0, {4}), (35, {1, 2, 3, 4}), (12, {3, 4})):
        work.apply(step)
        assert trained_depths(model) == expected
    work.remove()
    assert trained_depths(model) == {1, 2, 3, 4}


def test_a_classifier_begins_with_its_head() -> None:
    model = bert(layers=2)
    work = GradualUnfreezing(model, UnfreezingPlan.every(1, trained_depths(model)))
    seen = []
    for step in range(4):
        work.apply(step)
        seen.append(min(trained_depths(model)))
    assert seen == [3, 2, 1, 0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, work: GradualUnfreezing) -> None:
    for step in steps:
        work.apply(step)
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def made() -> tuple[nn.Module, torch.optim.Optimizer, GradualUnfreezing]:
    model = lora(llama(layers=3))
    optimizer = torch.optim.AdamW(Rates(layer_ratio=10, lora_plus=4).groups(model, lr=1e-2))
    return model, optimizer, GradualUnfreezing(model, UnfreezingPlan.every(2, trained_depths(model)))


def test_what_is_frozen_stays_and_begins_anew_when_thawed() -> None:
    model, optimizer, work = made()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2), work)
    depths = parameter_depths(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]) == (depths[name] < 3)
            assert (parameter in optimizer.state) == (depths[name] == 3)
    train(model, optimizer, range(2, 3), work)
    steps = {
        depths[n]: int(optimizer.state[p]["step"])
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    assert steps == {2: 1, 3: 3}  # the bias correction begins with a parameter's own first update
    work.remove()
    check_groups(optimizer.param_groups, model)


@pytest.mark.parametrize("break_at", [1, 2, 5])
def test_a_run_that_is_resumed_is_the_unbroken_one(break_at: int) -> None:
    """Lightning's resumed runs freeze again what was thawed (#21901): there the state was in the callback."""
    whole, optimizer, work = made()
    train(whole, optimizer, range(7), work)
    first, optimizer, work = made()
    train(first, optimizer, range(break_at), work)
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second, optimizer, work = made()
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(second, optimizer, range(break_at, 7), work)
    for (name, ours), theirs in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_no_backward_runs_below_the_lowest_trained_layer() -> None:
    model, _, work = made()
    model.enable_input_require_grads()
    model.train()
    reached = []
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _m, _a, out, i=index: reached.append(i) if out.requires_grad else None
        )
    for step, expected in ((0, [2]), (2, [1, 2]), (4, [0, 1, 2])):
        reached.clear()
        work.apply(step)
        model(input_ids=tokens(), labels=tokens())
        assert reached == expected


def test_plans_that_do_not_fit_the_model() -> None:
    model = lora(llama(layers=3))
    with pytest.raises(ValueError, match="at step 0 it trains from depth 4"):
        GradualUnfreezing(model, UnfreezingPlan(((0, 4), (3, 0))))
    with pytest.raises(ValueError, match="it never trains depth 1"):
        GradualUnfreezing(model, UnfreezingPlan(((0, 3), (3, 2))))
