"""csrc/cuda compiled by nvcc for one architecture, and each kernel's facts, as of Triton's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from . import sass
from .worker import LOADS, Facts

__all__ = ["MISSING", "SOURCES", "archs", "compile_source", "find"]

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = tuple(sorted(path.name for path in (CSRC / "cuda").glob("*.cu")))
MISSING = (
    "setup.py finds no nvcc (CUDA_HOME, PATH, the usual folder, the package nvidia-cuda-nvcc) and builds "
    "no CUDA kernels"
)
FLAGS = ("-O3", "-std=c++17", "--threads=1", "-Xcompiler=-fPIC")  # as setup.py has them


def find() -> str | None:
    """The one that setup.py takes here: where it builds the CUDA kernels, they are tested."""
    probe = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None; "
        "print(runpy.run_path('setup.py')['find_nvcc']() or '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=CSRC.parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() or None


def archs(nvcc: str) -> set[int]:
    """Those it compiles for."""
    words = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", words)}


def _name(mangled: str) -> str:
    """_ZN2pk11gemv_kernelILi4ELb1EEEv... as gemv_kernel<4,1>: a kernel's own name, its number and type
    arguments."""
    rest = mangled.removeprefix("_Z").removeprefix("N")
    while match := re.match(r"\d+", rest):
        length = int(match[0])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
        if name.endswith("_kernel"):
            template = re.match(r"I(.*?)EEv", rest)
            arguments = re.findall(r"L[a-z](\d+)E?|\d([a-z]+\d+)E?|(f)", template[1] if template else "")
            words = [number or kind or "f32" for number, kind, _ in arguments]
            return name + (f"<{','.join(words)}>" if words else "")
    return mangled


def compile_source(nvcc: str, source: str, arch: int, folder: Path) -> list[Facts]:
    """Of every kernel in csrc/cuda/<source>; dynamic shared memory and warps are the launcher's and count as
    0 and 1."""
    cubin = folder / f"{source}.sm{arch}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", str(CSRC / "cuda" / source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    code: dict[str, list[sass.Instruction]] = defaultdict(list)
    for instruction in sass.disassemble(cubin):
        code[instruction.function].append(instruction)
    return [_facts(name, arch, used, code[name]) for name, used in sass.resources(cubin, arch).items()]


def _facts(name: str, arch: int, used: sass.Resources, code: list[sass.Instruction]) -> Facts:
    loads = Counter(i.opcode for i in code if i.opcode.split(".")[0] in LOADS)
    return Facts(
        kernel=_name(name),
        arch=arch,
        warps=1,
        registers=used.registers,
        stack=used.stack,
        shared=used.static_shared,
        instructions=len(code),
        mma=dict(sass.mma(code)),
        local_loads=sass.count(code, "LDL"),
        local_stores=sass.count(code, "STL"),
        permutes=sass.count(code, "PRMT"),
        fmas=sass.count(code, "FFMA", "FFMA2"),
        loads=dict(loads),
        wide={opcode: n for opcode, n in loads.items() if ".128" in opcode},
    )
