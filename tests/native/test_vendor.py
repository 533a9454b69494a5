"""examples/vendor_c compiled as a third party would, and run on every level this CPU has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from peftkern.runtime import backends

from .compiled import CSRC, CXX

EXAMPLE = CSRC.parent / "examples" / "vendor_c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the example's Makefile in a folder of its own, -O1 for the compiler's sake."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path_factory.mktemp("vendor")
    for name in ("main.c", "Makefile"):
        shutil.copy(EXAMPLE / name, folder)
    command = [
        "make",
        "-C",
        str(folder),
        "-j2",
        f"CSRC={CSRC}",
        f"CXX={' '.join(CXX)}",
        "CXXFLAGS=-O1 -Wall -Wextra",
        "example",
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    own = [
        line for line in built.stderr.splitlines() if "warning:" in line and "maybe-uninitialized" not in line
    ]
    assert not own, own
    return folder / "example"


def test_it_checks_its_own_results(program: Path) -> None:
    levels = backends.native().isas() if backends.available("cpu")[0] else ["baseline"]
    for level in levels:
        run = subprocess.run(
            [program],
            env=os.environ | {"PEFTKERN_CPU_ISA": level},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"ISA {level}:" in run.stdout


def test_it_links_neither_python_nor_torch(program: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in libraries or "libomp" in libraries
    assert "python" not in libraries and "torch" not in libraries


def test_no_source_but_the_bindings_knows_python_or_torch() -> None:
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".c", ".cpp", ".cu", ".cuh")]
    bindings = ("bindings.h", "bindings_calls.h", "bindings.cpp", "bindings_cuda.cpp")
    sources = [path for path in sources if path.name not in bindings]
    assert CSRC / "cpu" / "dispatch.cpp" in sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        foreign = [
            line
            for line in includes
            if any(word in line for word in ("Python.h", "pybind11", "torch", "ATen", "c10"))
        ]
        assert not foreign, f"{path.name}: {foreign}"
