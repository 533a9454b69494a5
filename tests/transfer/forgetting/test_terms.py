"""The expansion's terms against autograd: they are those of the loss along dW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftkern.transfer.forgetting import (
    DeltaPenalty,
    collect_fisher,
    expansion_terms,
    lora_factors,
    reference,
)
from peftkern.transfer.forgetting.predictions import causal_lm, labels_of, step_generator, summed_loss

from . import tiny


def test_terms_are_the_derivatives_of_the_loss_and_the_fisher_of_its_labels() -> None:
    model, made = tiny.lora(tiny.base()).eval(), tiny.one_by_one(tiny.batches())
    terms = expansion_terms(model, made, seed=4)
    twin = copy.deepcopy(model)
    factors = lora_factors(twin)
    weights = [layer.module.base_layer.weight.requires_grad_() for layer in factors.values()]
    moves = [(layer.scaling * layer.b @ layer.a).detach() for layer in factors.values()]
    linear = fisher = blocks = diagonal = count = 0.0
    for number, batch in enumerate(made):
        with twin.disable_adapter():
            logits, known = causal_lm(twin, batch)
        drawn = labels_of(logits, known, "true", step_generator(logits.device, 4, number))
        gradients = torch.autograd.grad(summed_loss(logits, drawn), weights, retain_graph=True)
        along = torch.stack([(g * move).sum() for g, move in zip(gradients, moves, strict=True)])
        fisher, blocks = fisher + along.sum() ** 2, blocks + along.square().sum()
        diagonal += sum((g * move).square().sum() for g, move in zip(gradients, moves, strict=True))
        gradients = torch.autograd.grad(summed_loss(logits, known), weights)
        linear += sum((g * move).sum() for g, move in zip(gradients, moves, strict=True))
        count += len(known)
    expected = [linear / count, fisher / (2 * count), blocks / (2 * count), diagonal / (2 * count)]
    got = [terms.linear, terms.fisher, terms.blocks, terms.diagonal]
    assert got == pytest.approx([float(value) for value in expected], rel=1e-8)
    assert "second order" in terms.verdict()


def test_small_steps_of_the_loss_follow_the_linear_term() -> None:
    """Central differences: the model's norms are computed in fp32, so that the steps cannot be tiny."""
    model, made = tiny.lora(tiny.base()).eval(), tiny.one_by_one(tiny.batches())
    layers = list(lora_factors(model).values())

    @torch.no_grad()
    def loss(scale: float) -> float:
        for layer in layers:
            layer.b.mul_(scale)
        total = sum(summed_loss(*causal_lm(model, batch)).item() for batch in made)
        for layer in layers:
            layer.b.div_(scale)
        return total

    slope = (loss(0.01) - loss(-0.01)) / 0.02 / 34
    assert slope == pytest.approx(expansion_terms(model, made).linear, rel=0.02)


def test_where_single_weights_move_apart_the_diagonal_is_all_there_is() -> None:
    """One layer with one output and one input: no products to leave out, and the factored form is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 3)).double()
    wrapped = tiny.peft.get_peft_model(
        model,
        tiny.peft.LoraConfig(r=1, target_modules=["0"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    made = [{"x": torch.randn(4, 1, dtype=torch.float64)}]

    def predictions(module: nn.Module, batch: dict) -> tuple:
        return module(batch["x"]), torch.tensor([0, 1, 2, 1])

    terms = expansion_terms(wrapped, made, predictions=predictions)
    fisher = collect_fisher(wrapped, made, predictions=predictions)
    value = DeltaPenalty(wrapped, fisher).value().item()
    assert (
        terms.fisher == pytest.approx(terms.diagonal) == pytest.approx(terms.blocks) == pytest.approx(value)
    )


def test_factored_reference_keeps_the_penalty_of_a_flat_update() -> None:
    fisher = torch.rand(5, 4, dtype=torch.float64)
    ones = torch.ones(5, 1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    dense = reference.penalty(fisher, ones[1], ones[0], 0.5)
    torch.testing.assert_close(reference.penalty(reference.factored(fisher), ones[1], ones[0], 0.5), dense)
