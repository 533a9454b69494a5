"""`peftkern env`: versions, CPU, threads, backends and a smoke check, to be copied into a bug report."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import functional
from .ops.dequantize import reference
from .runtime import backends

__all__ = ["main", "report", "smoke_check"]

_PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "accelerate", "trl", "datasets")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def main(args: object = None) -> int:
    """Print the report; the exit status is 1 where the smoke check fails."""
    text, ok = _compose()
    print(text)
    return 0 if ok else 1


def report() -> str:
    """The report as text: no paths of this machine, no environment variable beyond PEFTKERN_* and the thread
    settings."""
    return _compose()[0]


def smoke_check() -> float:
    """Quantize a weight and run `qlora_linear` forward and backward; the largest error of y and the gradients
    against plain fp64 PyTorch, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    weight = functional.quantize_4bit(torch.randn(96, 128, generator=generator))
    x, a, b = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 128), (8, 128), (96, 8))
    )
    y = functional.qlora_linear(x, weight, lora_a=a, lora_b=b, scaling=0.5)
    got = (y, *torch.autograd.grad(y.square().sum(), (x, a, b)))
    absmax = (
        weight.absmax,
        weight.absmax_8bit,
        weight.absmax_code,
        weight.nested_absmax,
        weight.absmax_offset,
    )
    dense = reference.dequantize_4bit(
        weight.packed, weight.code, *absmax, weight.shape, 64, 256, torch.float32
    ).double()
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    y64 = x64 @ dense.t() + 0.5 * (x64 @ a64.t() @ b64.t())
    expected = (y64, *torch.autograd.grad(y64.square().sum(), (x64, a64, b64)))
    return max(_error(g, e) for g, e in zip(got, expected, strict=True))


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def _compose() -> tuple[str, bool]:
    smoke, ok = _smoke()
    rows = [*_versions(), *_machine(), *_backends(), *_variables(), ("smoke check", smoke)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {_anonymous(value)}" for name, value in rows), ok


def _smoke() -> tuple[str, bool]:
    try:
        error = smoke_check()
    except Exception as failure:  # the report must come out, whatever is broken
        return f"FAILED: {type(failure).__name__}: {failure}", False
    ok = error < 1e-4  # fp32 sums of 128 terms, fifty times over
    return (
        f"{'ok' if ok else 'FAILED'}, max error {error:.1e} (quantize, qlora_linear forward and "
        "backward against fp64)",
        ok,
    )


def _versions() -> list[tuple[str, str]]:
    from . import __version__

    rows = [
        ("peftkern", __version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
    ]
    return rows + [(name, _version(name)) for name in _PACKAGES]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    return [
        (
            "system",
            (
                f"{platform.system()} {platform.release()} {platform.machine()}, "
                f"{' '.join(platform.libc_ver())}"
            ).rstrip(", "),
        ),
        (
            "cpu",
            f"{_cpu_model()}, {os.cpu_count()} logical cores, torch uses "
            f"{torch.backends.cpu.get_cpu_capability()}",
        ),
        ("cuda device", cuda),
        ("threads", f"torch {torch.get_num_threads()}, {_openmp()}"),
    ]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _openmp() -> str:
    settings = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    return (
        f"OpenMP {'available' if torch.backends.openmp.is_available() else 'missing'} "
        f"({', '.join(settings) or 'default settings'})"
    )


def _backends() -> list[tuple[str, str]]:
    from . import bnb_backend

    with contextlib.suppress(Exception):  # its import runs the entry point; without it the state says so
        importlib.import_module("bitsandbytes")
    rows = [("isa", _isa()), ("cores", _cores()), ("limits of this CPU", _limits())]
    for name in backends.BACKENDS:
        rows += [(f"backend {name}{where}", answer) for where, answer in _answers(name)]
    registered, reason = bnb_backend.state()
    return [*rows, ("bitsandbytes hook", f"{'on' if registered else 'off'}: {reason}")]


def _cores() -> str:
    ok, _ = backends.available("cpu")
    if not ok:
        return "not measured, the native extension is missing"
    distance = backends.native().core_distance()
    return f"{distance or 'unknown'} ns from the first thread to the last and back"


def _answers(name: str) -> list[tuple[str, str]]:
    """Whether a backend can be used, and why (not): once where every CUDA device is served alike."""
    found = [backends.available(name, index) for index in range(torch.cuda.device_count())]
    if len(set(found)) < 2:
        found = [backends.available(name)]
    names = [f", cuda:{index}" for index in range(len(found))] if len(found) > 1 else [""]
    return [
        (where, f"{'yes' if ok else 'no'}: {reason}")
        for where, (ok, reason) in zip(names, found, strict=True)
    ]


def _isa() -> str:
    if not backends.available("cpu")[0]:
        return "none, the native extension is missing"
    native = backends.native()
    levels: Callable[[], Any] | None = getattr(native, "isas", None)
    return f"{native.isa()}" + (f" (of {', '.join(levels())})" if levels is not None else "")


def _limits() -> str:
    """Where the CPU's choice between kernels comes from."""
    from .ops.linear import cpu_rows

    return cpu_rows.row(backends.native().isa()).measured if backends.available("cpu")[0] else "none"


def _variables() -> list[tuple[str, str]]:
    found = sorted((name, value) for name, value in os.environ.items() if name.startswith("PEFTKERN_"))
    return found or [("PEFTKERN_*", "none set")]


def _anonymous(text: str) -> str:
    """Without the paths of this machine: where the package lies, and the home folder."""
    home = str(Path.home())
    text = text.replace(str(Path(__file__).parent), "peftkern")
    return text.replace(home, "~") if len(home) > 1 else text
