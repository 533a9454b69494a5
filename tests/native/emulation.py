"""Builds the kernels with the AVX-512 levels emulated by SIMDe in plain C: any CPU then runs their code,
slowly."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .compiled import CSRC, CXX, compile_objects, link_shared

HERE = Path(__file__).parent
MISSING = (
    "the compiler finds no simde/x86/avx512.h: SIMDe is not installed (Debian and Ubuntu: apt install "
    "libsimde-dev)"
)
# The dispatcher asks the CPU for each level: here it has all those that are linked.
EVERY_LEVEL = ["-D__builtin_cpu_supports(feature)=1", "-DPK_SIMDE"]


def simde_missing() -> bool:
    """Asked of the compiler, wherever it looks. Where there is none the tests are not skipped: building
    fails, as the others' does."""
    if shutil.which(CXX[0]) is None:
        return False
    probe = "#if !__has_include(<simde/x86/avx512.h>)\n#error\n#endif\n"
    return (
        subprocess.run(
            [*CXX, "-E", "-x", "c++", "-"], input=probe, capture_output=True, text=True, check=False
        ).returncode
        != 0
    )


# Of tests on an emulated level.
EMULATED = [
    pytest.mark.skipif(simde_missing(), reason=MISSING),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"),
        reason="the dispatcher has an AVX-512 level on x86-64 only",
    ),
]


def emulated_objects(folder: Path, *, bf16: bool = False) -> list[Path]:
    """Objects of baseline, emulated AVX-512 and the dispatcher, `bf16`: and the two levels with bf16
    products; no flag asks for more than the plain architecture."""
    emulated = ["-O1", "-DPK_SIMDE", "-include", str(HERE / "simde_missing.h")]
    levels = ("avx512", "avx512bf16", "amx") if bf16 else ("avx512",)
    jobs = [
        *((CSRC / "cpu" / f"kernels_{level}.cpp", emulated) for level in levels),
        (CSRC / "cpu" / "kernels_baseline.cpp", ["-O2"]),
        (CSRC / "cpu" / "dispatch.cpp", ["-O1", *EVERY_LEVEL]),
    ]
    return compile_objects(folder, jobs)


def emulated_library(folder: Path) -> Path:
    """The C functions over those objects, for ctypes."""
    return link_shared(emulated_objects(folder), folder / "libpeftkern_emulated.so")


def emulated_extension(folder: Path) -> Path:
    """The Python extension over those objects; loaded as peftkern._C by tests/native/emulated_plugin.py."""
    import sysconfig

    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    bindings = compile_objects(folder, [(CSRC / "bindings.cpp", ["-O1", "-fvisibility=hidden", *includes])])
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if sys.platform != "win32" else ".pyd"
    return link_shared([*emulated_objects(folder), *bindings], folder / f"_C{suffix}")
