"""What may be used: bytes on the device, on the host, pinned, on the disk; read from the machine or given."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from .cards import Card

__all__ = ["Limits", "bytes_of", "in_bytes", "limits_of"]

_UNITS = {
    "": 1e9,
    "b": 1,
    "k": 1e3,
    "kb": 1e3,
    "m": 1e6,
    "mb": 1e6,
    "g": 1e9,
    "gb": 1e9,
    "t": 1e12,
    "tb": 1e12,
}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SHARE = 0.97  # of what a card has for torch: the rest is lost between blocks


@dataclass(frozen=True)
class Limits:
    """Bytes that one process of a run may use. gpu: with the CUDA context; host: pinned and pageable memory
    together; pinned: of that, the most that can be pinned; disk: for checkpoints.
    """

    gpu: int
    host: int = 1 << 62
    pinned: int = 1 << 62
    disk: int = 0


def bytes_of(text: str, name: str) -> int:
    """`24GiB`, `64GB`, `512 MiB`, or a bare number of GB, as bytes.

    Raises: InputError naming the option `name`.
    """
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    try:
        number, unit = (float(match[1]), _UNITS[match[2]]) if match else (None, None)
    except (ValueError, KeyError):
        number = unit = None
    if not number or unit is None:
        raise InputError(
            f"{name} {text}: expected a size such as 24GiB, 64GB or 512MiB (a bare number is GB)"
        )
    return int(number * unit)


def in_bytes(nbytes: float) -> str:
    """Bytes in the unit that suits them: 23.44 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:,.0f} B"


def limits_of(
    card: Card,
    *,
    ram: int | None = None,
    pinned: int | None = None,
    disk: int | None = None,
    room: int | None = None,
    processes: int = 1,
) -> Limits:
    """The limits of one process: of its card, and its part of this machine's host memory and disk.

    ram, pinned, disk: of the whole machine; read from it where they are not given. room: bytes of the card
    that may be used; default: all that torch can have, less 3 % for the gaps between blocks. processes: of
    the run on this machine, which share its host memory and disk evenly.
    """
    from ..host import host_available, pinned_limit

    ram = host_available() if ram is None else ram
    pinned = pinned_limit(ram) if pinned is None else pinned
    disk = _disk() if disk is None else disk
    host = ram // processes
    gpu = int(card.memory * _SHARE) if room is None else room
    if not card.is_gpu:
        gpu = room or host
    return Limits(gpu, host, min(pinned // processes, host), disk // processes)


def _disk() -> int:
    """Half of what is free where temporary files go."""
    import tempfile

    try:
        return shutil.disk_usage(Path(tempfile.gettempdir())).free // 2
    except OSError:
        return 0
