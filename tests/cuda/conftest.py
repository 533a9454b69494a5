"""The emulated kernels, compiled once a session and run under several orders of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peftkern.runtime import native_cuda

from ..native.compiled import once
from .device_library import CudaLibrary
from .emulated import (
    EMULATION,
    KERNELS,
    compile_emulated,
    declare,
    link_emulated_module,
    load_emulated,
    load_emulated_module,
)

ORDERS = (0, 1, 2)  # ascending, descending, shuffled: what a missing barrier changes


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library of `emulated`."""
    return once(tmp_path_factory, "cuda_emulated", lambda folder: compile_emulated(folder, KERNELS))


@pytest.fixture(scope="session")
def emulated(emulated_path: Path) -> ctypes.CDLL:
    """Every kernel of csrc/cuda, on the CPU."""
    return load_emulated(emulated_path)


@pytest.fixture(scope="session")
def _emulated_module(emulated_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load_emulated_module(
        once(
            tmp_path_factory,
            "cuda_emulated_module",
            lambda folder: link_emulated_module(folder, emulated_path),
        )
    )


@pytest.fixture
def emulated_module(_emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launchers of ops/*/cuda.py call the emulated kernels, on tensors of the CPU."""
    monkeypatch.setattr(native_cuda, "_load", lambda: (_emulated_module, "emulated"))
    native_cuda.available.cache_clear()
    yield _emulated_module
    native_cuda.available.cache_clear()


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulator with kernels of its own."""
    sources = [EMULATION / "selftest.cu"]
    return load_emulated(
        once(tmp_path_factory, "cuda_selftest", lambda folder: compile_emulated(folder, sources))
    )


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> Iterator[int]:
    """The order in which threads run; a test that takes it calls lib.pk_emulation_order(order)."""
    yield request.param


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_library(request: pytest.FixtureRequest) -> CudaLibrary:
    """The C functions: emulated on the CPU, and with `pytest -m gpu` the built module's on the device."""
    if request.param == "emulated":
        return CudaLibrary(request.getfixturevalue("emulated"), "cpu")
    return CudaLibrary(declare(ctypes.CDLL(native_cuda.native_cuda().__file__)), "cuda")
