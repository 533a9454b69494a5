"""Interleaved timing on a GPU: every provider checked before it is timed, one that fails is a row with its
error, the rest goes on."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..harness import OURS, Provider
from .run import Case, Row, Run

__all__ = ["Candidate", "Ceilings", "Unavailable", "ceilings", "measure", "rotating", "skipped"]

SAMPLE_MS = 1.0  # a sample repeats a call until it takes about this long: an event's resolution is 0.5 µs
MOST_REPEATS = 50


class Unavailable(RuntimeError):
    """A provider that this machine does not have: a skipped row, not a failure."""


@dataclass(frozen=True)
class Candidate(Provider):
    """A provider with the FLOPs of a call; `calls`: how many operations one `call` runs (a rotation over
    several inputs)."""

    flops: int = 0
    calls: int = 1


Factory = Callable[[], Candidate]


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: GB/s read and written by a copy, TFLOP/s of a bf16 product."""

    copy_gb_s: float
    gemm_tflop_s: float


def skipped(reason: str) -> Factory:
    """A factory for a provider that is not there."""

    def factory() -> Candidate:
        raise Unavailable(reason)

    return factory


def rotating(
    name: str,
    calls: Sequence[Callable[[], Any]],
    check: Callable[[Any], None],
    moved: int = 0,
    flops: int = 0,
) -> Candidate:
    """Several inputs in turn as one candidate, so that none of them is served from the L2; every one's result
    is checked."""

    def judge(results: list[Any]) -> None:
        for result in results:
            check(result)

    return Candidate(name, lambda: [call() for call in calls], judge, moved, flops, len(calls))


def _milliseconds(run: Run, call: Callable[[], Any], repeats: int) -> float:
    """Of one call, over `repeats` calls."""
    if not run.cuda:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats
    if run.flush:
        _flush_buffer(run.l2_bytes).zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


@functools.cache
def _flush_buffer(l2_bytes: int) -> Tensor:
    return torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")


def _graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replays of `call` as a CUDA graph; a replay writes the tensors that it returns."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = call()

    def replay(_inputs: Callable[[], Any] = call) -> Any:
        """`_inputs` keeps alive what the graph reads: the caching allocator unmaps freed blocks when another
        graph is captured."""
        graph.replay()
        return result

    return replay


def _prepare(run: Run, case: Case, factory: Factory) -> Candidate:
    """Built, captured where the case says so, and its result judged: raises where it is wrong."""
    candidate = factory()
    if case.timed == "graph":
        candidate = replace(candidate, call=_graphed(candidate.call))
    result = candidate.call()
    run.sync()
    candidate.check(result)
    return candidate


def _ready(run: Run, case: Case, factories: Mapping[str, Factory]) -> dict[str, Candidate]:
    ready: dict[str, Candidate] = {}
    for name, factory in factories.items():
        try:
            ready[name] = _prepare(run, case, factory)
        except Unavailable as reason:
            run.add(case, name, note=f"skipped: {reason}")
        except Exception as error:
            run.add(case, name, note=f"error: {type(error).__name__}: {' '.join(str(error).split())}"[:300])
            run.check_alive()
    return ready


def measure(run: Run, case: Case, factories: Mapping[str, Factory], *, ours: str = OURS) -> list[Row]:
    """The rows of one case; the order turns by one each round, so that nobody always runs in the caches
    another left behind."""
    if not run.wanted(case):
        return []
    limits = ceilings(run)
    ready = _ready(run, case, factories)
    repeats = {}
    for name, candidate in ready.items():
        first = _milliseconds(run, candidate.call, 1)
        repeats[name] = 1 if run.flush else max(1, min(MOST_REPEATS, round(SAMPLE_MS / max(first, 1e-4))))
    samples: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for number in range(run.rounds if names else 0):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            candidate = ready[name]
            samples[name].append(_milliseconds(run, candidate.call, repeats[name]) / candidate.calls)
    return [_row(run, case, ready[name], samples, ours, limits) for name in ready]


def _row(
    run: Run,
    case: Case,
    candidate: Candidate,
    samples: Mapping[str, list[float]],
    ours: str,
    limits: Ceilings | None,
) -> Row:
    own = samples[candidate.name]
    cuts = statistics.quantiles(own, n=10, method="inclusive") if len(own) > 1 else own * 9
    values: dict[str, Any] = dict(p20=cuts[1], p50=cuts[4], p80=cuts[7])
    if ours in samples:
        values["ratio"] = statistics.median(a / b for a, b in zip(own, samples[ours], strict=True))
    if limits and candidate.moved:
        values["percent_bandwidth"] = 100 * candidate.moved / cuts[4] / 1e6 / limits.copy_gb_s
    if limits and candidate.flops:
        values["percent_gemm"] = 100 * candidate.flops / cuts[4] / 1e9 / limits.gemm_tflop_s
    return run.add(case, candidate.name, **values)


@functools.lru_cache(maxsize=1)
def ceilings(run: Run) -> Ceilings:
    """Measured once a run and kept in its CSV, so that percentages are of the same machine at the same
    time."""
    size, side = (1 << 20, 128) if run.small else (1 << 30, 8192)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = _median(run, lambda: target.copy_(source))
    x, y = (torch.randn(side, side, device=run.device).bfloat16() for _ in range(2))
    product = _median(run, lambda: x @ y)
    found = Ceilings(2 * size / copy / 1e6, 2 * side**3 / product / 1e9)
    run.add(
        Case("ceiling", "copy, read and written", "uint8", m=size),
        "torch",
        **_same(found.copy_gb_s),
        unit="GB/s",
    )
    run.add(
        Case("ceiling", "GEMM", "bfloat16", side, side, side),
        "torch",
        **_same(found.gemm_tflop_s),
        unit="TFLOP/s",
    )
    return found


def _median(run: Run, call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    return statistics.median(_milliseconds(run, call, 1) for _ in range(11))


def _same(value: float) -> dict[str, float]:
    return dict(p20=value, p50=value, p80=value)
