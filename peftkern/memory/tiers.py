"""The tiers of the store, how many bytes each may have, and which checkpoint goes where."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from .host import pinned_limit

__all__ = ["Budgets", "StoreFull", "Tier", "assign", "in_gb"]

_HOST_SHARE = 0.9  # of the host memory available, when no budget is stated


class Tier(enum.Enum):
    """Where a checkpoint is, in the order in which the tiers are filled."""

    DEVICE = "device"
    PINNED = "pinned"
    HOST = "host"
    DISK = "disk"


class StoreFull(MemoryError):
    """The budgets have no room for what is to be stored; the message names the least that would do."""


@dataclass(frozen=True)
class Budgets:
    """Bytes that the store may use of each kind of memory.

    device: for checkpoints that stay where they are, beside the one that is being used and the next. pinned:
    host memory that the GPU copies from and to by itself; None: four fifths of what is available (0 without
    a GPU, at most 768 MiB under WSL). host: further, pageable host memory; None: the rest of nine tenths of
    what the machine and the process's cgroup have available. disk: of a temporary file.
    """

    device: int = 0
    pinned: int | None = None
    host: int | None = None
    disk: int = 0

    def resolved(self, asynchronous: bool, available: int, block_bytes: int) -> Budgets:
        """With numbers for what is None: whole blocks of `available` host memory."""
        room = int(available * _HOST_SHARE)
        fixed = self.pinned
        if fixed is None:
            fixed = pinned_limit(room) // block_bytes * block_bytes if asynchronous else 0
        host = self.host
        if host is None:
            host = max(0, room - fixed) // block_bytes * block_bytes
        return Budgets(self.device, fixed, host, self.disk)


def assign(count: int, nbytes: int, room: Mapping[Tier, int]) -> list[Tier] | None:
    """The tier of each of `count` layers' checkpoints of `nbytes`; None where they have no room.

    The last layer's stays on the device and counts for nothing: its backward begins at once. Backward comes
    to the later layers first, so that they get the faster tiers, and the earliest the file, which then has
    the longest time to be written and read.
    """
    tiers = [Tier.DEVICE]
    for tier in Tier:
        fitting = max(0, room.get(tier, 0)) // max(1, nbytes)
        tiers += [tier] * min(fitting, count - len(tiers))
    return tiers[::-1][-count:] if len(tiers) >= count else None


def in_gb(nbytes: int) -> str:
    """For messages."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes} bytes"
