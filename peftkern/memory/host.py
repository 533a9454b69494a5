"""How much memory this process may use on the host: the limit of its cgroup, and what the machine has
left."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["host_available", "host_limit", "in_wsl", "pinned_limit", "private_bytes"]

_WSL_PINNED = 768 << 20  # WSL2 pins about 0.75 to 1 GiB in all
_PINNED_SHARE = 0.8  # of what is available; the rest stays for what cannot be locked in memory


def host_available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take before the kernel kills it: the smaller of what the machine has
    available and what is left in every cgroup around the process. `root` is where /proc and /sys are."""
    left = [limit - used for limit, used in _cgroups(root)]
    machine = _meminfo(root, "MemAvailable")
    if machine is None:
        machine = _of_psutil()
    return max(0, min([machine, *left]))


def host_limit(root: Path = Path("/")) -> int:
    """Bytes that all of this process may take: the smaller of the machine's memory and its cgroups'
    limits."""
    machine = _meminfo(root, "MemTotal")
    if machine is None:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _cgroups(root))])


def private_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process has to itself: its anonymous pages, without those of files it maps, which the
    kernel can take back."""
    lines = (root / "proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def in_wsl(root: Path = Path("/")) -> bool:
    """Whether this is Windows' Linux, whose driver pins far less than the memory there is."""
    try:
        return "microsoft" in (root / "proc/version").read_text().lower()
    except OSError:
        return False


def pinned_limit(available: int, root: Path = Path("/")) -> int:
    """Bytes of `available` host memory that may be pinned."""
    return min(available, _WSL_PINNED) if in_wsl(root) else int(available * _PINNED_SHARE)


def _meminfo(root: Path, key: str) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _of_psutil() -> int:
    """Where there is no /proc: accelerate, which transformers' trainers need, brings psutil."""
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return psutil.virtual_memory().available


def _cgroups(root: Path) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each cgroup around this process that limits memory; files in use that the
    kernel can drop do not count as used."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names = ("memory.max", "memory.current", "inactive_file")
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        found += _upwards(base, path, *names)
    return found


def _upwards(base: Path, path: str, limit: str, usage: str, inactive: str) -> list[tuple[int, int]]:
    """Of the group and its parents. In a container the path may be the host's: then the base alone is
    there."""
    group, found = base / path.lstrip("/"), []
    for folder in (group, *group.parents):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            found.append((most, max(0, used - _stat(folder / "memory.stat", inactive))))
        if folder == base:
            return found
    return found


def _number(path: Path) -> int | None:
    """None where there is no such file or no limit ("max", or version 1's number beyond any memory)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)
