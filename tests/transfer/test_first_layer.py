"""Below the first trained layer no backward runs and nothing is saved for it: counted, and timed."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.transfer.first_layer import BackwardStop, freeze_below
from peftkern.transfer.rates import Rates

from .models import bert, llama, lora, tokens, transformers

CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def layers_of(model: nn.Module) -> list[nn.Module]:
    return next(list(module) for module in model.modules() if isinstance(module, nn.ModuleList))


def trained(kind: dict | None, *, cut: int = 0, embeddings: bool = True, layers: int = 4) -> nn.Module:
    """A LoRA Llama as trainers prepare it: with checkpointing, and then an embedding that requires a
    gradient."""
    model = lora(llama(layers=layers)).train()
    if kind is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    if embeddings:
        model.enable_input_require_grads()
    if cut:
        freeze_below(model, cut)
    return model


def count_saved(model: nn.Module) -> tuple[int, int]:
    """How many tensors that one step saves for backward are saved within each half of the layers; their
    forwards are counted as well."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    return len(saved), sum(saved)


def forwards(model: nn.Module) -> list[int]:
    """How often each layer's attention is run in one step: twice where it is checkpointed."""
    layers = layers_of(model)
    counts = [0] * len(layers)

    def counting(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(counting(index)) for index, layer in enumerate(layers)
    ]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_gradients_are_those_without_the_cut(kind: dict | None) -> None:
    whole, cut = trained(kind), trained(kind, cut=2)
    losses = [model(input_ids=tokens(), labels=tokens()).loss for model in (whole, cut)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(cut.named_parameters(), whole.parameters(), strict=True):
        if ".layers.0." in name or ".layers.1." in name:
            assert ours.grad is None and not ours.requires_grad
        elif ours.requires_grad:
            assert ours.grad is not None and torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_nothing_runs_backward_or_twice_below_the_cut(kind: dict | None) -> None:
    model = trained(kind, cut=3)
    ran = []
    for index, layer in enumerate(layers_of(model)):
        linear = layer.mlp.down_proj.base_layer
        linear.register_forward_hook(
            lambda _m, _a, out, i=index: ran.append(("graph", i)) if out.grad_fn else None
        )
    again = 1 if kind is None else 2
    assert forwards(model) == [1, 1, 1, again]
    assert {index for _, index in ran} == {3}


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_what_is_saved_does_not_depend_on_the_layers_below_the_cut(kind: dict | None) -> None:
    """Two trained layers save as many tensors and numbers under ten frozen ones as under two."""
    few, many = (count_saved(trained(kind, cut=layers - 2, layers=layers)) for layers in (4, 12))
    assert few == many
    assert count_saved(trained(kind, layers=12)) > many


def test_a_step_is_faster_with_a_cut() -> None:
    """7 of 8 layers have no backward: at best (8 + 2) / 24 of the time. In turn: others use the machine."""
    models = {cut: lora(llama(layers=8, hidden=128)).train() for cut in (7, 0)}
    for cut, model in models.items():
        model.enable_input_require_grads()
        if cut:
            freeze_below(model, cut)
    seconds: dict[int, list[float]] = {cut: [] for cut in models}
    for _ in range(12):
        for cut, model in models.items():
            start = time.perf_counter()
            model(input_ids=tokens(4, 48), labels=tokens(4, 48)).loss.backward()
            seconds[cut].append(time.perf_counter() - start)
    assert min(seconds[7]) < 0.75 * min(seconds[0])


def test_it_holds_when_a_trainer_switches_checkpointing_on_afterwards() -> None:
    model = lora(llama(layers=4)).train()
    freeze_below(model, 3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    assert forwards(model) == [1, 1, 1, 2]


def test_plain_checkpointing_of_either_kind() -> None:
    """Layers that the caller checkpoints: reentrant checkpointing needs an input that requires a gradient,
    and gets it on request."""
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
        freeze_below(model, 2, reentrant=reentrant)
        x = torch.randn(3, 8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            for layer in model:
                x = (
                    checkpoint(layer, x, use_reentrant=False)
                    if not reentrant or layer in list(model)[:2]
                    else x
                )
                x = checkpoint(layer, x, use_reentrant=True) if reentrant and layer in list(model)[2:] else x
        x.sum().backward()
        assert [layer[0].weight.grad is not None for layer in model] == [False, False, True, True]


def test_a_patched_model() -> None:
    whole, cut = trained({"use_reentrant": False}), trained({"use_reentrant": False}, cut=2)
    for model in (whole, cut):
        peftkern.patch(model)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    name = "base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(whole.get_parameter(name).grad, cut.get_parameter(name).grad)
    assert forwards(cut) == [1, 1, 2, 2]


def test_an_encoder_and_an_encoder_decoder() -> None:
    model = bert()
    freeze_below(model, 2)
    model(input_ids=tokens(), labels=torch.tensor([0, 2])).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[3] for name in with_gradient if ".layer." in name} == {
        "2"
    } and "classifier.weight" in with_gradient
    config = transformers.T5Config(
        vocab_size=96, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    freeze_below(model, 3)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient and all(
        name.startswith(("decoder.block.1.", "decoder.final", "lm_head")) for name in with_gradient
    )


def test_it_moves_and_is_taken_back() -> None:
    model = trained({"use_reentrant": False})
    before = forwards(model)
    stop = BackwardStop(model, 3)
    assert forwards(model) == [1, 1, 1, 2]
    stop.move(1)
    assert forwards(model) == [1, 2, 2, 2]
    stop.remove()
    assert forwards(model) == before == [2, 2, 2, 2]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    freeze_below(model, 2).remove()
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_copy_and_a_pickle_have_the_cut_of_their_own() -> None:
    model = lora(llama(layers=3)).train()
    freeze_below(model, 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert forwards(twin) == [1, 1, 2]
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in layers_of(model))


@pytest.mark.slow
def test_it_compiles() -> None:
    model = trained(None, cut=2, embeddings=False)
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(input_ids=tokens(), labels=tokens()).loss
    assert torch.allclose(compiled(input_ids=tokens(), labels=tokens()).loss, expected)


def test_a_layer_that_is_none_and_nothing_above_the_cut() -> None:
    with pytest.raises(ValueError, match="first_layer: got 5, expected one of the model's 4 layers"):
        freeze_below(lora(llama(layers=4)), 5)
    with pytest.raises(ValueError, match="nothing from there up is trainable"):
        freeze_below(lora(llama(layers=4)), 4)
    head = bert()
    freeze_below(head, 3)
    assert [name for name, parameter in head.named_parameters() if parameter.requires_grad] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]


def test_rates_spread_over_what_is_left() -> None:
    model = lora(llama(layers=4))
    freeze_below(model, 2)
    assert [group["lr"] for group in Rates(layer_ratio=10).groups(model, lr=1.0)] == pytest.approx([1.0, 0.1])
