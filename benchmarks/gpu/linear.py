"""The parts that measure a whole QLoRA linear, forward and backward: its time, its launches, its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

from peftkern.functional import dequantize_4bit, linear_4bit, quantize_4bit

from ..harness import OURS
from ..shapes import Q_8B
from .kernels import TINY, shapes
from .layers import Problem, frozen, linear_factories, steps, weights
from .run import DENSE, Case, Run
from .timing import Unavailable, measure

__all__ = ["cases", "launches", "linear", "memory"]

TRAIN_M = (8192, 2048, 512, 256)
COMPILED_M = (2048, 8192)  # torch.compile takes seconds a shape: with r = 16 and no dropout only
Call = Callable[[], object]
T = TypeVar("T")


def cases(run: Run) -> Iterator[tuple[Case, int, float]]:
    """(case, rank, dropout probability), what the targets name first."""
    for r, dropout_p in ((16, 0.0), (16, 0.1), (64, 0.0), (64, 0.1)):
        for shape in shapes(run):
            for m in (40,) if run.small else TRAIN_M:
                for timed in run.modes():
                    yield (
                        Case(
                            "linear", f"r {r}, dropout {dropout_p:g}", "bfloat16", shape.n, shape.k, m, timed
                        ),
                        r,
                        dropout_p,
                    )


def linear(run: Run) -> None:
    """Forward and backward against a frozen bf16 linear's forward and dx, in the same rounds."""
    for case, r, dropout_p in cases(run):
        if run.wanted(case):
            p = Problem(weights(run.device, case.n, case.k, torch.bfloat16), case.m, r, dropout_p)
            compiled = run.compiled and case.m in COMPILED_M and r == 16 and not dropout_p
            measure(run, case, linear_factories(run, p, compiled=compiled))


def launches(run: Run) -> None:
    """Kernels a call launches, counted by torch.profiler; on a CPU, operators, which only proves the
    script."""
    shape = TINY if run.small else Q_8B
    w = weights(run.device, shape.n, shape.k, torch.bfloat16)
    for m in (40,) if run.small else (1, 16, 128, 2048):
        for dropout_p in (0.0, 0.1):
            p = Problem(w, m, 16, dropout_p)
            for name, build in (steps(run, p) | {DENSE: lambda _: frozen(p)}).items():  # noqa: B023 (used within the loop's turn)
                case = Case(
                    "launches", f"linear, r 16, dropout {dropout_p:g}", "bfloat16", shape.n, shape.k, m, ""
                )
                _count(run, case, name, lambda build=build, q=dropout_p: build(q))
    x = torch.randn(1, shape.k, device=run.device).bfloat16()
    single = {
        "dequantize": lambda: dequantize_4bit(w.packed),
        "quantize": lambda: quantize_4bit(w.dense),
        "decode": lambda: linear_4bit(x, w.packed),
    }
    for name, call in single.items():
        _count(
            run,
            Case("launches", name, "bfloat16", shape.n, shape.k, 1 if name == "decode" else 0, ""),
            OURS,
            lambda call=call: call,
        )


def _count(run: Run, case: Case, provider: str, build: Callable[[], Call]) -> None:
    if not run.wanted(case):
        return
    values = _guarded(run, lambda: _launched(run, build()))
    if isinstance(values, str):
        run.add(case, provider, note=values)
        return
    kernels, copies = values
    count = float(len(kernels))
    unit = "kernels" if run.cuda else "operators"
    note = f"{copies} copies and fills beside them; {'; '.join(kernel[:48] for kernel in kernels)}"[:600]
    run.add(case, provider, p20=count, p50=count, p80=count, unit=unit, note=note)


def _launched(run: Run, call: Call) -> tuple[list[str], int]:
    """Names of the kernels of one warm call, in order, and how many copies and fills the copy engines or
    memset did beside them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    run.sync()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.cuda else [])]
    ) as profiler:
        call()
        run.sync()
    wanted = DeviceType.CUDA if run.cuda else DeviceType.CPU
    events = [
        e
        for e in profiler.events()
        if e.device_type == wanted and not getattr(e, "is_user_annotation", False)
    ]
    events.sort(key=lambda e: e.time_range.start)
    kernels = [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    return kernels, len(events) - len(kernels)


def _guarded(run: Run, work: Callable[[], T]) -> T | str:
    try:
        return work()
    except Unavailable as reason:
        return f"skipped: {reason}"
    except Exception as error:
        run.check_alive()
        return f"error: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def memory(run: Run) -> None:
    """Bytes saved for backward (autograd's own count), bytes really held between the two, and the peak above
    what was there before."""
    for shape in shapes(run):
        w = weights(run.device, shape.n, shape.k, torch.bfloat16)
        for m in (40,) if run.small else (2048, 8192):
            for dropout_p in (0.0, 0.1):
                p = Problem(w, m, 16, dropout_p)
                for name, build in (steps(run, p) | {DENSE: lambda _: frozen(p)}).items():  # noqa: B023 (used within the loop's turn)
                    case = Case("memory", f"r 16, dropout {dropout_p:g}", "bfloat16", shape.n, shape.k, m, "")
                    _bytes(run, case, name, lambda build=build, q=dropout_p: build(q))


def _bytes(run: Run, case: Case, provider: str, build: Callable[[], Call]) -> None:
    if not run.wanted(case):
        return
    values = _guarded(run, lambda: _measured_bytes(run, build()))
    for what, size in {"saved": values}.items() if isinstance(values, str) else values.items():
        named = Case(case.what, f"{what}, {case.mode}", case.dtype, case.n, case.k, case.m, "")
        if isinstance(size, str):
            run.add(named, provider, note=size)
        else:
            run.add(named, provider, p20=size / 1e6, p50=size / 1e6, p80=size / 1e6, unit="MB")


def _measured_bytes(run: Run, call: Call) -> dict[str, float]:
    """saved: what saved_tensors_hooks see, each storage once, inputs included; peak: of a forward and
    backward, results included."""
    call()
    run.sync()
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held: list[int] = []
    with saved_tensors_hooks(keep, lambda t: (held.append(_allocated(run)), t)[1]):
        before = _allocated(run)
        if run.cuda:
            torch.cuda.reset_peak_memory_stats()
        call()
        run.sync()
    found = {"saved": float(sum(storages.values()))}
    if not run.cuda:
        return found
    return found | {
        "held at the backward's start": float(held[0] - before),
        "peak": float(torch.cuda.max_memory_allocated() - before),
    }


def _allocated(run: Run) -> int:
    return torch.cuda.memory_allocated() if run.cuda else 0
