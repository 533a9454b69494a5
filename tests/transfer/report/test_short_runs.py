"""Short runs: what they train, what they measure, and that the model is as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from peftkern.transfer.report.sections import (
    compressed_bits_per_byte,
    cut_section,
    documents_of,
    forgetting_section,
)
from peftkern.transfer.report.short_runs import ShortRun, ShortRuns, per_window, short_runs

from ...patching import models


def nll(model):
    def summed(window):
        logits = model(input_ids=window["input_ids"]).logits
        return F.cross_entropy(logits[0, :-1].float(), window["labels"][0, 1:], reduction="sum")

    return summed


@pytest.fixture
def setting():
    """A LoRA model, batches to train on, and windows of target and source."""
    torch.manual_seed(0)
    model = models.lora(models.llama(four_bit=False))
    for name, parameter in model.named_parameters():  # the identity at the start
        if "lora_B" in name:
            parameter.data.zero_()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 16, (4, 2, 12))]
    windows = [{"input_ids": ids[None], "labels": ids[None]} for ids in torch.randint(0, 16, (6, 12))]
    return model, batches, windows[:3], windows[3:]


def test_losses_are_means_over_a_windows_predictions(setting) -> None:
    model, _, target, _ = setting
    window = {**target[0], "labels": target[0]["labels"].clone()}
    window["labels"][:, 1:5] = -100
    found = per_window(nll(model), [window])
    with torch.no_grad():
        logits = model(input_ids=window["input_ids"]).logits[0, :-1].double()
    labels = window["labels"][0, 1:]
    picked = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert abs(found[0] - float(picked[labels != -100].mean())) < 1e-5


def test_runs_begin_alike_train_what_lies_above_and_leave_no_trace(setting) -> None:
    model, batches, target, source = setting
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen: list[float] = []

    def forecast() -> float:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
        assert any(".0." in name for name in changed) and all("lora" in name for name in changed)
        seen.append(1.0)
        return 0.25

    model.train()
    options = {"nll": nll(model), "layers": 2, "lr": 1e-2, "forecast": forecast}
    found = short_runs(model, batches, target, source, firsts=(0, 1), **options)
    assert seen == [1.0] and found.forecast == 0.25 and [run.first for run in found.runs] == [0, 1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.runs[0].target != found.runs[1].target
    again = short_runs(model, batches, target, source, firsts=(0, 1), **options)
    assert [run.target for run in again.runs] == [run.target for run in found.runs]


def test_the_run_of_all_layers_is_plain_training(setting) -> None:
    model, batches, target, source = setting
    twin = copy.deepcopy(model)
    found = short_runs(model, batches, target, source, nll=nll(model), firsts=(0,), layers=2, lr=1e-2)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    twin.train()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 3)
        twin(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    twin.eval()
    torch.testing.assert_close(
        torch.tensor(found.whole.target), torch.tensor(per_window(nll(twin), target)), rtol=1e-5, atol=0
    )


def runs(*, target: dict[int, list[float]], source: list[float], forecast: float | None = None) -> ShortRuns:
    """Synthetic runs from a start at 3.0 nats."""
    before = ShortRun(0, (3.0, 3.1, 2.9), (2.0, 2.1, 1.9), 0.0)
    found = tuple(
        ShortRun(first, tuple(values), tuple(source), 1.0 - first / 10) for first, values in target.items()
    )
    return ShortRuns(8, 10, before, found, forecast)


def test_the_cut_is_the_highest_that_certainly_keeps_the_gain() -> None:
    found = runs(
        target={0: [2.0, 2.1, 1.9], 2: [2.01, 2.11, 1.91], 4: [2.05, 2.15, 1.95], 6: [2.3, 2.4, 2.2]},
        source=[2.0, 2.1, 1.9],
    )
    assert found.cut() == 4
    assert "Train from layer 4 of 8" in cut_section(found).verdict and "×0.60" in cut_section(found).verdict
    uncertain = runs(target={0: [2.0, 2.1, 1.9], 4: [2.4, 2.1, 1.6]}, source=[2.0, 2.1, 1.9])
    assert uncertain.cut() == 0 and "Train all layers" in cut_section(uncertain).verdict
    nothing = runs(target={0: [3.4, 3.1, 2.6], 4: [3.4, 3.1, 2.6]}, source=[2.0, 2.1, 1.9])
    assert nothing.cut() == 0 and "Cannot tell" in cut_section(nothing).verdict


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ([2.5, 2.61, 2.41], "The model forgets"),
        ([1.5, 1.61, 1.41], "fell by 0.49"),
        ([2.005, 2.095, 1.9], "Nothing certain is forgotten"),
        ([2.5, 2.1, 1.5], "Cannot tell"),
    ],
)
def test_what_is_forgotten_is_said_with_its_certainty(source: list[float], verdict: str) -> None:
    section = forgetting_section(
        runs(target={0: [2.0, 2.1, 1.9]}, source=source, forecast=0.125), budget=0.02
    )
    assert verdict in section.verdict
    assert any("0.1250" in line.value for line in section.lines)


def test_one_window_tells_nothing() -> None:
    before, run = ShortRun(0, (3.0,), (2.0,), 0.0), ShortRun(0, (2.0,), (2.5,), 1.0)
    found = ShortRuns(4, 5, before, (run,))
    assert found.gain.sign == 0 and found.cut() == 0 and "no interval" in cut_section(found).lines[0].value


def test_the_compressor_knows_what_it_has_read() -> None:
    text = " ".join(str(i * i % 9973) for i in range(2000))
    other = " ".join(str(i * i * i % 8887) for i in range(2000))
    assert (
        compressed_bits_per_byte([text], [text[2000:6000]])
        < 0.3
        < compressed_bits_per_byte([other], [text[2000:6000]])
    )


def test_few_texts_are_cut_into_documents() -> None:
    texts = [" ".join(f"{name}{i}" for i in range(40)) for name in "ab"]
    parts = documents_of(texts)
    assert len(parts) == 20 and " ".join(parts) == " ".join(texts)
    assert documents_of(["x"] * 30) == ["x"] * 30
