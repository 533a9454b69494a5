"""How a checkpoint's bytes get into a tier and back: on the side stream at once, or by a thread of their
own."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from .blocks import BlockPool, Blocks, Span, SpillFile, bytes_of
from .streams import Streams

__all__ = ["DirectTier", "SpillError", "Stored", "Worker", "WorkerTier", "on_device"]


class SpillError(RuntimeError):
    """A checkpoint could not be written to its tier, or did not come back as it was written."""


class Stored(Protocol):
    """A checkpoint's bytes in a tier."""

    def settle(self, wait: bool) -> bool:
        """Let the computing stream wait for the end of the copy out; whether the source may be dropped then.
        A copy that its thread has not begun is waited for only where `wait` says so."""

    def fetch(self, target: Tensor) -> None:
        """Begin to fill `target`, uint8 [nbytes], once all that the computing stream has now is done."""

    def arrive(self) -> None:
        """Let the computing stream wait for the end of `fetch`."""

    def free(self) -> None:
        """Give the tier its room back."""


class DirectTier:
    """A pool that the side stream copies from and to: pinned memory beside a GPU, any memory on the CPU."""

    def __init__(self, pool: BlockPool, streams: Streams) -> None:
        self.pool, self.streams = pool, streams

    @property
    def blocks(self) -> Blocks:
        return self.pool

    def put(self, source: Tensor) -> Stored | None:
        """Begin to copy uint8 [nbytes] out; None where there is no room."""
        spans = self.pool.take(source.nbytes)
        return None if spans is None else _DirectStored(self, spans, source)

    def close(self) -> None:
        self.pool.tensors.clear()


class _DirectStored:
    __slots__ = ("tier", "spans", "copied", "filled")

    def __init__(self, tier: DirectTier, spans: list[Span], source: Tensor) -> None:
        self.tier, self.spans, self.filled = tier, spans, None
        streams = tier.streams
        streams.wait(streams.copy, streams.record(streams.current()))
        for span, part in _parts(spans, source):
            streams.move(tier.pool.at(span), part)
        self.copied = streams.record(streams.copy)

    def settle(self, wait: bool) -> bool:
        self.tier.streams.wait(self.tier.streams.current(), self.copied)
        return True

    def fetch(self, target: Tensor) -> None:
        streams = self.tier.streams
        streams.wait(streams.copy, streams.record(streams.current()))
        for span, part in _parts(self.spans, target):
            streams.move(part, self.tier.pool.at(span))
        self.filled = streams.record(streams.copy)

    def arrive(self) -> None:
        self.tier.streams.wait(self.tier.streams.current(), self.filled)

    def free(self) -> None:
        self.tier.pool.give(self.spans)


class Worker:
    """The thread that writes and reads, in the order of its tasks, and the two staging blocks that the side
    stream fills and empties for it beside a GPU.

    allocate: gives a pinned uint8 tensor of `nbytes`, when it is first needed.
    """

    def __init__(self, streams: Streams, nbytes: int, allocate: Callable[[int], Tensor]) -> None:
        self.streams, self._nbytes, self._allocate = streams, nbytes, allocate
        self._staging: list[Tensor] = []
        self._busy: list[Any] = [None, None]  # until which event the side stream reads a staging block
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Let the thread do it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="peftkern-memory")
        return self._executor.submit(work, *args)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
        self._staging.clear()

    def staging(self, index: int, nbytes: int) -> Tensor:
        """In the thread: one of the two blocks, when the side stream reads it no longer."""
        if not self._staging:
            try:
                self._staging = [self._allocate(self._nbytes) for _ in range(2)]
            except RuntimeError:  # no memory can be pinned: the side stream's copies wait, in this thread
                self._staging = [torch.empty(self._nbytes, dtype=torch.uint8, device="cpu") for _ in range(2)]
        number = index % 2
        if self._busy[number] is not None:
            self.streams.finish(self._busy[number])
            self._busy[number] = None
        return self._staging[number][:nbytes]

    def load(self, index: int, part: Tensor) -> tuple[Tensor, Any]:
        """In the thread: let the side stream copy a part of a tensor out; where to, and when that is done."""
        data = self.staging(index, part.nbytes)
        self.streams.move(data, part)
        return data, self.streams.record(self.streams.copy)

    def unload(self, index: int, part: Tensor, data: Tensor) -> Any:
        """In the thread: let the side stream copy a staging block into a part of a tensor; when that is
        done."""
        self.streams.move(part, data)
        self._busy[index % 2] = event = self.streams.record(self.streams.copy)
        return event


class WorkerTier:
    """A pool or a file that a thread writes and reads, so that the computing thread waits for neither.

    verified: whether each block's checksum is kept and compared.
    """

    def __init__(self, medium: BlockPool | SpillFile, worker: Worker, verified: bool) -> None:
        self.medium, self.worker, self.verified = medium, worker, verified
        self.streams = worker.streams

    @property
    def blocks(self) -> Blocks:
        return self.medium

    def put(self, source: Tensor) -> Stored | None:
        """Let the thread copy uint8 [nbytes] out; None where there is no room."""
        spans = self.medium.take(source.nbytes)
        return None if spans is None else _WorkerStored(self, spans, source)

    def close(self) -> None:
        self.worker.close()
        if isinstance(self.medium, SpillFile):
            self.medium.close()
        else:
            self.medium.tensors.clear()

    def write(self, spans: list[Span], source: Tensor, produced: Any) -> tuple[Any, list[int]]:
        """In the thread: copy the source into the spans; the side stream's last event, and the checksums."""
        parts, sums, event = _parts(spans, source), [], None
        if not self.streams.asynchronous:
            return None, [self._write(span, part) for span, part in parts]
        with self.streams.thread():
            self.streams.wait(self.streams.copy, produced)
            ahead = self.worker.load(0, parts[0][1])
            for index, (span, _) in enumerate(parts):
                data, event = ahead
                if index + 1 < len(parts):
                    ahead = self.worker.load(index + 1, parts[index + 1][1])
                self.streams.finish(event)
                sums.append(self._write(span, data))
        return event, sums

    def read(self, spans: list[Span], target: Tensor, sums: list[int], ready: Any) -> Any:
        """In the thread: fill the target from the spans; the side stream's last event."""
        parts, event = zip(_parts(spans, target), sums, strict=True), None
        with self.streams.thread():
            self.streams.wait(self.streams.copy, ready)
            for index, ((span, part), checksum) in enumerate(parts):
                if not self.streams.asynchronous:
                    self._read(span, part, checksum)
                    continue
                data = self.worker.staging(index, part.nbytes)
                self._read(span, data, checksum)
                event = self.worker.unload(index, part, data)
        return event

    def _write(self, span: Span, data: Tensor) -> int:
        try:
            self.medium.write(span, data)
        except OSError as error:
            raise SpillError(_write_failure(self.medium, error)) from error
        return zlib.crc32(bytes_of(data)) if self.verified else 0

    def _read(self, span: Span, data: Tensor, checksum: int) -> None:
        try:
            self.medium.read(span, data)
        except (OSError, EOFError) as error:
            raise SpillError(f"the spill file could not be read: {error}; {_LOST}") from error
        if self.verified and zlib.crc32(bytes_of(data)) != checksum:
            raise SpillError(
                f"block {span.block} of the spill file in {self.medium.directory} came back with another"
                f" checksum than it was written with; {_LOST}. Check the disk, or give another `directory`"
            )


_LOST = "the step is lost, and nothing was trained on it"


class _WorkerStored:
    __slots__ = ("tier", "spans", "written", "filled")

    def __init__(self, tier: WorkerTier, spans: list[Span], source: Tensor) -> None:
        self.tier, self.spans, self.filled = tier, spans, None
        produced = tier.streams.record(tier.streams.current())
        self.written = tier.worker.submit(tier.write, spans, source, produced)

    def settle(self, wait: bool) -> bool:
        if not wait and not self.written.done():
            return False
        event, _ = self.written.result()
        if event is not None:
            self.tier.streams.wait(self.tier.streams.current(), event)
        return True

    def fetch(self, target: Tensor) -> None:
        ready = self.tier.streams.record(self.tier.streams.current())
        self.filled = self.tier.worker.submit(self._read, target, ready)

    def _read(self, target: Tensor, ready: Any) -> Any:
        _, sums = self.written.result()  # done: the thread works in the order of its tasks
        return self.tier.read(self.spans, target, sums, ready)

    def arrive(self) -> None:
        event = self.filled.result()
        if event is not None:
            self.tier.streams.wait(self.tier.streams.current(), event)

    def free(self) -> None:
        self.tier.medium.give(self.spans)


def _parts(spans: list[Span], data: Tensor) -> list[tuple[Span, Tensor]]:
    """Each span with its part of uint8 [nbytes]."""
    return list(zip(spans, data.split([span.nbytes for span in spans]), strict=True))


def _write_failure(medium: BlockPool | SpillFile, error: OSError) -> str:
    where = medium.directory if isinstance(medium, SpillFile) else "memory"
    if error.errno != errno.ENOSPC:
        return f"the spill file in {where} could not be written: {error}; {_LOST}"
    has, most = (count * medium.block_bytes / 1e9 for count in (medium.made, medium.most))
    return (
        f"the disk of {where} is full: the spill file has {has:.2f} GB of the {most:.2f} GB that `disk`"
        f" allows; {_LOST}. Free room there, give another `directory`, or lower `disk` and raise `host`"
    )


def on_device(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor to be filled, allocated on the stream that computes, and its bytes, uint8 [nbytes]."""
    target = torch.empty(shape, dtype=dtype, device=device)
    return target, target.view(-1).view(torch.uint8)
