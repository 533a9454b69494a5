"""What compute-sanitizer watches launches every kernel of the sources: Triton's launches are noted and not
carried out, the CUDA C++ kernels run in the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from triton.runtime import interpreter  # noqa: E402

from benchmarks.gpu import every_kernel  # noqa: E402
from peftkern.ops.linear import cuda, gpu  # noqa: E402
from peftkern.runtime import backends  # noqa: E402
from peftkern.runtime.native import DTYPES  # noqa: E402

from .emulated import launched_kernels  # noqa: E402


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the Triton kernels launched; what they would have computed is compared with nothing."""
    if not backends.interpreted():
        pytest.skip(
            "a CUDA device is present: `python -m benchmarks.gpu --part sanitizer` counts the launches"
        )
    names: set[str] = set()
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *_, **__: names.add(self.fn.__name__)
    )
    for name in ("_compare", "_equal"):
        monkeypatch.setattr(every_kernel, name, lambda *_: None)
    return names


def test_every_triton_kernel_is_launched(noted: set[str]) -> None:
    assert every_kernel.run_all("cpu", quick=True) > 100
    assert every_kernel.missing(noted)[1] == set()


def test_every_cuda_kernel_is_launched(
    noted: set[str],
    emulated: ctypes.CDLL,
    emulated_path: Path,
    emulated_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plans are made as for a card of 8.6 with the CUDA kernels built, of the CPU's tensors."""
    monkeypatch.setattr(backends, "available", lambda *_: (True, "emulated"))
    monkeypatch.setattr(backends, "_check_forced", lambda *_: None)
    monkeypatch.setattr(gpu, "use_cuda_kernels", lambda _: backends.forced() == "cuda")
    monkeypatch.setattr(
        cuda,
        "mma_supported",
        lambda x, quant, n, k: (
            quant[0] is not None and emulated_module.mma_4bit_supported(DTYPES[x.dtype], n, k, quant[6], 86)
        ),
    )
    every_kernel.run_all("cpu", quick=True)
    assert every_kernel.missing(launched_kernels(emulated, emulated_path))[0] == set()
