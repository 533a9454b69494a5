"""A store for activation checkpoints in four tiers: kept on the device, pinned host memory, pageable host
memory, a file. Copies run on a side stream, held together by events; the computing thread waits for none of
them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockPool, SpillFile, pinned
from .host import host_available, host_limit
from .movers import DirectTier, SpillError, Stored, Worker, WorkerTier, on_device
from .streams import Streams, streams_for
from .tiers import Budgets, StoreFull, Tier, assign, in_gb

__all__ = [
    "Budgets",
    "Checkpoint",
    "CheckpointStore",
    "SpillError",
    "StoreFull",
    "StorePass",
    "Tier",
    "assign",
]

BLOCK_BYTES = 64 << 20
MIN_TOKENS, MIN_ELEMENTS = 512, 1 << 20
_UNWRITTEN = 2  # sources on the device that wait for a writing thread before the computation waits for it


class Checkpoint:
    """A stored tensor. It is freed when nothing refers to it; `get` may be called more than once."""

    __slots__ = (
        "tier",
        "nbytes",
        "_store",
        "_like",
        "_kept",
        "_stored",
        "_incoming",
        "_previous",
        "__weakref__",
    )

    def __init__(self, store: CheckpointStore, tensor: Tensor, tier: Tier, stored: Stored | None) -> None:
        self.tier, self.nbytes, self._store, self._stored = tier, tensor.nbytes, store, stored
        self._like = (tensor.shape, tensor.dtype, tensor.device)
        self._kept: Tensor | None = tensor  # of an offloaded one until its copy is known to end in time
        self._incoming: Tensor | None = None
        self._previous: weakref.ref[Checkpoint] | None = None

    def get(self) -> Tensor:
        """The tensor on its device. What the computing stream does with it comes after the copy; the
        checkpoint stored before this one, which backward wants next, is fetched meanwhile.

        Raises: SpillError where the file has not kept it; torch.OutOfMemoryError with what the store holds.
        """
        with self._store.lock:
            self._store.drain()
            tensor = self._kept
            if tensor is None:
                self.prefetch()
                tensor, self._incoming = self._incoming, None
                self._stored.arrive()
            self._prefetch_next()
        return tensor

    def prefetch(self) -> None:
        """Begin to bring it to the device."""
        if self._kept is not None or self._incoming is not None:
            return
        try:
            target, data = on_device(*self._like)
        except torch.OutOfMemoryError as error:
            first = str(error).split("\n")[0]
            raise torch.OutOfMemoryError(
                f"a checkpoint of {in_gb(self.nbytes)} did not fit: {first} {self._store}"
            ) from error
        self._stored.fetch(data)
        self._incoming = target

    def _prefetch_next(self) -> None:
        earlier = self._previous() if self._previous is not None else None
        while earlier is not None and earlier._kept is not None:
            earlier = earlier._previous() if earlier._previous is not None else None
        if earlier is None:
            return
        try:
            earlier.prefetch()
        except torch.OutOfMemoryError:
            return  # it is fetched when it is needed: there may be room by then

    def follow(self, previous: weakref.ref[Checkpoint] | None) -> None:
        """Say which checkpoint was stored before this one."""
        self._previous = previous

    def settle(self, wait: bool) -> bool:
        """Drop the source of a copy, once the computing stream waits for the copy's end; whether that is
        so."""
        if self._stored is None or self._kept is None:
            return True
        if not self._stored.settle(wait):
            return False
        self._kept = None
        return True

    def __del__(self) -> None:
        store = getattr(self, "_store", None)
        if store is not None:  # an interpreter that is shutting down may have taken it
            store.dead.append((self.tier, self.nbytes, self._stored, self._kept, self._incoming))


class StorePass:
    """The checkpoints of one forward through a stack of layers, whose number is known."""

    def __init__(self, store: CheckpointStore, layers: int) -> None:
        self.store, self.layers = store, layers
        self.tiers: list[Tier] | None = None
        self.nbytes = -1

    def put(self, tensor: Tensor, layer: int) -> Checkpoint | Tensor:
        """As the store's, into the tier that this layer, 0 .. layers - 1, is due."""
        if layer == self.layers - 1 or not self.store.takes(tensor):
            self.store.settle()
            return tensor
        if self.nbytes != tensor.nbytes:
            self.tiers, self.nbytes = self.store.plan(tensor, self.layers, layer), tensor.nbytes
        return self.store.put(tensor, self.tiers[layer])


class CheckpointStore:
    """Keeps tensors for backward where there is room for them.

    Args:
        budgets: bytes of each tier. Budgets that cannot hold one block are refused.
        device: where the tensors come from and go back to; others pass through.
        directory: of the temporary file; the system's where it is not given. The file has no name, and is
            gone with the process.
        block_bytes: pools and the file consist of blocks of this size, a power of two.
        min_tokens, min_elements: a tensor [..., tokens, width] with fewer of either passes through: its copy
            would cost more than it frees.
        streams: how copies and the computation wait for each other; the device's own where it is not given.
    Raises: ValueError for budgets below the minimum.

    >>> store = CheckpointStore(Budgets(host=1 << 20), device="cpu", block_bytes=1 << 16, min_tokens=1,
    min_elements=1)
    >>> kept = store.put(torch.arange(6.0).view(2, 3))
    >>> kept.tier, kept.get().tolist()
    (<Tier.HOST: 'host'>, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    """

    def __init__(
        self,
        budgets: Budgets | None = None,
        *,
        device: torch.device | str = "cuda",
        directory: Path | str | None = None,
        block_bytes: int = BLOCK_BYTES,
        min_tokens: int = MIN_TOKENS,
        min_elements: int = MIN_ELEMENTS,
        streams: Streams | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.streams = streams or streams_for(self.device)
        self.min_tokens, self.min_elements, self.block_bytes = min_tokens, min_elements, block_bytes
        asynchronous = self.streams.asynchronous
        self.budgets = (budgets or Budgets()).resolved(asynchronous, host_available(), block_bytes)
        self.lock = threading.RLock()
        self.dead: deque[tuple[Any, ...]] = deque()  # of checkpoints that nothing refers to any more
        self.in_use = dict.fromkeys(Tier, 0)
        self.peak = dict.fromkeys(Tier, 0)
        self._unsettled: list[weakref.ref[Checkpoint]] = []
        self._last: weakref.ref[Checkpoint] | None = None
        self._tiers = self._build(directory, asynchronous)

    def _build(self, directory: Path | str | None, asynchronous: bool) -> dict[Tier, DirectTier | WorkerTier]:
        budgets, size, streams = self.budgets, self.block_bytes, self.streams
        if budgets.pinned and not asynchronous:
            raise ValueError(
                f"pinned: got {budgets.pinned} bytes for {self.device}, expected 0: only a GPU copies"
                " from pinned memory"
            )
        if budgets.pinned + budgets.host > host_limit():
            raise ValueError(
                f"host: got budgets of {in_gb(budgets.pinned)} pinned and {in_gb(budgets.host)} pageable, but"
                f" this machine, or its cgroup, allows {in_gb(host_limit())} in all"
            )
        if budgets.device < 0:
            raise ValueError(f"device: got {budgets.device} bytes, expected 0 or more")
        host, file = BlockPool("host", size, budgets.host), SpillFile(directory, size, budgets.disk)
        if budgets.disk and budgets.disk > (free := file.free_on_disk()):
            raise ValueError(
                f"disk: got a budget of {in_gb(budgets.disk)}, but {file.directory} has {in_gb(free)} left"
            )
        worker = Worker(streams, size, self._allocate)
        disk = WorkerTier(file, worker, verified=True)
        if not asynchronous:
            return {Tier.HOST: DirectTier(host, streams), Tier.DISK: disk}
        locked = BlockPool("pinned", size, budgets.pinned, allocate=self._allocate)
        beside = WorkerTier(host, worker, verified=False)
        return {Tier.PINNED: DirectTier(locked, streams), Tier.HOST: beside, Tier.DISK: disk}

    def _allocate(self, nbytes: int) -> Tensor:
        return (
            pinned(nbytes)
            if self.device.type == "cuda"
            else torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        )

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is worth storing: a plain one, of this device, long and large enough."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != self.device.type:
            return False
        tokens = tensor.shape[-2] if tensor.dim() > 1 else 1
        return tokens >= self.min_tokens and tensor.numel() >= max(1, self.min_elements)

    def begin(self, layers: int) -> StorePass:
        """A forward through a stack of so many layers begins."""
        return StorePass(self, layers)

    def reserve(self, nbytes: int) -> int:
        """Make the blocks of host memory for so many bytes now, in place of during the first step; how many
        bytes found room. Pinning a block of 64 MiB takes some milliseconds."""
        left = nbytes
        with self.lock:
            for tier in (Tier.PINNED, Tier.HOST):
                pool = self._tiers[tier].blocks if tier in self._tiers else None
                spans = None if pool is None else pool.take(min(left, pool.room))
                if spans is None:
                    continue
                left -= sum(span.nbytes for span in spans)
                pool.give(spans)
        return nbytes - left

    def room(self) -> dict[Tier, int]:
        """Bytes that each tier can still take."""
        with self.lock:
            self.drain()
            found = {Tier.DEVICE: self.budgets.device - self.in_use[Tier.DEVICE]}
            return found | {tier: mover.blocks.room for tier, mover in self._tiers.items()}

    def plan(self, tensor: Tensor, layers: int, layer: int = 0) -> list[Tier]:
        """The tier of every layer's checkpoint, if all from `layer` on are like `tensor`.

        Raises: StoreFull where the budgets have no room for them, with the least that would do.
        """
        room = self.room()
        found = assign(layers - layer, tensor.nbytes, room)
        if found is None:  # the graph of a step that failed may wait to be collected
            gc.collect()
            room = self.room()
            found = assign(layers - layer, tensor.nbytes, room)
        if found is None:
            offloaded = layers - layer - 1
            fit = sum(left // tensor.nbytes for left in room.values())
            raise StoreFull(
                f"the checkpoints of {offloaded} layers, {in_gb(tensor.nbytes)} each for"
                f" {tuple(tensor.shape)} in {tensor.dtype}, need {in_gb(offloaded * tensor.nbytes)}, "
                "but there"
                f" is room for {fit} of them. {self}"
                f" Raise the budgets by {in_gb((offloaded - fit) * tensor.nbytes)} (`host`, or `disk` with a"
                " `directory`), or shorten the sequences"
            )
        return [Tier.DEVICE] * layer + found

    def put(self, tensor: Tensor, tier: Tier | None = None) -> Checkpoint | Tensor:
        """Store a tensor in `tier`, or in the next one that has room; itself where it is not worth storing.

        The tensor must not be written to until the checkpoint is gone. Raises: StoreFull; SpillError of an
        earlier checkpoint that could not be written.
        """
        with self.lock:
            self.settle()
            if not self.takes(tensor):
                return tensor
            source = tensor.detach().contiguous()
            order = list(Tier)
            first = 0 if tier is None else order.index(tier)
            for candidate in order[first:] + order[:first]:
                found = self._put(source, candidate)
                if found is not None:
                    return found
        raise StoreFull(
            f"there is no room for a checkpoint of {in_gb(tensor.nbytes)}. {self} Raise the budgets, or"
            " shorten the sequences"
        )

    def _put(self, source: Tensor, tier: Tier) -> Checkpoint | None:
        stored = None
        if tier is Tier.DEVICE:
            if self.in_use[tier] + source.nbytes > self.budgets.device:
                return None
        elif (
            tier not in self._tiers
            or (stored := self._tiers[tier].put(source.view(-1).view(torch.uint8))) is None
        ):
            return None
        checkpoint = Checkpoint(self, source, tier, stored)
        self.in_use[tier] += source.nbytes
        self.peak[tier] = max(self.peak[tier], self.in_use[tier])
        checkpoint.follow(self._last)
        self._last = weakref.ref(checkpoint)
        if stored is not None:
            self._unsettled.append(self._last)
            if not self.streams.asynchronous:
                self.settle()
        return checkpoint

    def settle(self) -> None:
        """Drop the sources of copies that the computing stream has been told to wait for. Where more than
        two wait for a thread that writes, the computation waits for the oldest."""
        with self.lock:
            self.drain()
            alive = [(ref, held) for ref in self._unsettled if (held := ref()) is not None]
            self._unsettled = []
            for number, (ref, held) in enumerate(alive):
                if not held.settle(wait=len(alive) - number > _UNWRITTEN):
                    self._unsettled.append(ref)

    def drain(self) -> None:
        """Free the room of checkpoints that nothing refers to."""
        for _ in range(len(self.dead)):
            tier, nbytes, stored, source, incoming = self.dead.popleft()
            if stored is not None:
                try:
                    if source is not None and not stored.settle(wait=False):
                        self.dead.append((tier, nbytes, stored, source, incoming))
                        continue
                    if incoming is not None:
                        stored.arrive()
                except SpillError:
                    pass  # nobody wants it any more
                stored.free()
            self.in_use[tier] -= nbytes

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes of each tier: in use, the most in use so far, and the budget."""
        with self.lock:
            self.drain()
            limits = {tier: getattr(self.budgets, tier.value) for tier in Tier}
            return {
                tier.value: {"in_use": self.in_use[tier], "peak": self.peak[tier], "budget": limits[tier]}
                for tier in Tier
            }

    def host_bytes(self) -> int:
        """Bytes of host memory that the pools have taken from the system."""
        pools = [mover.blocks for tier, mover in self._tiers.items() if tier is not Tier.DISK]
        return sum(pool.made * pool.block_bytes for pool in pools)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {in_gb(row['in_use'])} of {in_gb(row['budget'])}" for name, row in self.report().items()
        )
        return f"The checkpoint store holds: {parts}."

    def close(self) -> None:
        """End the thread, remove the file and free the pools; checkpoints that are left are lost."""
        with self.lock:
            for mover in self._tiers.values():
                mover.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a CheckpointStore holds the tensors of a running step and is neither copied nor pickled"
        )
