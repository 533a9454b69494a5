"""Norm outputs computed again in backward: bit for bit what was there, and fewer bytes saved."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import functional
from peftkern.memory.attention_groups import attention_by_groups
from peftkern.memory.count import MemoryCount, SavedCount
from peftkern.memory.norms import keep_norms, rebuild_norms
from peftkern.memory.tiled_mlp import tile_mlps

from ..patching import models, zoo

TOKENS = zoo.TEXT.numel()


def train(model: nn.Module) -> dict[str, Tensor]:
    return models.run(model, zoo.TEXT)


def saved(model: nn.Module) -> int:
    with SavedCount(model) as count:
        model(input_ids=zoo.TEXT, use_cache=False)
    return count.bytes


def patched(name: str = "llama", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = zoo.build(name, dtype=dtype, **options)
    peftkern.patch(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "four_bit"),
    [
        ("llama", True),
        ("phi3", True),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
    ],
)
def test_bits_are_the_same_and_two_widths_a_token_are_not_saved(
    name: str, four_bit: bool, dtype: torch.dtype
) -> None:
    model = patched(name, dtype, four_bit=four_bit)
    expected, before = train(model), saved(model)
    report = rebuild_norms(model)
    assert len(report.layers) == 2 and not report.refused
    got = train(model)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    # Two norms a layer. The first one's input, which is frozen, was not kept; now it is, for its output.
    assert before - saved(model) == (2 * 2 - 1) * TOKENS * 64 * dtype.itemsize
    assert keep_norms(model) == 2 and saved(model) == before


def test_what_lives_until_backward_is_less_by_as_much() -> None:
    """By a count of storages, without hooks around."""
    model, live = patched(), []
    for rebuilt in (False, True):
        if rebuilt:
            rebuild_norms(model)
        with MemoryCount() as count:
            logits = model(input_ids=zoo.TEXT, use_cache=False).logits
            live.append(count.current)
            del logits
    assert live[0] - live[1] == (2 * 2 - 1) * TOKENS * 64 * 4


@pytest.mark.parametrize("cast", ["llama", "gemma"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_a_sum_is_the_sums_norm(
    dtype: torch.dtype, weight_dtype: torch.dtype, cast: str, isa: str
) -> None:
    """What makes the two passes' bits equal: one computes norm(x + residual) in one launch, the other
    norm(s)."""
    x, residual = (torch.randn(33, 200).to(dtype) for _ in range(2))
    weight = torch.randn(200).to(weight_dtype)
    y, s = functional.add_rms_norm(x, residual, weight, eps=1e-5, cast=cast)
    assert torch.equal(functional.rms_norm(s, weight, eps=1e-5, cast=cast), y)


def test_stock_linears_inside_share_what_is_computed_again() -> None:
    """Each of q, k and v has saved the norm's output by itself."""
    model = zoo.build("llama", four_bit=True)
    peftkern.patch(model, exclude=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    expected = train(model)
    rebuild_norms(model)
    got, calls, stock = None, [], functional.rms_norm
    try:
        functional.rms_norm = lambda *a, **k: (calls.append(torch.is_grad_enabled()), stock(*a, **k))[1]
        got = train(model)
    finally:
        functional.rms_norm = stock
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert calls.count(False) == 2 * 2, "once a norm, not once a linear"


@pytest.mark.parametrize("with_tiles", [False, True])
def test_checkpointed_layers_do_it_too(with_tiles: bool) -> None:
    model = patched(four_bit=True)
    if with_tiles:
        tile_mlps(model, tile=7)
        attention_by_groups(model)
    expected = train(model)
    rebuild_norms(model)
    plain = train(model)
    model.enable_input_require_grads()
    for layer in model.get_base_model().model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    got = train(model)
    for key, value in expected.items():
        assert torch.equal(plain[key], value) and torch.equal(got[key], value), key


def test_hooks_around_a_layer_get_the_stream_in_its_place() -> None:
    model, shapes = patched(), []
    rebuild_norms(model)

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor.detach().clone()  # as moving it elsewhere would

    expected = train(model)
    model.zero_grad(set_to_none=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss
    assert len(shapes) > 20
    loss.backward()
    again = models.grads(model)
    assert again.keys() == expected.keys() - {"logits", "loss"}
    without = patched()
    without(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss.backward()
    assert all(torch.equal(again[key], value) for key, value in models.grads(without).items())


def test_writing_to_the_stream_or_the_weight_is_noticed() -> None:
    for written in ("norm", "lora"):
        model = patched()
        rebuild_norms(model)
        loss = model(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss
        layer = model.get_base_model().model.layers[1]
        with torch.no_grad():
            if written == "norm":
                layer.input_layernorm.weight.mul_(2)
            else:
                layer.mlp.down_proj.lora_A.default.weight.mul_(2)
        with pytest.raises(RuntimeError, match="written to since|modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("how", models.COPIES)
def test_a_copy_does_it_too(how: str) -> None:
    model = patched()
    rebuild_norms(model)
    twin = models.copied(model, how)
    assert saved(twin) == saved(model) and keep_norms(twin) == 2 == keep_norms(model)


def test_the_choice_stays_through_patch() -> None:
    model = patched()
    rebuild_norms(model)
    fewer = saved(model)
    peftkern.patch(model)
    assert saved(model) == fewer
    peftkern.unpatch(model)
    train(model)


def test_nothing_of_the_graph_outlives_backward() -> None:
    model = patched()
    rebuild_norms(model)
    gc.collect()
    gc.disable()
    try:
        with MemoryCount() as count:
            train_loss = model(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss
            train_loss.backward()
            del train_loss
            grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            assert count.current <= grads + 4096
    finally:
        gc.enable()


def test_what_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match="call peftkern.patch first|2 x its norms do not run rms_norm"):
        rebuild_norms(zoo.build("llama"))
    model = patched("gemma2")
    with pytest.raises(ValueError, match=r"2 x Gemma2DecoderLayer.forward is not h \+ attention"):
        rebuild_norms(model)
