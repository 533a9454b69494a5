"""The factored penalty against its definition on N x K matrices, in fp64: values, gradients, and what it
refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peftkern.transfer.forgetting import DeltaPenalty, collect_fisher, lora_factors, penalty, reference

from . import tiny


def defined(model: nn.Module, fishers: dict[str, Tensor] | None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in lora_factors(model).items():
        ones = torch.ones(layer.b.shape[0], layer.a.shape[1], dtype=torch.float64)
        total = total + reference.penalty(
            ones if fishers is None else fishers[name], layer.a, layer.b, layer.scaling
        )
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    got = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return got


LORAS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 1, "down_proj": 5}, "alpha_pattern": {"v_proj": 2}},
]


@pytest.mark.parametrize("options", LORAS, ids=["lora", "rslora", "patterns"])
@pytest.mark.parametrize("kind", ["ewc", "l2-sp"])
def test_value_and_gradient_are_those_of_the_definition(options: dict, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(penalty, "_CHUNK_BYTES", 2000)  # several layers a chunk and several chunks
    model = tiny.lora(tiny.base(), **options)
    fisher = collect_fisher(model, tiny.batches()) if kind == "ewc" else None
    outer = fisher and {
        n: torch.outer(fisher.rows[n], fisher.columns[n]) / fisher.rows[n].sum() for n in fisher.rows
    }
    expected = defined(model, outer)
    (3.0 * expected).backward()
    exact = gradients(model)
    assert len(exact) == 28
    ours = DeltaPenalty(model, fisher)
    (3.0 * ours.value()).backward()
    for got in (gradients(model), _added(model, ours)):
        for name, gradient in exact.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(ours.value(), expected, rtol=1e-11, atol=0)
    layers = ours.by_layer()
    assert list(layers) == list(lora_factors(model)) and sum(layers.values()) == pytest.approx(
        expected.item(), rel=1e-11
    )


def _added(model: nn.Module, ours: DeltaPenalty) -> dict[str, Tensor]:
    """The gradients that `add_gradients` adds to those that are there, less the latter."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    value = ours.add_gradients(3.0)
    torch.testing.assert_close(value, ours.value().detach(), rtol=1e-12, atol=0)
    return {name: gradient - 1 for name, gradient in gradients(model).items()}


def test_the_sums_of_a_dense_fisher_factor_it_and_a_rank_one_fisher_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    fisher = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    flat = reference.factored(fisher)
    torch.testing.assert_close(flat.sum(0), fisher.sum(0))
    torch.testing.assert_close(flat.sum(1), fisher.sum(1))
    torch.testing.assert_close(reference.factored(flat), flat)


def test_penalizing_the_factors_would_leave_a_free_at_the_start() -> None:
    """At B = 0 the loss does not depend on A, so that A's own Fisher is 0; the sums around dW = 0 are not."""
    model = tiny.lora(tiny.base(), moved=False)
    model(**tiny.batches((1,))[0]).loss.backward()
    assert all(layer.a.grad.abs().max() == 0 for layer in lora_factors(model).values())
    model.zero_grad()
    fisher = collect_fisher(model, tiny.batches())
    assert all(
        vector.min() >= 0 and vector.sum() > 0 for vector in (*fisher.rows.values(), *fisher.columns.values())
    )


def test_frozen_factors_get_no_gradient_and_bf16_ones_get_one_of_their_dtype() -> None:
    model = tiny.lora(tiny.base(torch.bfloat16))
    ours = DeltaPenalty(model)
    for layer in lora_factors(model).values():
        layer.a.requires_grad_(False)
    ours.value().backward()
    through_autograd = gradients(model)
    ours.add_gradients(1.0)
    directly = gradients(model)
    assert through_autograd.keys() == directly.keys() and all("lora_B" in name for name in directly)
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, through_autograd[name])
        for name, value in directly.items()
    )


def test_second_derivatives_are_those_of_the_definition() -> None:
    model = tiny.lora(tiny.base())
    fisher = collect_fisher(model, tiny.batches())
    outer = {
        name: torch.outer(fisher.rows[name], fisher.columns[name]) / fisher.rows[name].sum()
        for name in fisher.rows
    }
    seconds = []
    for value in (DeltaPenalty(model, fisher).value(), defined(model, outer)):
        layer = next(iter(lora_factors(model).values()))
        firsts = torch.autograd.grad(value, (layer.a, layer.b), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), (layer.a, layer.b)))
    for got, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-14)


def test_a_layer_that_no_source_reaches_is_free() -> None:
    model = tiny.lora(tiny.base())
    fisher = collect_fisher(model, tiny.batches())
    name = next(iter(fisher.rows))
    fisher.rows[name].zero_()
    fisher.columns[name].zero_()
    assert DeltaPenalty(model, fisher).by_layer()[name] == 0


REFUSED = [
    ({"use_dora": True}, "DoRA scales"),
    ({"lora_bias": True}, "has a bias"),
    ({"target_modules": ["embed_tokens"]}, "of the kind Embedding"),
    ({"init_lora_weights": "pissa"}, "takes the adapter's start out"),
    ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "is trained and no factor"),
    ({"bias": "lora_only", "target_modules": ["q_proj"]}, None),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_no_product_of_two_factors_is_refused_with_its_name(options: dict, words: str | None) -> None:
    model = tiny.lora(tiny.base(torch.float32), **options)
    if words is None:
        DeltaPenalty(model)  # the layers have no bias: nothing else is trained
        return
    with pytest.raises(ValueError, match=words):
        DeltaPenalty(model)
    if "modules_to_save" in options:
        assert DeltaPenalty(model, allow_others=True).value() > 0


def test_merged_and_several_active_adapters_are_refused_and_one_can_be_named() -> None:
    model = tiny.lora(tiny.base(torch.float32))
    model.add_adapter("second", tiny.peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert set(lora_factors(model)) > set(lora_factors(model, adapter="second"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="several adapters are active"):
        lora_factors(model)
    assert DeltaPenalty(model, adapter="second", allow_others=True).value() > 0
    model.base_model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        lora_factors(model)
    with pytest.raises(ValueError, match="no layer has"):
        lora_factors(tiny.base())
