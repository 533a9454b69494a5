"""The store and the host layers with CUDA's own streams. Not run yet on a machine of the project."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftkern
from peftkern import NF4Weight
from peftkern.functional import linear_4bit
from peftkern.memory import (
    Budgets,
    CheckpointStore,
    Tier,
    checkpoint_layers,
    embedding_on_host,
    layers_on_host,
)

from ..patching import models
from ..patching.models import IDS
from .test_checkpoint import assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[CheckpointStore]:
    """All tiers, in blocks that no checkpoint fits exactly."""
    made = CheckpointStore(
        Budgets(device=64 * MIB, pinned=64 * MIB, host=64 * MIB, disk=64 * MIB),
        device="cuda",
        block_bytes=MIB,
        min_tokens=1,
        min_elements=1,
    )
    yield made
    made.close()


def busy(x: Tensor) -> Tensor:
    """Some milliseconds of the computing stream."""
    wide = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        wide = wide @ wide * 0
    return x + wide[0, 0].float()


@pytest.mark.parametrize("tier", list(Tier))
def test_sources_live_until_they_are_copied_and_targets_are_there_when_they_are_read(
    store: CheckpointStore, tier: Tier
) -> None:
    """The host runs ahead: the memory of a source that is dropped is written again at once."""
    values = [torch.randn(1000, 777, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for _ in range(3):
        kept = []
        for value in values:
            x = busy(value.to("cuda"))
            kept.append(store.put(x, tier))
            del x
            torch.full((1000, 777), torch.nan, device="cuda")
        store.settle()
        torch.full((6, 1000, 777), torch.nan, device="cuda")
        got = []
        for checkpoint in reversed(kept):
            assert checkpoint.tier is tier
            got.append(busy(checkpoint.get()))
        for tensor, value in zip(reversed(got), values, strict=True):
            assert torch.equal(tensor.cpu(), value)


def test_the_host_waits_for_nothing(store: CheckpointStore) -> None:
    x = torch.randn(1000, 777, device="cuda")

    def around() -> None:
        kept = [store.put(x * i, Tier.PINNED) for i in range(4)]
        for checkpoint in reversed(kept):
            checkpoint.get().add_(1)

    around()  # makes the pinned blocks
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        around()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def adapted(layers: int = 5) -> nn.Module:
    model = models.lora(models.llama(torch.bfloat16, layers=layers), lora_dropout=0.1).to("cuda").train()
    peftkern.patch(model)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """With attention whose backward has one order of sums."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    ids = IDS.to("cuda")
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return {"loss": loss.detach()} | models.grads(model)


@pytest.mark.parametrize("tier", ["pinned", "host", "disk"])
def test_a_step_with_the_store(tier: str) -> None:
    model = adapted()
    expected = step(model)
    budgets = Budgets(**{"pinned": 0, "host": 0} | {tier: 8 * MIB})
    small = {"block_bytes": 4096, "min_tokens": 1, "min_elements": 1}
    store = CheckpointStore(budgets, device="cuda", **small)
    with checkpoint_layers(model, store=store):
        for _ in range(3):
            assert_equal(step(model), expected)
    assert store.report()[tier]["peak"] == 4 * IDS.numel() * 64 * 2
    store.close()


@pytest.mark.parametrize("pinned", [0, 1 << 30])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_with_layers_and_embedding_on_the_host(
    checkpointed: bool, pinned: int, store: CheckpointStore
) -> None:
    model = adapted()
    expected = step(model)
    with layers_on_host(model, device="cuda", min_bytes=64, pinned=pinned) as held, embedding_on_host(model):
        assert held.report()["pinned"] == (held.report()["host"] if pinned else 0)
        handle = checkpoint_layers(model, store=store) if checkpointed else None
        for _ in range(3):
            assert_equal(step(model), expected)
        if handle is not None:
            handle.remove()
    assert_equal(step(model), expected)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = NF4Weight.from_dense(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64)
        self.scale = nn.Parameter(torch.ones(4096, device="cuda", dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(linear_4bit(x * self.scale, self.weight))


def test_slots_are_not_overwritten_while_they_are_read() -> None:
    """Copies of 9 MB beside products of a few microseconds and of milliseconds."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Packed() for _ in range(7)))
    for tokens in (64, 8192):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)

        def run(x: Tensor = x) -> dict[str, Tensor]:
            layers.zero_grad(set_to_none=True)
            y = layers(x)
            y.float().square().sum().backward()
            return {"y": y.detach()} | models.grads(layers)

        expected = run()
        with layers_on_host(layers, device="cuda", layers=list(layers)):
            for _ in range(5):
                assert_equal(run(), expected)


def test_what_leaves_the_device_is_free() -> None:
    model, ids = adapted(layers=9), IDS.repeat(8, 8).to("cuda")[:, :64]
    store = CheckpointStore(
        Budgets(pinned=64 * MIB), device="cuda", block_bytes=MIB, min_tokens=1, min_elements=1
    )

    def held() -> int:
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids).loss
        found = torch.cuda.memory_allocated() - before
        loss.backward()
        return found

    model.gradient_checkpointing_enable({"use_reentrant": False})
    held()
    plain = held()
    with checkpoint_layers(model, store=store):
        held()
        saved = plain - held()
    nbytes = ids.numel() * 64 * 2
    assert 7 * nbytes <= saved <= 8 * nbytes  # of nine inputs the last one stays
    store.close()
