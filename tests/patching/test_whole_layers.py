"""Decoder layers that run as one function in training: the bits are those of the layer run part by part, and
every call that this does not cover, or a change of what it was made of, is seen."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern.ops import attention as attention_op
from peftkern.patching.forwards import find
from peftkern.patching.layers import LayerForward
from peftkern.runtime import backends

from . import models, zoo
from .versions import exact
from .whole import BF16, IDS, TILED, by_parts, layer_of, patched, run, same

pytestmark = pytest.mark.usefixtures("bf16_level")


def runs_by_parts(model: nn.Module, taken: list[bool], **inputs: Any) -> None:
    """No layer ran whole, or not all, and the results are those of the parts."""
    taken.clear()
    got = run(model, **inputs)
    assert taken and not all(taken)
    with by_parts():
        expected = run(model, **inputs)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"r": 40, "use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["o_proj", "down_proj"]},
        {"target_modules": ["up_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cache"])
def test_the_bits_of_the_parts(taken: list[bool], options: dict[str, Any], cached: bool) -> None:
    same(patched(**options), taken, use_cache=cached)


def test_biases_and_adapters_in_bf16(taken: list[bool]) -> None:
    model = models.llama(BF16, bias=True)
    model = models.lora(model).to(BF16).train()
    peftkern.patch(model)
    same(model, taken)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@exact
def test_which_models(taken: list[bool], name: str) -> None:
    model = zoo.build(name, four_bit=True, dtype=BF16)
    peftkern.patch(model)
    run(model)
    assert len(taken) == 2 and all(taken)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3"])
def test_other_forms_run_by_parts(taken: list[bool], name: str) -> None:
    """Norms of heads, four norms a layer, packed projections."""
    model = zoo.build(name, four_bit=True, dtype=BF16)
    peftkern.patch(model)
    run(model)
    assert not any(taken)


def test_a_mask_errs_no_more(taken: list[bool]) -> None:
    """Where keys are hidden transformers repeats the heads of keys, whose gradients torch then sums in bf16;
    whole, they are summed in fp32."""
    model, mask = patched(), torch.ones_like(IDS)
    mask[0, :5] = 0
    got = run(model, attention_mask=mask)
    assert len(taken) == 2 and all(taken)
    with by_parts():
        parts = run(model, attention_mask=mask)
    assert torch.equal(got["logits"], parts["logits"])
    wide = models.in_fp64(model)
    true = run(wide, attention_mask=mask)
    ours, theirs = models.errors(got, true), models.errors(parts, true)
    assert sum(ours.values()) <= 1.02 * sum(theirs.values())


def test_a_cache_is_filled_and_keeps_its_graph(taken: list[bool]) -> None:
    """Keys and values lie in it as ever, and lead back to the adapters."""
    model, found = patched(), []
    for way in (contextlib.nullcontext, by_parts):
        model.zero_grad(set_to_none=True)
        with way():
            out = model(input_ids=IDS, use_cache=True)
        layers = out.past_key_values.layers
        kept = [t for layer in layers for t in (layer.keys, layer.values)]
        sum(t.double().square().sum() for t in kept).backward()
        found.append([*map(Tensor.detach, kept), *models.grads(model).values()])
    assert taken == [True, True] and len(found[0]) > 8
    assert all(map(torch.equal, *found))
    taken.clear()
    with torch.no_grad():
        prompt = model(input_ids=IDS, use_cache=True).past_key_values
    model(input_ids=IDS, past_key_values=prompt, use_cache=True)  # onto what is there
    assert taken == [False] * 4


def test_a_cache_holds_what_backward_keeps(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, and what a cache's layer does with more of its own is left to it."""
    model, mark = patched(), object()
    layer_of_cache = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    assert not layer_of_cache.keys.is_contiguous()  # rows of tokens, as the projection gives them
    kind = type(layer_of_cache)
    stock = kind.lazy_initialization

    def more(self: Any, *args: Any) -> None:
        stock(self, *args)
        self.more = mark

    monkeypatch.setattr(kind, "lazy_initialization", more)
    again = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    assert all(taken) and again.keys.is_contiguous() and again.more is mark
    assert torch.equal(again.keys, layer_of_cache.keys) and torch.equal(again.values, layer_of_cache.values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(taken: list[bool], reentrant: bool) -> None:
    model = patched(lora_dropout=0.2)
    model.enable_input_require_grads()
    whole = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run(model)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    # Of a reentrant checkpoint the first pass has no gradients; of the other, the second one ends where it
    # has all that was saved, inside the layer.
    assert taken == [True] * 2 + [not reentrant] * 2 + [True] * (2 if reentrant else 0)


def test_inputs_that_require_grad(taken: list[bool]) -> None:
    model = patched()
    found = []
    for way in (contextlib.nullcontext, by_parts):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with way():
            model(inputs_embeds=x, use_cache=False).logits.double().square().mean().backward()
        found.append(x.grad)
    assert taken == [True, True] and torch.equal(*found)


def test_twice_backward_and_second_derivatives(taken: list[bool]) -> None:
    model = patched()
    trained = [p for p in model.parameters() if p.requires_grad]

    def second(**options: Any) -> list[Tensor]:
        loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
        first = torch.autograd.grad(loss, trained, create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), trained)

    got = second()
    assert taken == [True, True]
    with by_parts():
        expected = second()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.02 * theirs.abs().max().item())
    loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
    once, again = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_a_counter_around_backward_counts_it(taken: list[bool]) -> None:
    model, counts = patched(), []
    for way in (contextlib.nullcontext, by_parts):
        with way():
            loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
            with FlopCounterMode(display=False) as counter:
                loss.backward()
        counts.append(counter.get_total_flops())
    assert taken == [True, True] and counts[0] > 0.5 * counts[1] > 0


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a hook on the layer": lambda m: layer_of(m).register_forward_hook(lambda *_: None),
    "a hook on attention": lambda m: layer_of(m).self_attn.register_forward_pre_hook(lambda *_: None),
    "a hook on a norm": lambda m: layer_of(m).input_layernorm.register_forward_hook(lambda *_: None),
    "a hook on the MLP": lambda m: layer_of(m).mlp.register_full_backward_hook(lambda *_: None),
    "a hook on the activation": lambda m: layer_of(m).mlp.act_fn.register_forward_hook(lambda *_: None),
    "a hook on a projection": lambda m: layer_of(m).self_attn.k_proj.register_forward_hook(lambda *_: None),
    "a hook on a base": lambda m: layer_of(m).mlp.up_proj.base_layer.register_forward_hook(lambda *_: None),
    "a hook on an adapter": lambda m: (
        layer_of(m).self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    ),
    "a trained norm": lambda m: layer_of(m).input_layernorm.weight.requires_grad_(),
    "dropped attention": lambda m: setattr(layer_of(m).self_attn, "attention_dropout", 0.1),
    "another function": lambda m: m.set_attn_implementation("eager"),
    "an adapter switched off": lambda m: m.disable_adapter_layers(),
    "a forward of its own": lambda m: setattr(
        layer_of(m).mlp, "forward", types.MethodType(type(layer_of(m).mlp).forward, layer_of(m).mlp)
    ),
    "an unpatched layer": lambda m: peftkern.unpatch(layer_of(m).self_attn),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_leaves_to_the_parts(taken: list[bool], change: str) -> None:
    """Before the first call, and behind calls that ran whole."""
    model = patched()
    same(model, taken)
    CHANGES[change](model)
    if change == "an adapter switched off":
        with by_parts():
            expected = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        return
    torch.manual_seed(0)
    runs_by_parts(model, taken)
    fresh = patched()
    CHANGES[change](fresh)
    runs_by_parts(fresh, taken)


def _scaled(model: nn.Module) -> None:
    layer_of(model).self_attn.v_proj.scaling["default"] *= 3


def _other_weight(model: nn.Module) -> None:
    for module in (layer_of(model).mlp.gate_proj, layer_of(model).self_attn.q_proj):
        adapter = module.lora_B["default"]
        adapter.weight = nn.Parameter(adapter.weight.detach() * 2)


def _data(model: nn.Module) -> None:
    adapter = layer_of(model).self_attn.o_proj.lora_A["default"]
    adapter.weight.data = adapter.weight.data * 2


def _requantized(model: nn.Module) -> None:
    base = layer_of(model).mlp.down_proj.base_layer
    model.base_model.model.get_submodule("model.layers.0.mlp.down_proj").base_layer = models.linear_4bit(
        nn.Linear(base.in_features, base.out_features, bias=False).to(BF16), BF16
    )


def _second(model: nn.Module) -> None:
    model.add_adapter("second", models.config(r=3))
    models.randomize(model)
    model.set_adapter("second")


STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "another eps": lambda m: setattr(layer_of(m).input_layernorm, "variance_epsilon", 0.5),
    "another norm": lambda m: layer_of(m).post_attention_layernorm.weight.data.mul_(2.0),
    "a norm elsewhere": lambda m: setattr(
        layer_of(m).input_layernorm,
        "weight",
        nn.Parameter(layer_of(m).input_layernorm.weight * 3, requires_grad=False),
    ),
    "another scale of scores": lambda m: setattr(layer_of(m).self_attn, "scaling", 0.01),
    "not causal": lambda m: setattr(layer_of(m).self_attn, "is_causal", False),
    "another scaling": _scaled,
    "other weights": _other_weight,
    "data elsewhere": _data,
    "another base": _requantized,
    "another adapter": _second,
    "dropout": lambda m: setattr(layer_of(m).mlp.up_proj.lora_dropout, "default", nn.Dropout(0.4)),
    "patched again": peftkern.patch,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_change_is_seen_by_the_next_call(taken: list[bool], step: str) -> None:
    model = patched()
    before = run(model)
    STEPS[step](model)
    if step == "another base":
        peftkern.patch(model)
    same(model, taken)
    changed = run(model)["logits"]
    assert torch.equal(changed, before["logits"]) == (step == "patched again")


def test_other_calls(taken: list[bool]) -> None:
    """Without gradients, under autocast, few tokens, under a profiler, a mask of numbers, other dtypes."""
    model = patched()
    with torch.no_grad():
        model(input_ids=IDS)
    with torch.autocast("cpu", dtype=BF16):
        model(input_ids=IDS)
    model(input_ids=IDS[:, : attention_op.config.FEWEST_QUERIES - 1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        model(input_ids=IDS)
    model(input_ids=IDS, attention_mask=torch.zeros(2, 1, 20, 20, dtype=BF16))
    with torch.device("cpu"):  # a mode for every function
        model(input_ids=IDS)
    with pytest.MonkeyPatch.context() as patch:
        function = "torch.nn.functional.scaled_dot_product_attention"
        stock = nn.functional.scaled_dot_product_attention
        patch.setattr(function, lambda *args, **kwargs: stock(*args, **kwargs))
        model(input_ids=IDS)
    backends.native().set_isa("baseline")
    model(input_ids=IDS)
    backends.native().set_isa(TILED[0])
    assert not any(taken)
    single = patched(models.llama(torch.float32))
    run(single)
    assert not any(taken)
    run(model)
    assert taken[-2:] == [True, True]


@pytest.mark.parametrize("how", models.COPIES)
def test_copies_have_their_own(taken: list[bool], how: str) -> None:
    model = patched()
    run(model)
    other = models.copied(model, how)
    _other_weight(other)
    same(other, taken)
    same(model, taken)


def test_what_was_prepared_is_let_go(taken: list[bool]) -> None:
    model = patched()
    run(model)
    forward = find(layer_of(model))[1]
    assert type(forward) is LayerForward and forward.whole().ready is not None
    forward.let_go()
    assert forward.whole().ready is None
    same(model, taken)


def test_a_copy_of_a_model_in_place(taken: list[bool]) -> None:
    """What is held is the layer's own: of two copies each has its weights."""
    one, two = patched(), copy.deepcopy(patched())
    _scaled(two)
    first, second = run(one)["logits"], run(two)["logits"]
    assert all(taken) and not torch.equal(first, second)
    assert torch.equal(run(one)["logits"], first)
