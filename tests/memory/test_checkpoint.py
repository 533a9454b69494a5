"""Checkpointed layers whose inputs are in a store: gradients bit for bit those without checkpointing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import peftkern
from peftkern.memory import Budgets, CheckpointStore, StoreFull, checkpoint_layers

from ..patching import models
from ..patching.models import IDS, transformers

LAYERS, INPUT = 5, 2 * 12 * 64 * 4  # bytes of a layer's input
BUDGETS = {
    "host": Budgets(host=1 << 20),
    "all": Budgets(device=INPUT, host=INPUT, disk=1 << 20),
    "disk": Budgets(host=0, disk=1 << 20),
}


def make_store(budgets: Budgets = BUDGETS["host"], **options: Any) -> CheckpointStore:
    small = {"device": "cpu", "block_bytes": 1024, "min_tokens": 1, "min_elements": 1}
    return CheckpointStore(budgets, **small | options)


def adapted(dropout: float = 0.1, layers: int = LAYERS) -> nn.Module:
    """A QLoRA model in training, with dropout in the adapters and in attention."""
    model = models.lora(models.llama(layers=layers), lora_dropout=dropout).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def step(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(input_ids=IDS, labels=IDS, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | models.grads(model)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize(
    ("budgets", "patched"),
    [("host", "stock"), ("all", "stock"), ("disk", "patched"), ("all", "patched"), ("host", "patched after")],
)
def test_gradients_are_those_without_checkpointing(budgets: str, patched: str) -> None:
    model = adapted()
    if patched != "stock":
        peftkern.patch(model)
    expected = step(model)
    if patched == "patched after":
        peftkern.unpatch(model)
    store = make_store(BUDGETS[budgets])
    with checkpoint_layers(model, store=store):
        if patched == "patched after":
            counts = peftkern.patch(model).counts
            assert counts["add_rms_norm"] == LAYERS and counts["qlora_linear"] == 7 * LAYERS
        for _ in range(2):
            assert_equal(step(model), expected)
        stored = sum(row["peak"] for row in store.report().values())
    assert stored == (LAYERS - 1) * INPUT  # the last layer's stays where it is
    assert sum(row["in_use"] for row in store.report().values()) == 0
    assert_equal(step(model), expected)
    store.close()


def test_inputs_leave_the_device_and_all_bodies_are_recomputed() -> None:
    model, store = adapted(), make_store()
    layers = model.get_base_model().model.layers
    seen: list[StorageWeakRef] = []
    runs = [0] * LAYERS
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(_storage(args[0]))) for layer in layers
    ]
    for index, layer in enumerate(layers):
        hooks.append(
            layer.self_attn.register_forward_pre_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
        )
    with checkpoint_layers(model, store=store):
        loss = model(input_ids=IDS, labels=IDS).loss
        gc.collect()
        assert [storage.expired() for storage in seen] == [True] * (LAYERS - 1) + [False]
        assert store.report()["host"]["in_use"] == (LAYERS - 1) * INPUT
        loss.backward()
    assert runs == [2] * LAYERS
    for hook in hooks:
        hook.remove()


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen input", "input requires grad"])
@pytest.mark.parametrize("cache", [None, True])
def test_the_first_layers_input_and_a_cache(requires_grad: bool, cache: bool | None) -> None:
    model = adapted()
    if requires_grad:
        model.enable_input_require_grads()
    expected = step(model)
    assert any("layers.0." in name for name in expected)
    with checkpoint_layers(model, store=make_store()):
        assert_equal(step(model, **({} if cache is None else {"use_cache": cache})), expected)


def test_ours_wins_over_transformers_own_and_gives_way_when_it_is_removed() -> None:
    model, store = adapted(), make_store()
    expected = step(model)
    layers = model.get_base_model().model.layers
    with checkpoint_layers(model, store=store):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        assert_equal(step(model), expected)
        assert store.report()["host"]["peak"] == (LAYERS - 1) * INPUT
        model.gradient_checkpointing_disable()
        store.peak = dict.fromkeys(store.peak, 0)
        assert_equal(step(model), expected)
        assert store.report()["host"]["peak"] == 0
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_equal(step(model), expected)
        assert store.report()["host"]["peak"] == (LAYERS - 1) * INPUT
    assert all(layer.gradient_checkpointing for layer in layers)  # what transformers was asked for last
    assert {layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers} == {False}
    store.peak = dict.fromkeys(store.peak, 0)
    assert_equal(step(model), expected)
    assert store.report()["host"]["peak"] == 0


def test_removing_restores_every_instance() -> None:
    model = adapted()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    checkpoint_layers(model, store=make_store()).remove()
    assert before == {name: module.__dict__ for name, module in model.named_modules()}
    assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


def test_accumulation_of_several_forwards_and_a_second_backward() -> None:
    model, store = adapted(), make_store(BUDGETS["all"])
    other = IDS.flip(1)

    def twice() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, other)]
        (losses[0] - losses[1]).backward(retain_graph=True)  # as preference losses do
        losses[0].backward()
        return models.grads(model)

    expected = twice()
    with checkpoint_layers(model, store=store):
        assert_equal(twice(), expected)
    gc.collect()
    assert sum(row["in_use"] for row in store.report().values()) == 0
    store.close()


def test_evaluation_and_generation_run_as_before() -> None:
    model, store = adapted(), make_store()
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
    tokens = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    with checkpoint_layers(model, store=store), torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False), tokens)
        model.train()
        model(IDS)
    assert store.report()["host"]["peak"] == 0


def test_a_store_that_is_too_small_stops_the_first_forward_and_leaves_the_model_usable() -> None:
    model = adapted()
    expected = step(model)
    refused = pytest.raises(StoreFull, match=r"checkpoints of 4 layers, 6144 bytes each for \(2, 12, 64\)")
    with checkpoint_layers(model, store=make_store(Budgets(host=3 * INPUT))), refused:
        step(model)
    store = make_store(Budgets(host=4 * INPUT))
    with checkpoint_layers(model, store=store):
        assert_equal(step(model), expected)


def test_a_failing_step_gives_its_room_back() -> None:
    model, store = adapted(), make_store(Budgets(host=4 * INPUT))
    expected = step(model)
    with checkpoint_layers(model, store=store):
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                _fail(model)
        assert_equal(step(model), expected)


def _fail(model: nn.Module) -> None:
    def raises(*_: Any) -> None:
        raise ZeroDivisionError

    hook = model.get_base_model().model.layers[3].mlp.register_forward_pre_hook(raises)
    try:
        step(model)
    finally:
        hook.remove()


def test_a_copy_of_the_model_has_transformers_own_checkpointing() -> None:
    model = adapted()
    expected = step(model)
    with checkpoint_layers(model, store=make_store()):
        twin = copy.deepcopy(model)
    assert_equal(step(twin), expected)


class Block(nn.Module):
    """A layer that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(64, 64), nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + self.drop(torch.tanh(self.inner(x))) * scale


def test_layers_of_any_module() -> None:
    blocks, store = nn.Sequential(*(Block() for _ in range(4))), make_store()
    x = torch.randn(2, 12, 64)

    def run() -> dict[str, Tensor]:
        blocks.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        blocks(x).square().sum().backward()
        return models.grads(blocks)

    expected = run()
    with checkpoint_layers(blocks, store=store, layers=list(blocks)):
        assert_equal(run(), expected)
        assert store.report()["host"]["peak"] == 3 * INPUT
    assert all("forward" not in block.__dict__ for block in blocks)
    with pytest.raises(
        ValueError, match="Sequential has no layers that transformers can checkpoint; pass `layers`"
    ):
        checkpoint_layers(blocks, store=store)


def bottleneck() -> nn.Module:
    from peftkern.adapters.bottleneck import add_bottleneck

    model = models.llama(layers=3)
    add_bottleneck(model, "double_seq_bn")
    return model.train()


def prefix() -> nn.Module:
    from peftkern.adapters.prefix import prefix_model

    config = models.peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return prefix_model(
        models.llama(four_bit=False, layers=3).requires_grad_(False), config, text=IDS[0, :4]
    ).train()


@pytest.mark.parametrize("make", [bottleneck, prefix])
def test_other_adapters(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    expected, store = step(model), make_store()
    with checkpoint_layers(model, store=store):
        assert_equal(step(model), expected)
    assert store.report()["host"]["peak"] == 2 * INPUT and len(expected) > 1


@pytest.mark.parametrize("own", [False, True], ids=["trainer without", "trainer with its own"])
def test_transformers_trainer(own: bool, tmp_path) -> None:
    def train(store: CheckpointStore | None) -> dict[str, Tensor]:
        model = adapted(layers=3)
        if store is not None:
            checkpoint_layers(model, store=store)
        rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=2,
            gradient_checkpointing=own,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    store = make_store()
    assert_equal(train(store), train(None))
    assert store.report()["host"]["peak"] == 2 * INPUT
