"""Room for checkpoints in equal blocks: on the host, pinned or pageable, and in a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockPool", "Blocks", "Span", "SpillFile", "bytes_of", "pinned"]


class Span(NamedTuple):
    """Part of a block: its number, where in the block it begins, and how many bytes it has."""

    block: int
    offset: int
    nbytes: int


class Blocks:
    """Which bytes of equal blocks are taken. A taking is spread over as many blocks as it needs, and shares
    its last one with the next, so that nothing is lost at the ends. A block is free again when all in it is
    given back.

    block_bytes: a power of two. most: how many blocks there may be.
    """

    def __init__(self, name: str, block_bytes: int, budget: int) -> None:
        if block_bytes < 1 or block_bytes & (block_bytes - 1):
            raise ValueError(f"block_bytes: got {block_bytes}, expected a power of two")
        if 0 < budget < block_bytes:
            raise ValueError(
                f"{name}: got a budget of {budget} bytes, expected 0 or at least one block of {block_bytes}"
                f" bytes; raise the budget or lower block_bytes"
            )
        if budget < 0:
            raise ValueError(f"{name}: got a budget of {budget} bytes, expected 0 or more")
        self.block_bytes, self.most = block_bytes, budget // block_bytes
        self._parts: list[int] = []  # of each block, how many spans are taken
        self._free: list[int] = []  # blocks of which nothing is taken
        self._open: tuple[int, int] | None = None  # the block that the next span continues, and where

    @property
    def room(self) -> int:
        """Bytes that can still be taken."""
        rest = 0 if self._open is None else self.block_bytes - self._open[1]
        return (len(self._free) + self.most - len(self._parts)) * self.block_bytes + rest

    @property
    def made(self) -> int:
        """Blocks that exist."""
        return len(self._parts)

    def take(self, nbytes: int) -> list[Span] | None:
        """Spans of together `nbytes`; None, with nothing taken, where there is no room."""
        if nbytes > self.room:
            return None
        spans: list[Span] = []
        while nbytes:
            block, offset = self._open or (self._next(), 0)
            if block < 0:
                self.give(spans)
                return None
            size = min(nbytes, self.block_bytes - offset)
            self._parts[block] += 1
            spans.append(Span(block, offset, size))
            self._open = (block, offset + size) if offset + size < self.block_bytes else None
            nbytes -= size
        return spans

    def give(self, spans: list[Span]) -> None:
        """Take back what `take` gave."""
        for block, _, _ in spans:
            self._parts[block] -= 1
            if self._parts[block]:
                continue
            if self._open is not None and self._open[0] == block:
                self._open = None
            self._free.append(block)

    def _next(self) -> int:
        """A block of which nothing is taken, the lowest first; -1 where another one cannot be made."""
        if self._free:
            self._free.sort(reverse=True)
            return self._free.pop()
        if len(self._parts) >= self.most or not self.make():
            self.most = len(self._parts)
            return -1
        self._parts.append(0)
        return len(self._parts) - 1

    def make(self) -> bool:
        """Make one more block; whether that worked."""
        return True


class BlockPool(Blocks):
    """Blocks of host memory, each made when it is first needed and kept until the pool is dropped.

    Pinned memory is rounded up to a power of two by torch: a block, which is one, loses nothing.

    allocate: gives a uint8 tensor of so many bytes, or raises RuntimeError or MemoryError where there are
    none; the pool is then as large as it has become, and `shortage` says why.
    """

    def __init__(
        self, name: str, block_bytes: int, budget: int, *, allocate: Callable[[int], Tensor] | None = None
    ) -> None:
        super().__init__(name, block_bytes, budget)
        self.tensors: list[Tensor] = []
        self.shortage: str | None = None
        self._allocate = allocate or _pageable

    def make(self) -> bool:
        try:
            self.tensors.append(self._allocate(self.block_bytes))
        except (RuntimeError, MemoryError) as error:
            lines = str(error).splitlines() or ["no memory"]
            self.shortage = f"{type(error).__name__}: {lines[0]}"
            return False
        return True

    def at(self, span: Span) -> Tensor:
        """The span's bytes, uint8 [nbytes]."""
        return self.tensors[span.block][span.offset : span.offset + span.nbytes]

    def write(self, span: Span, data: Tensor) -> None:
        """Copy uint8 [nbytes] of the host into the span."""
        self.at(span).copy_(data)

    def read(self, span: Span, data: Tensor) -> None:
        """Copy the span into uint8 [nbytes] of the host."""
        data.copy_(self.at(span))


def _pageable(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def pinned(nbytes: int) -> Tensor:
    """Page-locked bytes, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class SpillFile(Blocks):
    """A temporary file without a name, which disappears with the process, however that ends. One thread at a
    time may read and write."""

    def __init__(self, directory: Path | str | None, block_bytes: int, budget: int) -> None:
        super().__init__("disk", block_bytes, budget)
        self.directory = Path(directory) if directory is not None else Path(tempfile.gettempdir())
        self._file = None

    def _opened(self):
        if self._file is None:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 (it is closed by `close`)
                dir=self.directory, buffering=0, prefix="peftkern-"
            )
        return self._file

    def write(self, span: Span, data: Tensor) -> None:
        """Write uint8 [nbytes]; raises OSError, of a full disk with errno ENOSPC."""
        file, view = self._opened(), bytes_of(data)
        file.seek(span.block * self.block_bytes + span.offset)
        while view:
            view = view[file.write(view) :]

    def read(self, span: Span, data: Tensor) -> None:
        """Fill uint8 [nbytes]; raises EOFError where the file ends before."""
        file, view = self._opened(), bytes_of(data)
        file.seek(span.block * self.block_bytes + span.offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise EOFError(f"the spill file in {self.directory} ends {len(view)} bytes early")
            view = view[count:]

    def fileno(self) -> int:
        return self._opened().fileno()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def free_on_disk(self) -> int:
        """Bytes that the file system has left."""
        stat = os.statvfs(self.directory) if hasattr(os, "statvfs") else None
        return 1 << 62 if stat is None else stat.f_bavail * stat.f_frsize


def bytes_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to be read and written in place; the tensor must be kept
    alive."""
    array = (ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr())
    return memoryview(array).cast("B")
