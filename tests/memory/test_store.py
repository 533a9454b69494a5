"""The store: where checkpoints go, that they come back as they were, and what happens when there is no
room."""

from __future__ import annotations

import gc
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern.memory import Budgets, CheckpointStore, SpillError, StoreFull, Tier
from peftkern.memory import blocks as blocks_module
from peftkern.memory import store as store_module
from peftkern.memory.blocks import Blocks
from peftkern.memory.tiers import assign

from .fakes import FakeStreams

BLOCK = 256


def make(budgets: Budgets, **options) -> CheckpointStore:
    return CheckpointStore(
        budgets, **{"device": "cpu", "block_bytes": BLOCK, "min_tokens": 1, "min_elements": 1} | options
    )


def rows(number: int, count: int = 30, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of its own [count, 10]; 600 bytes: two blocks and a part of a third."""
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize(
    ("count", "room", "expected"),
    [
        (5, {Tier.PINNED: 1000}, "pinned pinned pinned pinned device"),
        (5, {Tier.DEVICE: 200, Tier.PINNED: 100, Tier.DISK: 1000}, "disk pinned device device device"),
        (5, {Tier.PINNED: 199, Tier.HOST: 100, Tier.DISK: 200}, "disk disk host pinned device"),
        (5, {Tier.PINNED: 399}, None),
        (1, {}, "device"),
    ],
)
def test_the_last_layers_get_the_fastest_tiers(count, room, expected):
    found = assign(count, 100, room)
    assert (found and " ".join(tier.value for tier in found)) == expected


def test_blocks_are_never_taken_twice_and_none_is_lost():
    blocks, draw, held, taken = Blocks("host", BLOCK, 10 * BLOCK), random.Random(0), [], set()
    for _ in range(2000):
        if held and draw.random() < 0.5:
            spans = held.pop(draw.randrange(len(held)))
            taken -= _bytes(spans)
            blocks.give(spans)
        elif (spans := blocks.take(size := draw.randrange(1, 900))) is not None:
            assert sum(span.nbytes for span in spans) == size
            assert not taken & _bytes(spans)
            taken |= _bytes(spans)
            held.append(spans)
        else:
            assert size > blocks.room
    for spans in held:
        blocks.give(spans)
    assert blocks.room == 10 * BLOCK == len(_bytes(blocks.take(10 * BLOCK)))


def _bytes(spans) -> set[int]:
    return {span.block * BLOCK + span.offset + i for span in spans for i in range(span.nbytes)}


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tier_gives_back_what_it_got(tier, dtype, tmp_path):
    store = make(Budgets(device=1 << 14, host=1 << 14, disk=1 << 14), directory=tmp_path)
    kept = [store.put(rows(i, dtype=dtype), tier) for i in range(5)]
    turned = store.put(rows(9, dtype=dtype).t(), tier)
    assert {checkpoint.tier for checkpoint in kept} == {tier}
    assert torch.equal(turned.get(), rows(9, dtype=dtype).t())
    for i in (4, 3, 3, 2, 0, 1):
        assert torch.equal(kept[i].get(), rows(i, dtype=dtype))
    assert list(tmp_path.iterdir()) == []  # the file has no name: a killed process leaves nothing


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.HOST, Tier.DISK])
def test_copies_beside_the_computation_are_waited_for(tier):
    """With streams that copy as late as they may."""
    store = make(Budgets(pinned=1 << 13, host=1 << 13, disk=1 << 13), streams=FakeStreams())
    kept = [store.put(rows(i), tier) for i in range(6)]
    store.settle()
    got = [(i, kept[i].get()) for i in (5, 4, 3, 2, 1, 0, 3)]
    assert all(torch.equal(tensor, rows(i)) for i, tensor in got)
    store.close()


def test_the_order_of_streams_and_events():
    """The side stream waits for the producer; a source is dropped once the computing stream waits for its
    copy; a target is filled after what was computed before it was made, and used after it is filled; the
    host waits for nothing."""
    streams = FakeStreams()
    store = make(Budgets(pinned=1 << 14), streams=streams)
    first = store.put(rows(0))
    moves = [("move", BLOCK), ("move", BLOCK), ("move", 600 - 2 * BLOCK)]
    out = [("record", "compute", 1), ("wait", "copy", 1), *moves, ("record", "copy", 2)]
    assert streams.log == out and first._kept is not None

    streams.log.clear()
    second = store.put(rows(1))
    assert streams.log[0] == ("wait", "compute", 2) and first._kept is None and second._kept is not None
    store.settle()
    assert streams.log[-1] == ("wait", "compute", 4)

    streams.log.clear()
    second.get()
    ready, filled, next_ready, next_filled = 5, 6, 7, 8
    fetched = [e for e in streams.log if e[0] != "move"]
    assert fetched == [
        ("record", "compute", ready),
        ("wait", "copy", ready),
        ("record", "copy", filled),
        ("wait", "compute", filled),
        ("record", "compute", next_ready),  # the one before it, which backward wants next, comes meanwhile
        ("wait", "copy", next_ready),
        ("record", "copy", next_filled),
    ]
    streams.log.clear()
    first.get()
    assert streams.log == [("wait", "compute", next_filled)]
    assert not any(entry[0] == "finish" for entry in streams.log)


def test_the_thread_alone_waits_and_the_computation_waits_when_it_falls_behind():
    streams = FakeStreams()
    store = make(Budgets(pinned=0, host=0, disk=1 << 14), streams=streams)
    kept = [store.put(rows(i)) for i in range(8)]
    assert sum(checkpoint._kept is not None for checkpoint in kept) <= 4
    assert all(torch.equal(kept[i].get(), rows(i)) for i in reversed(range(8)))
    waits = {entry[1] for entry in streams.log if entry[0] == "finish"}
    assert waits and all(name.startswith("peftkern-memory") for name in waits)
    store.close()


def test_room_comes_back_when_nothing_refers_to_a_checkpoint():
    store = make(Budgets(host=3 * BLOCK, disk=0))
    for i in range(20):
        kept = store.put(rows(i))
        assert torch.equal(kept.get(), rows(i))
        del kept
    assert store.report()["host"] == {"in_use": 0, "peak": 600, "budget": 3 * BLOCK}
    assert store.host_bytes() == 3 * BLOCK


def test_blocks_are_made_before_they_are_needed():
    store = make(Budgets(pinned=4 * BLOCK, host=2 * BLOCK), streams=FakeStreams())
    assert store.reserve(3 * BLOCK - 1) == 3 * BLOCK - 1 and store.host_bytes() == 3 * BLOCK
    assert store.reserve(10 * BLOCK) == 6 * BLOCK == store.host_bytes()
    assert store.room()[Tier.PINNED] == 4 * BLOCK and store.report()["pinned"]["in_use"] == 0


def test_what_is_short_or_of_another_device_passes_through():
    store = make(Budgets(host=1 << 14), min_tokens=20, min_elements=250)
    for tensor in (rows(0, 19), rows(0, 20), rows(0)[None].to("meta"), torch.ones(300)):
        assert store.put(tensor) is tensor
    assert store.put(rows(0, 25)).tier is Tier.HOST
    long = CheckpointStore(Budgets(host=64 << 20), device="cpu")
    assert not long.takes(torch.empty(1, 511, 4096)) and not long.takes(torch.empty(1, 600, 1024))
    assert long.takes(torch.empty(1, 512, 4096))


def test_a_pass_is_planned_before_it_begins_and_refused_with_what_it_lacks():
    store = make(Budgets(device=600, host=5 * BLOCK, disk=3 * BLOCK))
    run = store.begin(5)
    kept = [run.put(rows(i), i) for i in range(5)]
    assert [getattr(item, "tier", None) for item in kept] == [
        Tier.DISK,
        Tier.HOST,
        Tier.HOST,
        Tier.DEVICE,
        None,
    ]
    del kept, run
    gc.collect()
    with pytest.raises(StoreFull, match=r"5 layers, 600 bytes each .* room for 4 of them.*by 600 bytes"):
        store.begin(6).put(rows(0), 0)
    kept = [store.put(rows(i)) for i in range(4)]
    with pytest.raises(StoreFull, match="host 1200 bytes of 1280 bytes"):
        store.put(rows(0))
    assert all(torch.equal(item.get(), rows(i)) for i, item in enumerate(kept))


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (Budgets(host=BLOCK - 1), "host: got a budget of 255 bytes, expected 0 or at least one block of 256"),
        (Budgets(host=0, disk=3), "disk: got a budget of 3 bytes"),
        (Budgets(host=0, disk=1 << 60), "disk: got a budget of .* has .* left"),
        (Budgets(host=0, pinned=1 << 20), "only a GPU copies from pinned"),
        (Budgets(host=1 << 50), "host: got budgets of .* allows .* in all"),
        (Budgets(host=0, device=-1), "device: got -1"),
        (Budgets(host=-1), "host: got a budget of -1"),
    ],
)
def test_budgets_below_the_minimum_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        make(budgets)


def test_unstated_budgets_come_from_the_machine():
    budgets = Budgets().resolved(True, 100 * BLOCK, BLOCK)
    assert (budgets.device, budgets.pinned, budgets.host, budgets.disk) == (0, 72 * BLOCK, 18 * BLOCK, 0)
    assert Budgets().resolved(False, 100 * BLOCK, BLOCK) == Budgets(0, 0, 90 * BLOCK, 0)
    with pytest.raises(ValueError, match="expected a power of two"):
        make(Budgets(host=0), block_bytes=100)


def test_a_full_disk_ends_with_a_message_and_the_store_goes_on():
    store = make(Budgets(host=0, disk=1 << 14))
    file = store._tiers[Tier.DISK].medium
    file._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 (the store closes it)
    with pytest.raises(
        SpillError, match="the disk of .* is full: .*the step is lost, and nothing was trained on it"
    ):
        for i in range(3):
            store.put(rows(i)).get()
            store._tiers[Tier.DISK].worker.submit(int).result()
    file.close()
    kept = store.put(rows(5))
    assert torch.equal(kept.get(), rows(5))


def test_a_corrupt_file_is_noticed(tmp_path):
    store = make(Budgets(host=0, disk=1 << 14), directory=tmp_path)
    first, second = store.put(rows(0)), store.put(rows(1))
    store._tiers[Tier.DISK].worker.submit(int).result()  # what was asked for before is written
    store.settle()
    os.pwrite(store._tiers[Tier.DISK].medium.fileno(), b"\x55\xaa", 300)
    assert torch.equal(second.get(), rows(1))
    with pytest.raises(SpillError, match="block 1 of the spill file .* another checksum"):
        first.get()
    os.ftruncate(store._tiers[Tier.DISK].medium.fileno(), 100)
    with pytest.raises(SpillError, match="could not be read: .* ends .* early"):
        second.get()
    assert torch.equal(store.put(rows(7)).get(), rows(7))


def test_memory_that_cannot_be_pinned_goes_to_the_next_tier(monkeypatch: pytest.MonkeyPatch):
    store = make(Budgets(pinned=1 << 14, host=1 << 14), streams=FakeStreams())
    pool, given = store._tiers[Tier.PINNED].pool, []

    def allocate(nbytes: int) -> Tensor:
        if len(given) == 3:
            raise RuntimeError("CUDA error: out of memory\nfurther lines")
        given.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(pool, "_allocate", allocate)
    kept = [store.put(rows(i)) for i in range(3)]
    assert [item.tier for item in kept] == [Tier.PINNED, Tier.HOST, Tier.HOST]
    assert pool.shortage == "RuntimeError: CUDA error: out of memory"
    assert all(torch.equal(item.get(), rows(i)) for i, item in enumerate(kept))
    store.close()


def test_out_of_memory_names_what_the_store_holds_and_leaves_it_usable(monkeypatch: pytest.MonkeyPatch):
    store = make(Budgets(host=1 << 14))
    first, second = store.put(rows(0)), store.put(rows(1))
    real, left = store_module.on_device, [1]

    def on_device(*like):
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        left.pop()
        return real(*like)

    monkeypatch.setattr(store_module, "on_device", on_device)
    assert torch.equal(
        second.get(), rows(1)
    )  # the prefetch of the first did not fit, which nobody needed yet
    with pytest.raises(
        torch.OutOfMemoryError, match="600 bytes did not fit: .*holds: .*host 1200 bytes of 16384"
    ):
        first.get()
    monkeypatch.undo()
    assert torch.equal(first.get(), rows(0))


def test_nothing_is_pickled():
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        pickle.dumps(make(Budgets(host=0)))


def test_a_block_is_exactly_what_torch_pins(monkeypatch: pytest.MonkeyPatch):
    """Pinned memory is rounded up to a power of two, which a block is."""
    asked = []
    monkeypatch.setattr(blocks_module.torch, "empty", lambda *size, **options: asked.append((size, options)))
    blocks_module.pinned(1 << 26)
    assert asked == [((1 << 26,), {"dtype": torch.uint8, "device": "cpu", "pin_memory": True})]
    assert store_module.BLOCK_BYTES & (store_module.BLOCK_BYTES - 1) == 0
    assert Path("/dev/full").exists()
