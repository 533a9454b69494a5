"""`peftkern tune`: measures on this card where each regime of the QLoRA linear pays, and keeps the limits for
later runs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from . import functional
from .formats.nf4 import NF4Weight
from .ops.qlora_linear import config, tuned
from .ops.qlora_linear.config import GPUConfig
from .runtime import backends

__all__ = ["derive", "main", "measure"]

SQUARE, UP = (4096, 4096), (14336, 4096)  # (N, K) of an 8B Llama's attention and MLP
DECODE_M = (1, 2, 4, 8, 16)
FUSED_M = (16, 32, 64, 128, 256, 512)
SLAB_MIB = (36, 64, 128)
LARGE_M = 2048
ALWAYS = NEVER = 1 << 30  # as an upper and a lower limit of M
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


def main(args: argparse.Namespace) -> int:
    """Measure and save; 1 with the reason where there is nothing to tune."""
    usable, reason = backends.available("triton")
    if not torch.cuda.is_available() or not usable:
        print(
            f"peftkern tune: needs a CUDA device that Triton can use, found none ({reason})", file=sys.stderr
        )
        return 1
    name = torch.cuda.get_device_name()
    if args.forget:
        tuned.forget(name)
        print(f"{name}: back to the table's row")
        return 0
    print(f"{name}: measuring, about a minute", flush=True)
    timings = measure("cuda", cuda_timer, print_row=lambda text: print(text, flush=True))
    row = derive(timings, config.GPU_TABLE[config.nearest_arch(backends.gpu_arch())])
    versions = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "backend": backends.select(torch.empty(1, device="cuda")),
    }
    print(f"{row}\nkept in {tuned.save(name, row, timings, versions)}")
    return 0


def cuda_timer(functions: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each, interleaved: replays of CUDA graphs, as the Python of a call takes longer
    than its kernels do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphs = {name: _captured(f, stream) for name, f in functions.items()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, graph in graphs.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(samples) for name, samples in times.items()}


def _captured(function: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """What `function` launches, its backward included, which runs on the stream of its forward. What it reads
    must outlive the graph."""
    for _ in range(3):  # compiles the kernels, and lets the libraries allocate their workspaces
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def measure(
    device: str,
    timer: Timer,
    *,
    square: tuple[int, int] = SQUARE,
    up: tuple[int, int] = UP,
    sizes: tuple[tuple[int, ...], tuple[int, ...], int] = (DECODE_M, FUSED_M, LARGE_M),
    print_row: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Milliseconds by "what/M/variant": decode (gemv, mma, fused), medium (fused, slab), gemm (cublas,
    triton), slab (MiB)."""
    decode_m, fused_m, large_m = sizes
    base = GPUConfig(0, NEVER, ALWAYS, "cublas", SLAB_MIB[-1] << 20, "tuning")
    variants = {"gemv": replace(base, gemv_max_m=ALWAYS), "mma": replace(base, mma_min_m=0), "fused": base}
    variants["slab"] = replace(base, fused_max_m=0)
    out: dict[str, float] = {}

    def compare(
        what: str, shape: tuple[int, int], m: int, rows: Mapping[str, GPUConfig], backward: bool
    ) -> None:
        step = _step(device, shape, m, backward)
        got = timer({name: (lambda row=row: _with(row, step)) for name, row in rows.items()})
        out.update({f"{what}/{m}/{name}": ms for name, ms in got.items()})
        print_row(f"{what:8} M = {m:<6}" + "  ".join(f"{name} {ms:.4f} ms" for name, ms in got.items()))

    if device == "cuda" and backends.use_cuda_kernels(torch.empty(1, device=device)):
        for m in decode_m:
            compare("decode", square, m, {name: variants[name] for name in ("gemv", "mma", "fused")}, False)
    for m in fused_m:
        compare("medium", square, m, {name: variants[name] for name in ("fused", "slab")}, True)
    compare(
        "gemm",
        square,
        large_m,
        {gemm: replace(base, fused_max_m=0, gemm=gemm) for gemm in ("cublas", "triton")},
        True,
    )
    compare(
        "slab",
        up,
        large_m,
        {str(mib): replace(base, fused_max_m=0, slab_bytes=mib << 20) for mib in SLAB_MIB},
        True,
    )
    return out


def _with(row: GPUConfig, step: Callable[[], None]) -> None:
    with tuned.use_row(row):
        step()


def _step(device: str, shape: tuple[int, int], m: int, backward: bool) -> Callable[[], None]:
    """One bf16 QLoRA linear, r = 16; with `backward`, forward and backward."""
    n, k = shape
    weight = NF4Weight.from_dense(torch.randn(n, k, dtype=torch.float32, device=device) * 0.02)
    x, dy = (torch.randn(m, size, device=device).bfloat16() for size in (k, n))
    a, b = (
        torch.randn(16, k, device=device).bfloat16() / 64,
        torch.randn(n, 16, device=device).bfloat16() / 64,
    )
    tensors = [t.requires_grad_(backward) for t in (x, a, b)]

    def step() -> None:
        y = functional.qlora_linear(x, weight, lora_a=a, lora_b=b, scaling=2.0)
        if backward:
            torch.autograd.grad(y, tensors, dy)

    return step


def _slab_bytes(ms: dict[str, float], table: int) -> int:
    """The fastest of the buffers measured on one linear. Where that is the largest of them, the table's stays
    if larger still: it may hold the weights of a group."""
    if not ms:
        return table
    best = int(min(ms, key=ms.__getitem__))
    return max(best << 20, table if best == max(map(int, ms)) else 0)


def derive(timings: Mapping[str, float], row: GPUConfig) -> GPUConfig:
    """The measured limits; what was not measured stays the table's."""

    def by(what: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for key, ms in timings.items():
            kind, m, variant = key.split("/")
            if kind == what:
                found.setdefault(m, {})[variant] = ms
        return found

    def limit(what: str, first: str, second: str, default: int) -> int:
        rows = by(what)
        sizes = sorted(map(int, rows))
        if not sizes:
            return default
        return tuned.crossover(
            sizes, [rows[str(m)][first] for m in sizes], [rows[str(m)][second] for m in sizes]
        )

    gemm, slab = (next(iter(by(what).values()), {}) for what in ("gemm", "slab"))
    return GPUConfig(
        gemv_max_m=limit("decode", "gemv", "fused", row.gemv_max_m),
        mma_min_m=limit("decode", "gemv", "mma", row.mma_min_m - 1) + 1,
        fused_max_m=limit("medium", "fused", "slab", row.fused_max_m),
        gemm=min(gemm, key=gemm.__getitem__) if gemm else row.gemm,
        slab_bytes=_slab_bytes(slab, row.slab_bytes),
        measured=f"measured on this card: {', '.join(dict.fromkeys(key.split('/')[0] for key in timings))}"
        if timings
        else row.measured,
    )
