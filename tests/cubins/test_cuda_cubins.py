"""Promises of the CUDA kernels' machine code, as of the Triton kernels', from what nvcc makes of
csrc/cuda."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from . import nvcc
from .checks import unfit
from .harness import ARCHS

NVCC = nvcc.find()
pytestmark = pytest.mark.skipif(NVCC is None, reason=nvcc.MISSING)
QUICK_ARCHS = (86,)  # the whole of csrc/cuda, about half a minute an architecture on one core


@dataclass(frozen=True)
class Promise:
    """mma: a tensor-core product; wide: 16-byte loads from global memory."""

    mma: bool = False
    wide: bool = False


# By what a kernel's name begins with; where none applies, it has to fit and to spill nothing. fp32
# dequantization decodes 4 bytes a thread.
PROMISES = {
    "dequantize_16bit": Promise(wide=True),
    "gemv": Promise(wide=True),
    "mma": Promise(mma=True, wide=True),
    "quantize_4bit": Promise(wide=True),
}


def _parameters() -> list:
    every = [(source, arch) for source in nvcc.SOURCES for arch in ARCHS]
    return [
        pytest.param(s, a, id=f"{s}-sm{a}", marks=() if a in QUICK_ARCHS else pytest.mark.slow)
        for s, a in every
    ]


# What csrc/cuda/launch.h leaves of a block's 48 KiB where it does not ask for more.
STATIC_SHARED = 4 << 10


def broken_promises(facts: nvcc.Facts) -> list[str]:
    promise = next((p for prefix, p in PROMISES.items() if facts.kernel.startswith(prefix)), Promise())
    found = unfit(facts)
    no_bf16 = facts.arch < 80 and facts.kernel.endswith(
        ",1>"
    )  # sm_75 has no bf16 product, and the launcher takes no bf16 there
    if facts.shared > STATIC_SHARED:
        found.append(f"{facts.shared} bytes of static shared memory, the launcher counts on {STATIC_SHARED}")
    if promise.mma and not facts.mma and not no_bf16:
        found.append("no tensor-core instruction")
    if promise.wide and not facts.wide:
        found.append(f"no load from global memory is 16 bytes wide: {dict(facts.loads)}")
    return [f"{facts.kernel}: {sentence}" for sentence in found]


@pytest.mark.parametrize(("source", "arch"), _parameters())
def test_machine_code(source: str, arch: int, tmp_path: Path) -> None:
    if arch not in nvcc.archs(NVCC):
        pytest.skip(f"this nvcc does not compile for sm_{arch}")
    kernels = nvcc.compile_source(NVCC, source, arch, tmp_path)
    assert not [sentence for facts in kernels for sentence in broken_promises(facts)]


def test_each_promise_is_of_a_kernel() -> None:
    """A renamed kernel does not slip out of its promise."""
    text = "".join((nvcc.CSRC / "cuda" / source).read_text() for source in nvcc.SOURCES)
    assert not [prefix for prefix in PROMISES if f" {prefix}_kernel(" not in text]


def test_names_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spills, and one that promises what it does not do, are found by name."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "bad.cu").write_text(
        "namespace { template <typename T, int N, bool B> __global__ void __launch_bounds__(1024, 2) "
        "mma_kernel(T* x) {\n"
        "  __shared__ float s[2000];\n  s[threadIdx.x] = x[threadIdx.x];\n"
        "  float v[64];\n  for (int i = 0; i < 64; i++) v[i] = x[i * N];\n  __syncthreads();\n"
        "  for (int j = 0; j < N; j++) for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i * 7 + 1) % 64] "
        "+ x[j];\n"
        "  for (int i = 0; i < 64; i++) x[i] = v[i] + s[i]; } }\n"
        "void launch(float* x) { mma_kernel<float, 8, true><<<1, 1>>>(x); }\n"
    )
    monkeypatch.setattr(nvcc, "CSRC", tmp_path)
    (facts,) = nvcc.compile_source(NVCC, "bad.cu", 86, tmp_path)
    assert facts.kernel == "mma_kernel<f32,8,1>"
    words = " | ".join(broken_promises(facts))
    assert "local memory" in words and "tensor-core" in words and "16 bytes" in words
    assert "static shared memory" in words
