"""The factored Fisher against the dense diagonal one, which squares the gradient of one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftkern
from peftkern.transfer.forgetting import FisherFactors, collect_fisher, lora_factors, reference
from peftkern.transfer.forgetting.marginals import marginals
from peftkern.transfer.forgetting.predictions import causal_lm, labels_of, step_generator, summed_loss

from . import tiny

PREDICTIONS = 2 * 8 + 8 + 2 * 8 - 3 * 2


def dense(model: nn.Module, examples: list[Any], nll: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The definition, on a copy without adapters whose weights are trained."""
    return reference.dense_diagonal_fisher(weights(model), examples, nll, predictions=PREDICTIONS)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: layer.module.base_layer.weight.requires_grad_() for name, layer in lora_factors(model).items()
    }


def drawn_loss(model: nn.Module, made: list[dict[str, Tensor]], seed: int) -> Callable[[int], Tensor]:
    """The loss of one example at the labels that `collect_fisher` draws for the batches `made`."""
    examples, labels = tiny.one_by_one(made), []
    for number, batch in enumerate(made):
        with torch.no_grad(), model.disable_adapter():
            logits, known = causal_lm(model, batch)
        drawn = labels_of(logits, known, "true", step_generator(logits.device, seed, number))
        labels += list(drawn.split((batch["labels"][:, 1:] != -100).sum(1).tolist()))

    def nll(index: int) -> Tensor:
        with model.disable_adapter():
            return summed_loss(causal_lm(model, examples[index])[0], labels[index])

    return nll


@pytest.mark.parametrize("labels", ["true", "empirical"])
def test_sums_are_those_of_the_dense_fisher_of_single_examples(labels: str) -> None:
    model, made = tiny.lora(tiny.base()).eval(), tiny.batches()
    got = collect_fisher(model, made, labels=labels, seed=3)
    twin = copy.deepcopy(model)
    if labels == "true":
        exact = dense(twin, list(range(5)), drawn_loss(twin, made, 3))
    else:

        def nll(batch: dict[str, Tensor]) -> Tensor:
            with twin.disable_adapter():
                return summed_loss(*causal_lm(twin, batch))

        exact = dense(twin, tiny.one_by_one(made), nll)
    assert (got.predictions, got.examples, got.labels, got.unit) == (PREDICTIONS, 5, labels, "sequence")
    assert len(exact) == 14
    for name, fisher in exact.items():
        torch.testing.assert_close(got.rows[name], fisher.sum(1), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(got.columns[name], fisher.sum(0), rtol=1e-10, atol=1e-14)


def test_the_square_of_a_batch_gradient_is_another_number() -> None:
    """What Avalanche and others compute; the test above would fail with it."""
    model, made = tiny.lora(tiny.base()).eval(), tiny.batches((4,))
    got = collect_fisher(model, made, labels="empirical")
    twin = copy.deepcopy(model)
    trained = list(weights(twin).values())
    with twin.disable_adapter():
        wrong = torch.autograd.grad(summed_loss(*causal_lm(twin, made[0])), trained)
    for name, gradient in zip(got.rows, wrong, strict=True):
        assert not torch.allclose(got.rows[name], gradient.square().sum(1) / got.predictions, rtol=0.05)


def test_true_fisher_is_the_mean_over_the_model_s_own_labels() -> None:
    """With one prediction an example the exact Fisher is sum_y p(y) G_y^2; many draws approach it."""
    torch.manual_seed(0)
    model = _Classifier()
    wrapped = tiny.peft.get_peft_model(model, tiny.peft.LoraConfig(r=2, target_modules=["hidden"]))
    x = torch.randn(3, 5, dtype=torch.float64)
    got = collect_fisher(
        wrapped, [{"x": x.repeat(4000, 1)}], predictions=lambda m, batch: (m(batch["x"]), None), seed=1
    )
    weight, expected = model.hidden.base_layer.weight.requires_grad_(), 0.0
    for row in x:
        log_p = F.log_softmax(model(row[None]), -1)[0]
        for value in log_p:
            gradient = torch.autograd.grad(value, weight, retain_graph=True)[0]
            expected = expected + value.exp().detach() * gradient.square() / 3
    torch.testing.assert_close(got.rows[next(iter(got.rows))], expected.sum(1), rtol=0.06, atol=0)
    torch.testing.assert_close(got.columns[next(iter(got.rows))], expected.sum(0), rtol=0.06, atol=0)


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (3, 7, 6, 4), (2, 700, 1100, 9)])
def test_marginals_of_both_units_follow_their_definitions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    examples, positions, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, positions, k, generator=generator, dtype=torch.float64).to(dtype)
    delta = torch.randn(examples, positions, n, generator=generator, dtype=torch.float64).to(dtype)
    whole = torch.einsum("etn,etk->enk", delta.double(), x.double()).square().sum(0)
    single = torch.einsum("etn,etk->nk", delta.double().square(), x.double().square())
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for unit, exact in (("sequence", whole), ("token", single)):
        rows, columns = marginals(x, delta, unit=unit)
        assert rows.dtype == columns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(rows.double(), exact.sum(1), rtol=rtol, atol=0)
        torch.testing.assert_close(columns.double(), exact.sum(0), rtol=rtol, atol=0)


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_batches_of_one_give_the_same_and_the_model_is_left_as_it_was(unit: str) -> None:
    model, made = tiny.lora(tiny.base()).train(), tiny.batches()
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    together, apart = (
        collect_fisher(model, b, labels="empirical", unit=unit) for b in (made, tiny.one_by_one(made))
    )
    for name in together.rows:
        torch.testing.assert_close(together.rows[name], apart.rows[name], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(together.columns[name], apart.columns[name], rtol=1e-9, atol=1e-14)
    assert model.training and not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_patched_4_bit_model_gives_what_the_unpatched_one_gives() -> None:
    models = pytest.importorskip("tests.patching.models")
    model = models.lora(models.llama(torch.float32))
    models.randomize(model)
    made = [{"input_ids": models.IDS}]
    plain = collect_fisher(model, made)
    peftkern.patch(model)
    patched = collect_fisher(model, made)
    assert plain.base == patched.base
    for name in plain.rows:
        torch.testing.assert_close(
            patched.rows[name], plain.rows[name], rtol=2e-3, atol=plain.rows[name].max().item() * 1e-4
        )


def test_saved_and_loaded_it_is_the_same_and_only_for_its_base(tmp_path) -> None:
    model = tiny.lora(tiny.base(torch.float32))
    fisher = collect_fisher(model, tiny.batches())
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = FisherFactors.load(tmp_path / "fisher.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["fisher.safetensors"]
    assert (loaded.predictions, loaded.base, loaded.labels) == (
        fisher.predictions,
        fisher.base,
        fisher.labels,
    )
    assert all(torch.equal(loaded.rows[name], fisher.rows[name]) for name in fisher.rows)
    loaded.require_base(lora_factors(model))
    loaded.require_base(lora_factors(tiny.lora(tiny.base(torch.float32), r=2, target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="measured on another base"):
        loaded.require_base(lora_factors(tiny.lora(tiny.base(torch.float32, seed=1))))
    few = collect_fisher(tiny.lora(tiny.base(torch.float32), target_modules=["q_proj"]), tiny.batches())
    with pytest.raises(ValueError, match="has no layer"):
        few.require_base(lora_factors(model))
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no sound safetensors"):
        FisherFactors.load(tmp_path / "other.safetensors")


def test_bad_input_is_named() -> None:
    model = tiny.lora(tiny.base())
    with pytest.raises(ValueError, match="no prediction to measure on"):
        collect_fisher(model, [])
    with pytest.raises(ValueError, match="expected one of"):
        collect_fisher(model, tiny.batches(), labels="sampled")
    with pytest.raises(ValueError, match="needs labels"):
        collect_fisher(
            model, tiny.batches(), labels="empirical", predictions=lambda m, b: (causal_lm(m, b)[0], None)
        )
    with pytest.raises(ValueError, match="no gradient reached any"):
        logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        collect_fisher(model, tiny.batches((1,)), predictions=lambda m, b: (logits, None))
    twice = nn.Module()
    twice.inner = nn.Linear(4, 4)
    twice.forward = lambda x: twice.inner(twice.inner(x))
    shared = tiny.peft.get_peft_model(twice, tiny.peft.LoraConfig(r=2, target_modules=["inner"]))
    with pytest.raises(ValueError, match="called twice"):
        collect_fisher(
            shared,
            [{"x": torch.ones(2, 4)}],
            predictions=lambda m, b: (shared.base_model.model.forward(b["x"]), None),
        )
