"""Frozen layers and the embedding on the host: the same numbers, in the order that two slots allow."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import NF4Weight
from peftkern.functional import linear_4bit
from peftkern.memory import Budgets, CheckpointStore, checkpoint_layers, embedding_on_host, layers_on_host
from peftkern.memory.pinning import whole_pages

from ..patching import models
from ..patching.models import IDS
from .fakes import FakeStreams
from .test_checkpoint import adapted, assert_equal, step

LAYERS = 5


def on_host(model: nn.Module, **options: Any):
    return layers_on_host(model, **{"device": "cpu", "min_bytes": 64} | options)


@pytest.mark.parametrize(
    ("patched", "checkpointed", "streams"),
    [
        ("stock", True, None),
        ("stock", False, FakeStreams),
        ("patched", True, FakeStreams),
        ("patched", False, None),
        ("patched after", True, None),
    ],
)
def test_numbers_are_those_of_resident_layers(patched: str, checkpointed: bool, streams: Any) -> None:
    model = adapted()
    if patched != "stock":
        peftkern.patch(model)
    expected = step(model)
    if patched == "patched after":
        peftkern.unpatch(model)
    store = CheckpointStore(
        Budgets(host=1 << 20), device="cpu", block_bytes=1024, min_tokens=1, min_elements=1
    )
    with on_host(model, streams=streams and streams()):
        if patched == "patched after":
            assert peftkern.patch(model).counts["qlora_linear"] == 7 * LAYERS
        handle = checkpoint_layers(model, store=store) if checkpointed else None
        for _ in range(2):
            assert_equal(step(model), expected)
        with torch.no_grad():
            model.eval()
            logits = [model(IDS).logits for _ in range(2)]
            model.train()
        if handle is not None:
            handle.remove()
    model.eval()
    with torch.no_grad():
        assert all(torch.equal(model(IDS).logits, seen) for seen in logits)
    model.train()
    assert_equal(step(model), expected)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_forwards_alone_come_back_to_the_first_layer(count: int) -> None:
    torch.manual_seed(0)
    layers, x = nn.Sequential(*(Packed(True) for _ in range(count))), torch.randn(3, 256)
    with torch.no_grad():
        expected = layers(x)
        with on_host(layers, layers=list(layers)) as handle:
            assert all(torch.equal(layers(x), expected) for _ in range(3))
            assert (handle._loaded[0] == 0) == (
                count % 2 == 0
            )  # the last layer of an odd number is in its slot


def dense() -> nn.Module:
    """LoRA on a dense base, whose frozen weights have biases."""
    return models.lora(models.llama(four_bit=False, bias=True, layers=4).requires_grad_(False)).train()


def plain_absmax() -> nn.Module:
    return models.lora(models.llama(nested=False, layers=3)).train()


@pytest.mark.parametrize("make", [dense, plain_absmax])
def test_other_bases(make: Any) -> None:
    model = make()
    expected = step(model)
    with on_host(model):
        assert_equal(step(model), expected)
    assert_equal(step(model), expected)


class Packed(nn.Module):
    """A layer that holds peftkern's own 4-bit weight."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.weight = NF4Weight.from_dense(torch.randn(256, 256) / 16, nested=nested)
        self.scale = nn.Parameter(torch.rand(256))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(linear_4bit(x * self.scale, self.weight)) + x


@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_nf4weights(nested: bool) -> None:
    torch.manual_seed(0)
    layers, x = nn.Sequential(*(Packed(nested) for _ in range(4))), torch.randn(3, 256)

    def run() -> dict[str, Tensor]:
        layers.zero_grad()
        layers(x).square().sum().backward()
        return models.grads(layers)

    expected, packed = run(), layers[1].weight.packed.clone()
    with on_host(layers, layers=list(layers)) as handle:
        assert_equal(run(), expected)
        assert len({layer.weight.packed.data_ptr() for layer in layers}) == 2  # two slots
        assert handle.report()["host"] == 2 * handle.report()["device"] >= 4 * 256 * 128
    assert torch.equal(layers[1].weight.packed, packed) and layers[1].weight.nested == nested
    assert_equal(run(), expected)


def test_layers_are_copied_once_a_direction_and_ahead_of_their_use() -> None:
    model, streams = adapted(), FakeStreams()
    with on_host(model, streams=streams) as handle:
        order: list[tuple[str, int]] = []
        fill, load = handle._fill, handle._load

        def filled(index: int) -> None:
            if handle._loaded[index % 2] != index:
                order.append(("copy", index))
            fill(index)

        def loaded(index: int) -> None:
            load(index)
            order.append(("run", index))

        handle._fill, handle._load = filled, loaded
        step(model)
        forward = "copy 0, run 0, copy 1, run 1, copy 2, run 2, copy 3, run 3, copy 4, run 4"
        backward = "run 4, run 3, copy 2, run 2, copy 1, run 1, copy 0, run 0"
        assert ", ".join(f"{what} {index}" for what, index in order) == f"{forward}, {backward}"
        order.clear()
        step(model)
        again = forward.replace("copy 0, ", "").replace("copy 1, ", "")  # both are there from the backward
        assert ", ".join(f"{what} {index}" for what, index in order) == f"{again}, {backward}"
    assert not any(entry[0] == "finish" for entry in streams.log)


def test_a_layer_that_is_called_again_in_backward_goes_on_backward() -> None:
    """As transformers' checkpointing called layers up to 5.17."""
    layers, x = nn.Sequential(*(Packed(True) for _ in range(5))), torch.randn(3, 256)
    streams = FakeStreams()

    def run() -> dict[str, Tensor]:
        layers.zero_grad()
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False)
        y.square().sum().backward()
        return models.grads(layers)

    expected = run()
    with on_host(layers, layers=list(layers), streams=streams):
        assert_equal(run(), expected)
        assert sum(entry[0] == "move" for entry in streams.log) == 5 + 3
        assert_equal(run(), expected)
        assert sum(entry[0] == "move" for entry in streams.log) == 2 * (5 + 3) - 2


def test_a_slot_is_filled_after_what_was_computed_and_used_after_it_is_filled() -> None:
    layers, streams = nn.Sequential(*(Packed(True) for _ in range(3))), FakeStreams()
    on_host(layers, layers=list(layers), streams=streams)
    layers(torch.randn(3, 256))
    kinds = [entry[:2] if entry[0] != "move" else ("move",) for entry in streams.log]
    fill = [("record", "compute"), ("wait", "copy"), ("move",), ("record", "copy")]
    wait = [("wait", "compute")]
    assert kinds == [*fill, *wait, *fill, *wait, *fill, *wait]
    waited = [entry[2] for entry in streams.log if entry[:2] == ("wait", "compute")]
    assert waited == [entry[2] for entry in streams.log if entry[:2] == ("record", "copy")]


def test_state_dict_has_every_layers_own_bytes() -> None:
    model = adapted()
    expected = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    with on_host(model) as handle:
        step(model)
        got = model.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
        saved = models.peft.get_peft_model_state_dict(model)
        assert saved and all("lora" in name for name in saved)
        with pytest.raises(TypeError, match="neither copied nor pickled; call remove"):
            copy.deepcopy(model)
        report = handle.report()
    frozen = sum(
        p.nbytes for n, p in model.named_parameters() if not p.requires_grad and "layers" in n and "proj" in n
    )
    assert frozen <= report["host"] <= 1.5 * frozen and report["device"] == 2 * report["host"] // LAYERS
    assert report["pinned"] == 0


@pytest.mark.parametrize("patched", [False, True])
def test_what_held_the_weights_before_lets_go_of_them(patched: bool) -> None:
    model = adapted()
    if patched:
        peftkern.patch(model)
    step(model)
    layers = model.get_base_model().model.layers
    held = [
        StorageWeakRef(p.untyped_storage())
        for p in layers.parameters()
        if not p.requires_grad and p.dim() > 1
    ]
    on_host(model)
    gc.collect()
    assert len(held) == 7 * LAYERS and all(storage.expired() for storage in held)


def test_memory_to_be_pinned_has_pages_of_its_own() -> None:
    made = [whole_pages(nbytes) for nbytes in (1, 4095, 4096, 10_000)]
    pages = [{(data.data_ptr() + i) // 4096 for i in range(data.nbytes)} for data in made]
    assert all(data.data_ptr() % 4096 == 0 for data in made) and [data.nbytes for data in made] == [
        1,
        4095,
        4096,
        10_000,
    ]
    assert len(set().union(*pages)) == sum(map(len, pages)) == 6
    for data in made:  # the last page is the tensor's own to its end
        storage = data.untyped_storage()
        assert storage.data_ptr() + storage.nbytes() >= data.data_ptr() + -(-data.nbytes // 4096) * 4096


def test_what_cannot_be_is_refused() -> None:
    model = adapted()
    with pytest.raises(
        ValueError, match=r"host: got a budget of 1000 bytes, but the frozen weights of 5 layers take \d+"
    ):
        on_host(model, host=1000)
    with pytest.raises(ValueError, match="no frozen weight that is large enough"):
        on_host(model, min_bytes=1 << 30)
    with pytest.raises(ValueError, match="layers: got 0 of Linear"):
        on_host(nn.Linear(2, 2))
    assert step(model)


def test_the_embedding_on_the_host() -> None:
    model = adapted()
    model.enable_input_require_grads()
    peftkern.patch(model)
    expected = step(model)
    with embedding_on_host(model):
        assert_equal(step(model), expected)
        tokens = model.eval().generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False), tokens)
    assert "forward" not in model.get_input_embeddings().__dict__
    assert_equal(step(model.train()), expected)


def test_rows_go_to_the_device_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a device that stands in for another than the host's."""
    from peftkern.memory import embedding as module

    monkeypatch.setattr(module, "_TOKENS", 5)
    held = module.HostEmbedding(nn.Embedding(96, 8, padding_idx=0), torch.device("meta"))
    assert held.embedding(IDS).device.type == "meta" and held.embedding(IDS).shape == (2, 12, 8)

    class Elsewhere:
        type = "elsewhere"

    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *size, device, **kwargs: empty(*size, **kwargs))
    rows = module._look_up_for(Elsewhere())(held.embedding, IDS)
    assert torch.equal(rows, nn.functional.embedding(IDS, held.embedding.weight))


def test_embeddings_that_cannot_be_on_the_host() -> None:
    tied = models.llama(four_bit=False).requires_grad_(False)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    with pytest.raises(ValueError, match="the head is tied to it and multiplies by it on the device"):
        embedding_on_host(tied)
    with pytest.raises(ValueError, match="it is trained"):
        embedding_on_host(models.llama(four_bit=False))
    wrapped = models.lora(models.llama(), target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="it is a Embedding, expected torch.nn.Embedding|trained"):
        embedding_on_host(wrapped)
