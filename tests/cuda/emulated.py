"""Compiles csrc/cuda/*.cu as plain C++ over the emulator in tests/cuda/emulation, and loads the result
through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..native.compiled import CSRC, compile_objects, link_shared

__all__ = [
    "EMULATION",
    "FLAGS",
    "KERNELS",
    "compile_emulated",
    "declare",
    "launched_kernels",
    "link_emulated_module",
    "load_emulated",
    "load_emulated_module",
]

EMULATION = Path(__file__).parent / "emulation"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = [
    "-DPK_CUDA_EMULATION",
    f"-I{EMULATION}",
    f"-I{CSRC / 'cuda'}",
    "-O1",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
]
# #pragma unroll; the emulator brings the sanitizer's handler
FLAGS += ["-Wno-unknown-pragmas", "-fsanitize=alignment"]
# more flags, for the compiler and the linker
SANITIZERS = os.environ.get("PEFTKERN_EMULATION_FLAGS", "").split()


def compile_emulated(folder: Path, sources: Sequence[Path]) -> Path:
    """A shared library of the emulator and these .cu files."""
    flags = [*FLAGS, *SANITIZERS]
    jobs = [
        *((EMULATION / f"cuda_{name}.cpp", flags) for name in ("on_cpu", "operations")),
        *((source, [*flags, "-x", "c++"]) for source in sources),
    ]
    return link_shared(
        [*compile_objects(folder, jobs), *map(Path, SANITIZERS)], folder / "libpeftkern_emulated.so"
    )


def link_emulated_module(folder: Path, library: Path) -> Path:
    """The Python module over an emulated library: what the launchers call, taking tensors of the CPU."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    source = CSRC / "cuda" / "bindings_cuda.cpp"
    bindings = compile_objects(
        folder, [(source, ["-O0", "-fvisibility=hidden", *includes, '-DPK_CUDA_ARCHS="86"'])]
    )
    return link_shared([*bindings, library], folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")


def load_emulated_module(path: Path) -> ModuleType:
    """That module, whatever its folder."""
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the return types that are not int."""
    for name in ("pk_cuda_status_string", "pk_cuda_error_text"):
        if hasattr(lib, name):
            getattr(lib, name).restype = ctypes.c_char_p
    return lib


def launched_kernels(lib: ctypes.CDLL, path: Path) -> set[str]:
    """The kernels that the library of `path` has launched so far, as C++ names; they are local symbols, which
    only `nm` knows."""
    offsets = (ctypes.c_uint64 * 256)()
    count = lib.pk_emulation_kernels(offsets, len(offsets))
    assert 0 <= count <= len(offsets)
    told = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    lines = (line.split(" ", 2) for line in told.splitlines())
    names = {int(line[0], 16): line[2] for line in lines if len(line) == 3 and line[0]}
    return {names[offset] for offset in offsets[:count]}


def load_emulated(path: Path) -> ctypes.CDLL:
    """An emulated library."""
    lib = declare(ctypes.CDLL(str(path)))
    lib.pk_emulation_launches.restype = lib.pk_emulation_kernels.restype = ctypes.c_int64
    return lib
