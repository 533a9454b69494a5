"""Which backend serves which CUDA device, proven without one: torch's answers are set by the test."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern
from peftkern import environment
from peftkern.runtime import backends, native_cuda

pytest.importorskip("triton", reason="Triton is not installed here")

BUILT = types.SimpleNamespace(architectures="80;90", versions=lambda: (13000, 13000))


class Devices:
    """What torch says of this machine's CUDA devices; `current` is the one it is asked about by default."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        self.current = 0
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=None: capabilities[i or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=None: f"card {i}")
        monkeypatch.setattr(native_cuda, "_load", lambda: (BUILT, "CUDA kernels for sm_80, sm_90"))
        _forget()


def _forget() -> None:
    for cached in (backends._arch, backends._best, backends._triton, backends._cuda, native_cuda.available):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _caches() -> Iterator[None]:
    yield
    _forget()


def _x(device: str) -> types.SimpleNamespace:
    """As much of a tensor as `select` reads."""
    return types.SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)


def test_each_device_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old display card beside a new one, and one that the CUDA kernels were not built for."""
    devices = Devices(monkeypatch, (6, 1), (9, 0), (7, 5))
    for devices.current in (0, 1):
        served = [backends.select(_x(f"cuda:{index}")) for index in range(3)]
        assert served == ["reference", "cuda", "triton"]
        assert [backends.use_cuda_kernels(_x(f"cuda:{index}")) for index in range(3)] == [False, True, False]
    devices.current = 0
    assert not backends.available("triton")[0] and "sm_61 is older" in backends.available("triton")[1]
    assert "not for this sm_75" in backends.available("cuda", 2)[1]
    assert "sm_61 is older" in backends.served_by(_x("cuda:0"))[1]


def test_a_forced_backend_is_held_to_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Devices(monkeypatch, (6, 1), (9, 0))
    with backends.use_backend("triton"):
        assert backends.select(_x("cuda:1")) == "triton"
        with pytest.raises(RuntimeError, match=r"'cuda:0': Triton .* sm_61 is older than sm_75"):
            backends.select(_x("cuda:0"))
    with pytest.raises(RuntimeError, match="sm_61 is older"):
        Devices(monkeypatch, (6, 1))
        with backends.use_backend("triton"):
            pass


def test_rocm_is_not_taken_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a device is "cuda" too, of capability (9, 4): it gets the reference, and the reason is said."""
    Devices(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    assert backends.select(_x("cuda:0")) == "reference"
    for words in (
        backends.served_by(_x("cuda:0"))[1],
        backends.available("cuda")[1],
    ):  # explain prints the first
        assert "built for ROCm (6.4.2), for which peftkern has no kernels" in words
    with monkeypatch.context() as none, FakeTensorMode():
        none.setattr(torch.cuda, "is_available", lambda: False)  # which torch 2.11 would try to use
        x = torch.empty(4, 64, device="cuda:0", dtype=torch.bfloat16)
    assert peftkern.explain(x, 64, 64).startswith("reference: ")
    assert "built for ROCm (6.4.2)" in peftkern.explain(x, 64, 64)
    report = dict(environment._backends())
    assert report["backend triton"].startswith("no: ") and "ROCm (6.4.2)" in report["backend triton"]
    assert report["backend cuda"].startswith("no: ") and report["backend reference"].startswith("yes")


def test_the_report_names_devices_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    Devices(monkeypatch, (6, 1), (9, 0))
    report = dict(environment._backends())
    assert report["backend triton, cuda:0"].startswith("no: ")
    assert report["backend triton, cuda:1"].startswith("yes: ")
    assert "backend cpu" in report and "backend cpu, cuda:0" not in report
    assert dict(environment._machine())["cuda device"] == "card 0, card 1"
    Devices(monkeypatch, (9, 0), (9, 0))
    assert dict(environment._backends())["backend triton"].startswith("yes: ")


@pytest.mark.parametrize(
    ("arch", "built", "driver", "runtime", "words"),
    [
        (90, "80;90", 13000, 13000, ""),
        (90, "80", 13000, 13000, ""),
        (89, "80", 13000, 13020, ""),  # machine code of 8.0 runs on 8.9, whatever the driver's minor version
        (90, "80", 13000, 13020, "PTX of CUDA 13.2, which a driver for CUDA 13.0 does not compile"),
        (90, "80", 13020, 13000, ""),
        (75, "80", 13020, 13000, "not for this sm_75"),
        (86, "80;90", 13000, 13020, ""),
    ],
)
def test_which_drivers_a_build_runs_on(arch: int, built: str, driver: int, runtime: int, words: str) -> None:
    found = native_cuda._refusal(arch, built, driver, runtime)
    assert words in found if words else found == ""
    assert not found or f"PEFTKERN_CUDA_ARCHS={arch} pip install" in found
