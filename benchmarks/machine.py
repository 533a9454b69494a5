"""What ran, on what, and who else used the CPU meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import os
import platform
import time
from pathlib import Path

from peftkern.runtime.backends import native

__all__ = ["BUSY_CORES", "Load", "describe", "device", "peak_mb", "reset_peak", "resident_mb", "versions"]

# more of other processes' CPU than this spoils a measurement on two cores (spinning barriers wait in steps of
# 8 ms)
BUSY_CORES = 0.1
_PACKAGES = ("torch", "bitsandbytes", "peft", "transformers")


@functools.cache
def device() -> str:
    """The CPU's model name, with the number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} logical cores"


@functools.cache
def versions() -> str:
    from peftkern import __version__

    found = [f"peftkern {__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def describe() -> tuple[str, str, int, str]:
    """The columns device, isa, threads, versions."""
    import torch

    from peftkern.runtime import backends

    return (
        device(),
        backends.native().isa() if backends.available("cpu")[0] else "none",
        torch.get_num_threads(),
        versions(),
    )


def _busy_seconds() -> float | None:
    """CPU seconds all processes of the machine have used since boot."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


class Load:
    """Cores that other processes used between its making and `cores()`, and how far apart ours were at
    either: a virtual machine's are moved, and what they share then takes up to five times as long."""

    def __init__(self) -> None:
        self._distance = native().core_distance()
        self._start, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        busy = _busy_seconds()
        elapsed = time.perf_counter() - self._start
        if busy is None or self._busy is None or elapsed < 0.05:  # the counters tick a hundred times a second
            return None
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / elapsed

    def words(self) -> str:
        """For the CSV: the load average, a round trip between our cores before and after, other processes'
        cores, and BUSY where they are too many."""
        average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        cores = self.cores()
        others = "unknown" if cores is None else f"{cores:.2f} cores{' BUSY' if cores > BUSY_CORES else ''}"
        apart = f"{self._distance} to {native().core_distance()} ns"
        return f"average {average:.2f}; cores apart {apart}; others {others}"


def reset_peak() -> bool:
    """Let the process's peak resident size start from now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


def peak_mb() -> float:
    """Peak resident size in MB since `reset_peak` (or the start)."""
    import resource

    found = _status_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 if found is None else found


def resident_mb() -> float:
    """Resident size in MB now, after what is free has been given back to the system; nan where that cannot be
    told."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    found = _status_mb("VmRSS")
    return float("nan") if found is None else found
