"""What the machine and the cgroups around the process leave."""

from __future__ import annotations

from pathlib import Path

from peftkern.memory.host import host_available, host_limit, in_wsl, pinned_limit

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {48 * GIB // 1024} kB\n"}


def test_without_a_cgroup_the_machine_counts(tmp_path):
    root = write(tmp_path, MACHINE)
    assert host_available(root) == 48 * GIB and host_limit(root) == 64 * GIB


def test_version_2_counts_what_can_be_dropped_as_free_and_looks_at_parents(tmp_path):
    group = "sys/fs/cgroup/outer"
    root = write(
        tmp_path,
        MACHINE
        | {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{group}/memory.max": f"{16 * GIB}\n",
            f"{group}/memory.current": f"{10 * GIB}\n",
            f"{group}/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
            f"{group}/inner/memory.max": "max\n",
            f"{group}/inner/memory.current": f"{10 * GIB}\n",
        },
    )
    assert host_available(root) == 8 * GIB and host_limit(root) == 16 * GIB


def test_version_1_and_its_number_for_no_limit(tmp_path):
    group = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/\n",
        f"{group}/memory.limit_in_bytes": str((1 << 63) - 4096),
        f"{group}/memory.usage_in_bytes": "0",
        f"{group}/job/memory.limit_in_bytes": str(4 * GIB),
        f"{group}/job/memory.usage_in_bytes": str(5 * GIB),
        f"{group}/job/memory.stat": f"total_inactive_file {3 * GIB}\n",
    }
    root = write(tmp_path, MACHINE | files)
    assert host_available(root) == 2 * GIB and host_limit(root) == 4 * GIB


def test_wsl_pins_little(tmp_path):
    root = write(tmp_path, MACHINE | {"proc/version": "Linux version 5.15 Microsoft standard-WSL2"})
    assert in_wsl(root) and pinned_limit(8 * GIB, root) == 768 << 20
    (root / "proc/version").write_text("Linux version 6.8")
    assert not in_wsl(root) and pinned_limit(10 * GIB, root) == 8 * GIB


def test_here():
    assert 0 < host_available() <= host_limit()
