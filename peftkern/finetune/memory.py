"""Peak and current memory of this process, or of its GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["current_memory", "out_of_memory", "peak_memory"]


def _status_bytes(key: str) -> int | None:
    """One figure of /proc/self/status; ru_maxrss will not do, as a child inherits its parent's across
    exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory() -> int:
    """Bytes: CUDA's peak allocation where there is a GPU, else the resident-set peak of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") or _max_rss()


def current_memory() -> int:
    """Bytes in use now, of the same kind as `peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS") or _max_rss()


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is one of the ways in which Python and torch say that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )
