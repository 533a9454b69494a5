"""`peftkern tune`: measures on this card where each regime of the QLoRA linear pays, and keeps the limits for
later runs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch

from . import functional
from .formats.nf4 import NF4Weight
from .ops.linear import config, tuned
from .ops.linear.config import GPUConfig
from .runtime import backends

__all__ = ["derive", "main", "measure"]

# (N, K) of an 8B Llama: q and o, gate and up, down, k and v
SQUARE, UP, DOWN, NARROW = (4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)
DECODE_M = (1, 2, 4, 8, 16)
FEW_M = (32, 64)  # where the tensor-core kernel may still be the fastest
FUSED_M = (16, 32, 64, 128, 256, 512)
SLAB_MIB = (36, 64, 128)
LARGE_M = 2048
ALWAYS = NEVER = 1 << 30  # as an upper and a lower limit of M
MOST_COPIES = 24
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
    print(f"{name}: measuring, a few minutes", flush=True)
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
    others: tuple[tuple[int, int], ...] = (DOWN, NARROW),
    sizes: tuple[tuple[int, ...], tuple[int, ...], int] = (DECODE_M, FUSED_M, LARGE_M),
    print_row: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Milliseconds by "what/M/variant": decode (gemv, mma, fused), few (mma, fused), medium (fused, slab; of
    a shape beside the square "medium NxK"), gemm (cublas, triton), slab (MiB). Weights rotate, beyond the
    L2."""
    decode_m, fused_m, large_m = sizes
    base = GPUConfig(0, NEVER, ALWAYS, "cublas", SLAB_MIB[-1] << 20, "tuning")
    variants = {"gemv": replace(base, gemv_max_m=ALWAYS), "mma": replace(base, mma_min_m=0), "fused": base}
    variants["slab"] = slab = replace(base, fused_max_m=0)
    out: dict[str, float] = {}

    def compare(
        what: str, shape: tuple[int, int], m: int, rows: Mapping[str, GPUConfig], backward: bool
    ) -> None:
        step, copies = _step(device, shape, m, backward)
        got = timer({name: (lambda row=row: _with(row, step)) for name, row in rows.items()})
        out.update({f"{what}/{m}/{name}": ms / copies for name, ms in got.items()})
        timed = "  ".join(f"{name} {ms / copies:.4f} ms" for name, ms in got.items())
        print_row(f"{what:17} M = {m:<6}{timed}")

    if device == "cuda" and backends.use_cuda_kernels(torch.empty(1, device=device)):
        for m in decode_m:
            compare("decode", square, m, {name: variants[name] for name in ("gemv", "mma", "fused")}, False)
        for m in FEW_M:
            compare("few", square, m, {name: variants[name] for name in ("mma", "fused")}, False)
    for shape in (square, up, *others):
        what = "medium" if shape == square else f"medium {shape[0]}x{shape[1]}"
        for m in fused_m:
            compare(what, shape, m, {name: variants[name] for name in ("fused", "slab")}, True)
    gemms = {gemm: replace(slab, gemm=gemm) for gemm in ("cublas", "triton")}
    compare("gemm", square, large_m, gemms, True)
    buffers = {str(mib): replace(slab, slab_bytes=mib << 20) for mib in SLAB_MIB}
    compare("slab", up, large_m, buffers, True)
    return out


def _with(row: GPUConfig, step: Callable[[], None]) -> None:
    with tuned.use_row(row):
        step()


def _copies(weight: NF4Weight, device: str) -> list[NF4Weight]:
    """The weight at as many addresses as exceed the L2 twice: in a model, a weight comes from memory."""
    if device != "cuda":
        return [weight]
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = max(1, min(MOST_COPIES, -(-2 * l2 // weight.nbytes)))
    tensors = {f.name: v for f in fields(weight) if isinstance(v := getattr(weight, f.name), torch.Tensor)}
    return [replace(weight, **{name: t.clone() for name, t in tensors.items()}) for _ in range(count)]


def _step(device: str, shape: tuple[int, int], m: int, backward: bool) -> tuple[Callable[[], None], int]:
    """One bf16 QLoRA linear, r = 16, of each of several weights in turn, and how many; with `backward`,
    forward and backward."""
    n, k = shape
    weights = _copies(NF4Weight.from_dense(torch.randn(n, k, device=device).mul_(0.02)), device)
    x, dy = (torch.randn(m, size, device=device).bfloat16() for size in (k, n))
    a, b = (
        torch.randn(16, k, device=device).bfloat16() / 64,
        torch.randn(n, 16, device=device).bfloat16() / 64,
    )
    tensors = [t.requires_grad_(backward) for t in (x, a, b)]

    def step() -> None:
        for weight in weights:
            y = functional.qlora_linear(x, weight, lora_a=a, lora_b=b, scaling=2.0)
            if backward:
                torch.autograd.grad(y, tensors, dy)

    return step, len(weights)


def _slab_bytes(ms: dict[str, float], table: int) -> int:
    """The fastest of the buffers measured on one linear. Where that is the largest of them, the table's stays
    if larger still: it may hold the weights of a group."""
    if not ms:
        return table
    best = int(min(ms, key=ms.__getitem__))
    return max(best << 20, table if best == max(map(int, ms)) else 0)


def derive(timings: Mapping[str, float], row: GPUConfig) -> GPUConfig:
    """The measured limits; what was not measured stays the table's."""

    def by(*kinds: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for key, ms in timings.items():
            kind, m, variant = key.split("/")
            if kind in kinds:
                found.setdefault(m, {})[variant] = ms
        return found

    def limit(rows: dict[str, dict[str, float]], first: str, second: str, default: int) -> int:
        sizes = sorted(map(int, rows))
        if not sizes:
            return default
        return tuned.crossover(
            sizes, [rows[str(m)][first] for m in sizes], [rows[str(m)][second] for m in sizes]
        )

    kinds = dict.fromkeys(key.split("/")[0] for key in timings)
    shapes = {
        kind: tuple(map(int, kind.split()[1].split("x"))) for kind in kinds if kind.startswith("medium ")
    }
    beyond_gemv = {m: ms for m, ms in by("decode", "few").items() if int(m) >= 4}

    gemm, slab = (next(iter(by(what).values()), {}) for what in ("gemm", "slab"))
    return GPUConfig(
        gemv_max_m=limit(by("decode"), "gemv", "fused", row.gemv_max_m),
        mma_min_m=limit(by("decode"), "gemv", "mma", row.mma_min_m - 1) + 1,
        mma_max_m=limit(beyond_gemv, "mma", "fused", row.mma_max_m) if by("few") else row.mma_max_m,
        fused_max_m=limit(by("medium"), "fused", "slab", row.fused_max_m),
        fused_by_shape=tuple((*shape, limit(by(kind), "fused", "slab", 0)) for kind, shape in shapes.items()),
        gemm=min(gemm, key=gemm.__getitem__) if gemm else row.gemm,
        slab_bytes=_slab_bytes(slab, row.slab_bytes),
        measured=f"measured on this card: {', '.join(kinds)}" if timings else row.measured,
    )
