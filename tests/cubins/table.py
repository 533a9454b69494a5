"""python -m tests.cubins.table: what every kernel needs of the hardware, as compiled here; no GPU takes part.

python -m tests.cubins.table                          # each kernel's main variant, by architecture
python -m tests.cubins.table --all --arch 86 89       # every variant
python -m tests.cubins.table --write docs/gpu-kernels.md   # puts the short tables between the page's markers
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.pages import put
from peftkern.runtime.targets import nearest, occupancy

from . import harness, nvcc
from .worker import Facts, Job

__all__ = ["main"]

KEY = (
    "A cell: registers a thread · KiB of shared memory a block · share of an SM's warps that this lets "
    "run (computed from "
    "`peftkern/runtime/targets.py`) · tensor-core instruction, where there is one · bytes of local memory "
    "a thread, where it spills."
)


def _mma(facts: Facts) -> str:
    return "+".join(facts.mma)


def _cell(facts: Facts, *, occupied: bool = True) -> str:
    share = occupancy(
        nearest(facts.arch), registers=facts.registers, shared=facts.shared, warps=facts.warps
    ).share
    parts = [
        str(facts.registers),
        f"{facts.shared / 1024:.3g}",
        *([f"{share:.0%}"] if occupied else []),
        _mma(facts),
    ]
    return " · ".join(part for part in parts if part) + (f" · {facts.stack} spilled" if facts.stack else "")


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def triton_short(found: dict[Job, Facts], archs: Sequence[int]) -> str:
    """A row a kernel, its main variant; a column an architecture."""
    kernels = dict.fromkeys((job.module, job.kernel) for job in found if job.main)
    cells = {(job.module, job.kernel, job.arch): _cell(facts) for job, facts in found.items() if job.main}
    names = {(job.module, job.kernel): job.name for job in found if job.main}
    rows = [
        [
            f"`{kernel.strip('_')}`",
            names.get((module, kernel), ""),
            *(cells.get((module, kernel, a), "") for a in archs),
        ]
        for module, kernel in kernels
    ]
    return _markdown(["Triton kernel", "variant", *(f"sm_{a}" for a in archs)], rows)


def triton_long(found: dict[Job, Facts]) -> str:
    """A row a variant and architecture, with what limits its occupancy and its widest and narrowest loads."""
    header = [
        "kernel",
        "variant",
        "sm",
        "warps",
        "registers",
        "shared",
        "local",
        "blocks/SM",
        "occupancy",
        "limited by",
        "products",
        "FFMA",
        "PRMT",
        "loads",
    ]
    rows = []
    for job, f in found.items():
        room = occupancy(nearest(job.arch), registers=f.registers, shared=f.shared, warps=f.warps)
        products = " ".join(f"{n} {name}" for name, n in f.mma.items())
        loads = " ".join(f"{n} {name}" for name, n in f.loads.items())
        numbers = (
            job.arch,
            f.warps,
            f.registers,
            f.shared,
            f.stack,
            room.blocks,
            f"{room.share:.0%}",
            room.limit,
            products,
            f.fmas,
            f.permutes,
            loads,
        )
        rows.append([job.kernel, job.name, *map(str, numbers)])
    return _markdown(header, rows)


def cuda_short(found: dict[int, list[Facts]]) -> str:
    """A row a kernel, a column an architecture; static shared memory only, as launchers add theirs."""
    cells = {(f.kernel, arch): _cell(f, occupied=False) for arch, kernels in found.items() for f in kernels}
    rows = [
        [f"`{kernel}`", *(cells.get((kernel, arch), "") for arch in found)]
        for kernel in sorted({k for k, _ in cells})
    ]
    return _markdown(["CUDA kernel", *(f"sm_{a}" for a in found)], rows)


def _compile_triton(wanted: Sequence[Job], processes: int) -> tuple[dict[Job, Facts], list[str]]:
    """Facts, and what the compiler said of the others."""
    found: dict[Job, Facts] = {}
    failed: list[str] = []
    with harness.Compiler(processes) as compiler:
        compiler.submit(wanted)
        for job in wanted:
            try:
                found[job] = compiler.facts(job)
            except RuntimeError as error:
                failed.append(str(error))
    return found, failed


def _compile_cuda(archs: Sequence[int]) -> dict[int, list[Facts]]:
    path = nvcc.find()
    if path is None:
        return {}
    known = nvcc.archs(path)
    with tempfile.TemporaryDirectory() as folder:
        return {
            a: [f for s in nvcc.SOURCES for f in nvcc.compile_source(path, s, a, Path(folder))]
            for a in archs
            if a in known
        }


def _versions(cuda: bool) -> str:
    words = f"Triton {importlib.metadata.version('triton')}"
    if cuda:
        told = subprocess.run(
            [str(nvcc.find()), "--version"], check=True, capture_output=True, text=True
        ).stdout
        words += f", nvcc {re.search(r'release ([0-9.]+)', told)[1]}"
    return words


def _page(found: dict[Job, Facts], cuda: dict[int, list[Facts]], archs: Sequence[int]) -> str:
    made = (
        f"Compiled with {_versions(bool(cuda))} by `python -m tests.cubins.table`; derived from machine "
        "code, not measured on a GPU."
    )
    parts = [made, KEY, triton_short(found, archs)]
    if cuda:
        parts += [
            "Shared memory here is the static part; occupancy is the launcher's and is left out.",
            cuda_short(cuda),
        ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cubins.table", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(harness.ARCHS), help="compute capabilities, such as 86 89"
    )
    parser.add_argument(
        "--all", action="store_true", help="every variant, one row each, instead of each kernel's main one"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--no-cuda", action="store_true", help="leave csrc/cuda out")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="replace what is between the markers of this page"
    )
    args = parser.parse_args(arguments)
    wanted = [
        job
        for job in harness.jobs(harness.modules(), args.arch)
        if (args.all or job.main) and args.kernel in job.kernel
    ]
    found, failed = _compile_triton(wanted, args.processes)
    cuda = {} if args.no_cuda else _compile_cuda(args.arch)
    page = triton_long(found) if args.all else _page(found, cuda, args.arch)
    if args.write:
        put(args.write, "cubins", page)
    else:
        print(page)
    for words in failed:
        print(words, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
