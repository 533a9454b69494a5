"""The emulated kernels under AddressSanitizer: no thread reads or writes outside a tensor or outside the
block's shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..native.compiled import CSRC, CXX

TESTS = ["test_emulation.py", "test_dequantize.py", "test_quantize.py", "test_gemv.py", "test_mma.py"]


def _runtime() -> str | None:
    """AddressSanitizer's runtime, which the interpreter must load before anything else allocates, and
    libstdc++ for its interceptors."""
    if shutil.which(CXX[0]) is None:
        return None
    libraries = [
        subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(libraries) if all(Path(path).is_absolute() for path in libraries) else None


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_no_access_is_out_of_bounds(name: str) -> None:
    runtime = _runtime()
    if runtime is None:
        pytest.skip("AddressSanitizer's runtime was not found (Debian and Ubuntu: apt install libasan8)")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PEFTKERN_EMULATION_FLAGS": "-fsanitize=address -g",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        f"tests/cuda/{name}",
    ]
    done = subprocess.run(
        command, cwd=CSRC.parent, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
