"""Tiles on every kind of MLP and adapter, and under what torch does around a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.memory import tile_mlps, untile_mlps
from peftkern.memory.tiled_mlp import TiledMLP

from ..patching import models, zoo

# Architecture, MLPs, whose widths are
KINDS = [
    ("llama", 2, (64, 80)),
    ("gemma3", 2, (64, 80)),
    ("phi3", 2, (64, 80)),
    ("gpt-neox", 2, (64, 80)),
    ("falcon", 2, (64, 256)),
    ("vit", 2, (64, 80)),
    ("t5", 4, (64, 80)),
]

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "a whole linear": {
        "modules_to_save": ["down_proj"],
        "target_modules": ["q_proj", "gate_proj", "up_proj"],
    },
    "the whole MLP": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
}


def tiled(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), TiledMLP)]


def assert_alike(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize(("name", "count", "widths"), KINDS)
def test_mlps_are_found_by_what_they_do(name: str, count: int, widths: tuple[int, int]) -> None:
    report = tile_mlps(zoo.build(name), tile=64)
    assert [(row.hidden, row.intermediate) for row in report.tiled] == [widths] * count and not report.refused


@pytest.mark.parametrize("patched", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_trained_parameter_has_its_gradient(kind: str, patched: bool) -> None:
    model = models.lora(models.llama(four_bit=False), **ADAPTERS[kind])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    if patched:
        peftkern.patch(model)
    expected = models.run(model, zoo.TEXT)
    tile_mlps(model, tile=7)
    assert len(tiled(model)) >= 2
    assert_alike(models.run(model, zoo.TEXT), expected)


@pytest.mark.parametrize("way", ["reentrant", "transformers"])
def test_other_ways_of_checkpointing(way: str) -> None:
    model = models.lora(models.llama())
    tile_mlps(model, tile=7)
    expected = models.run(model, zoo.TEXT)
    model.enable_input_require_grads()
    if way == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        for layer in model.get_base_model().model.layers:
            inner = layer.forward
            layer.forward = lambda x, inner=inner, **k: checkpoint(
                lambda y, inner=inner, k=k: inner(y, **k), x, use_reentrant=True
            )
    got = models.run(model, zoo.TEXT)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_a_graph_may_be_gone_through_twice() -> None:
    model = models.lora(models.llama(), lora_dropout=0.3)
    peftkern.patch(model)
    tile_mlps(model, tile=7)
    loss = model(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = models.grads(model)
    loss.backward()
    assert all(torch.equal(grad, 2 * once[name]) for name, grad in models.grads(model).items())


def test_two_forwards_may_wait_for_their_backwards() -> None:
    model = models.lora(models.llama())
    tile_mlps(model, tile=7)
    batches, sums = (zoo.TEXT, zoo.TEXT.flip(0, 1)), {}
    for ids in batches:
        for name, grad in models.run(model, ids).items():
            sums[name] = sums.get(name, 0) + grad
    model.zero_grad(set_to_none=True)
    losses = [model(input_ids=ids, use_cache=False).logits for ids in batches]
    for logits, ids in reversed(list(zip(losses, batches, strict=True))):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).backward()
    assert_alike(models.grads(model), {k: v for k, v in sums.items() if k not in ("logits", "loss")})


@pytest.mark.slow
def test_compiled_models_run_mlps_whole() -> None:
    model = models.lora(models.llama())
    peftkern.patch(model)
    expected = models.run(model, zoo.TEXT)
    tile_mlps(model, tile=7)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = compiled(input_ids=zoo.TEXT, use_cache=False).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_an_input_that_is_no_sequence_runs_as_it_is() -> None:
    model = models.llama(four_bit=False)
    mlp = model.model.layers[0].mlp
    tile_mlps(model, tile=3)
    for shape in ((10, 64), (64,), (0, 64), (2, 0, 64), (2, 3, 5, 64)):
        x = torch.randn(shape, requires_grad=True)
        y = mlp(x)
        y.sum().backward()
        torch.testing.assert_close(y, mlp.forward.whole(x))
    y = mlp(torch.randn(2, 5, 128)[..., ::2].requires_grad_())
    assert y.shape == (2, 5, 64)


def test_nothing_is_left_on_the_module_after_an_error() -> None:
    model = models.lora(models.llama(four_bit=False))
    tile_mlps(model, tile=7)
    mlp = tiled(model)[0]
    held = dict(mlp.named_parameters())
    y = mlp(torch.randn(1, 24, 64, requires_grad=True))
    mlp.forward.blocks.call = lambda x: (_ for _ in ()).throw(MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        y.sum().backward()
    assert all(parameter is held[name] for name, parameter in mlp.named_parameters())
    assert untile_mlps(model) == 2


def test_fp64_models_keep_their_digits() -> None:
    model = models.llama(four_bit=False).double().requires_grad_(True)
    twin = copy.deepcopy(model)
    tile_mlps(model, tile=5)
    for each in (model, twin):
        each(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss.backward()
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-13, msg=name)
