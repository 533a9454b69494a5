"""Decoder layers whose kernels run as one list of native calls a direction: the bits are those of the kernels
called one by one, wherever what autograd saved lies by then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.functional import decoder_calls, decoder_layer
from peftkern.patching.forwards import find

from . import models
from .whole import BF16, IDS, layer_of, patched, run, same

pytestmark = pytest.mark.usefixtures("bf16_level")


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each direction of a layer that ran as one list of calls."""
    found: list[str] = []
    for name in ("forward", "backward"):
        run = getattr(decoder_calls.LayerCalls, name)

        def recorded(self, *args: Any, run=run, name=name) -> Any:
            out = run(self, *args)
            if out is not None:
                found.append(name)
            return out

        monkeypatch.setattr(decoder_calls.LayerCalls, name, recorded)
    return found


@contextlib.contextmanager
def call_by_call() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_layer, "layer_calls", lambda *args: None)
        yield


def wide(**options: Any) -> nn.Module:
    """A model whose weights take tiles: rows of whole blocks."""
    return patched(models.llama(BF16, inner=128), **options)


@pytest.mark.parametrize("cached", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("grads", [False, True], ids=["", "inputs"])
def test_one_list_has_the_bits_of_its_calls(
    taken: list[bool], lists: list[str], cached: bool, masked: bool, grads: bool
) -> None:
    model, inputs = wide(), {"use_cache": cached}
    if masked:
        inputs["attention_mask"] = torch.ones_like(IDS)
        inputs["attention_mask"][0, :5] = 0
    if grads:
        model.enable_input_require_grads()
    got, again = run(model, **inputs), run(model, **inputs)
    assert all(taken) and lists == (["forward"] * 2 + ["backward"] * 2) * 2
    with call_by_call():
        expected = run(model, **inputs)
    assert len(lists) == 8 and got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) and torch.equal(again[name], value), name


def test_linears_without_adapters_are_in_the_list(taken: list[bool], lists: list[str]) -> None:
    same(wide(target_modules=["q_proj"]), taken)
    assert lists.count("backward") == 4


def test_what_a_list_leaves_to_its_calls(taken: list[bool], lists: list[str]) -> None:
    """Dropout forward; backward what is not all: adapters that are frozen, a cache's gradients."""
    run(wide(lora_dropout=0.3))
    assert all(taken) and lists == []
    model = wide()
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    same(model, taken)
    assert lists.count("forward") == 4 and lists.count("backward") == 2
    lists.clear()
    out = wide()(input_ids=IDS, use_cache=True)
    sum(layer.keys.double().square().sum() for layer in out.past_key_values.layers).backward()
    assert lists == ["forward"] * 2


def test_tensors_that_come_back_elsewhere_or_otherwise(lists: list[str]) -> None:
    """Hooks for saved tensors: copies at other places, and one that lies in another order."""
    model = wide()
    expected = run(model)
    for unpack in (torch.clone, lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone()):
        lists.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            got = run(model)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert lists.count("forward") == 2
    turned = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t  # noqa: E731
    lists.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        got = run(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert lists == ["forward"] * 2


def test_weights_that_move_before_backward(lists: list[str]) -> None:
    """A norm's lies elsewhere then; a 4-bit one's bytes are held by what forward read."""
    model = wide()
    expected = run(model)
    layer = layer_of(model)
    for weight, backward in ((layer.input_layernorm.weight, 1), (layer.mlp.up_proj.base_layer.weight, 2)):
        lists.clear()
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
        weight.data = weight.data.clone()
        loss.backward()
        assert lists == ["forward"] * 2 + ["backward"] * backward
        assert all(torch.equal(expected[name], value) for name, value in models.grads(model).items())


def test_other_shapes_and_threads(taken: list[bool], lists: list[str]) -> None:
    """Each has a list of its own, four at most."""
    model, before = wide(), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for length in (20, 17, 33, 40, 20):
                ids = torch.randint(1, 96, (2, length))
                run(model, input_ids=ids)
    finally:
        torch.set_num_threads(before)
    assert all(taken) and lists.count("backward") == 20
    layer = find(layer_of(model))[1].whole().ready.layer
    assert 0 < len(layer.calls) <= 4


def test_a_graph_that_is_kept_keeps_its_numbers(lists: list[str]) -> None:
    """While one step's graph lives, another's activations lie elsewhere."""
    model = wide()
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits.double().square().mean()

    one, other = IDS, IDS.flip(0, 1)
    first = loss(one)
    alone = torch.autograd.grad(first, trained, retain_graph=True)
    torch.autograd.grad(loss(other), trained)
    again = torch.autograd.grad(first, trained)
    assert all(map(torch.equal, alone, again)) and lists.count("backward") == 6
