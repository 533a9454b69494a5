"""Every GPU kernel once or more on small ragged shapes, with its result checked: what compute-sanitizer
watches.

python -m benchmarks.gpu.every_kernel             runs them
python -m benchmarks.gpu.every_kernel --names     also prints, as JSON, the kernels of the sources and which
of them ran
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from peftkern.formats.nf4 import operands
from peftkern.functional import (
    Adapter,
    Member,
    add_rms_norm,
    dequantize_4bit,
    dora_linear,
    gated_mlp,
    glu,
    linear_4bit,
    linear_cross_entropy,
    qlora_group,
    qlora_linear,
    quantize_4bit,
    rms_norm,
    rope,
    row_squares,
)
from peftkern.ops.linear import low_rank_config, tuned
from peftkern.runtime import backends

from .forcing import ALWAYS, NEVER, gpu_row

__all__ = ["main", "missing", "run_all", "source_kernels"]

ROOT = Path(__file__).parents[2]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# (M, N, K): few rows, ragged; the GEMV's most; more rows, ragged; whole blocks in K; one row; several tiles;
# rows enough for split sums.
SHAPES = (
    (3, 65, 72),
    (16, 130, 192),
    (33, 65, 72),
    (70, 130, 192),
    (1, 96, 128),
    (130, 192, 256),
    (600, 136, 320),
)
NEVER_SHARED = 1 << 60  # bytes of L2 that no card has
QUICK_SHAPES = 4  # the first ones: every path of every kernel, in a checker's time
RANKS = (16, 40, 1, 256)
_GLOBAL = re.compile(
    r"__global__\s+(?:__launch_bounds__\([^)]*\)\s+)?void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\("
)
_TRITON = re.compile(r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(")


def source_kernels() -> tuple[set[str], set[str]]:
    """Names of the CUDA C++ kernels in csrc/cuda and of the Triton kernels under peftkern/ops."""
    cuda = {
        name
        for path in (ROOT / "csrc" / "cuda").rglob("*")
        if path.is_file()
        for name in _GLOBAL.findall(path.read_text())
    }
    triton = {
        name
        for path in (ROOT / "peftkern" / "ops").rglob("triton*.py")
        for name in _TRITON.findall(path.read_text())
    }
    return cuda, triton


def contexts(device: str) -> Iterator[tuple[str, Callable[[], AbstractContextManager]]]:
    """Each regime forced, with the CUDA kernels where they are built, and without; every call makes a context
    anew."""
    if device == "cpu" and not backends.interpreted():
        yield "cpu", contextlib.nullcontext
        return
    regimes = {
        "gemv": dict(gemv_max_m=ALWAYS, mma_min_m=ALWAYS, fused_max_m=ALWAYS),
        "fused": dict(gemv_max_m=NEVER, mma_min_m=ALWAYS, fused_max_m=ALWAYS),
        "mma": dict(gemv_max_m=NEVER, mma_min_m=0, fused_max_m=ALWAYS),
        "slabs, cuBLAS": dict(gemv_max_m=NEVER, fused_max_m=NEVER, gemm="cublas", slab_bytes=1 << 15),
        "slabs, Triton": dict(gemv_max_m=NEVER, fused_max_m=NEVER, gemm="triton", slab_bytes=1 << 15),
    }
    for name, changes in regimes.items():
        for backend in _backends_here():
            yield f"{name}, {backend}", functools.partial(_forced, backend, changes)
    small = dict(regimes["slabs, cuBLAS"], slab_bytes=1 << 16)
    yield "slabs, a card with a small L2", functools.partial(_forced, "triton", small, NEVER_SHARED)


@contextlib.contextmanager
def _forced(backend: str, changes: dict[str, object], shared_l2: int | None = None) -> Iterator[None]:
    """shared_l2: from which size on dyb and dB are made by programs of their own; None leaves it."""
    limit = low_rank_config.SHARED_L2 if shared_l2 is None else shared_l2
    row, known = replace(gpu_row(), **changes), low_rank_config.beside_a_slab
    with (
        backends.use_backend(backend),
        tuned.use_row(row),
        mock.patch.object(low_rank_config, "SHARED_L2", limit),
    ):
        known.cache_clear()
        yield
    known.cache_clear()


def _regime_fits(name: str, m: int) -> bool:
    return m <= 16 or not name.startswith("gemv")


def run_all(device: str, quick: bool = False, shard: tuple[int, int] = (0, 1)) -> int:
    """How many calls were made; AssertionError where a result is not finite or far from the reference's.
    shard: (number, of how many)."""
    number, count = shard
    calls = 0
    for context, work in itertools.islice(_works(device, quick), number, None, count):
        with context():
            calls += work()
    return calls


Work = tuple[Callable[[], AbstractContextManager], Callable[[], int]]


def _works(device: str, quick: bool) -> Iterator[Work]:
    """Pieces of work that may run in any process, each within its context."""
    shapes, ranks, floats = (
        (SHAPES[:QUICK_SHAPES], RANKS[:2], FLOATS[:1]) if quick else (SHAPES, RANKS, FLOATS)
    )
    for context, dtype, nested in itertools.product(_plain(device), FLOATS, (True, False)):
        yield context, functools.partial(_formats, device, dtype, nested)
    if device != "cpu" or backends.interpreted():
        yield contextlib.nullcontext, functools.partial(_split, device)
    if "cuda" in _backends_here():
        for dtype, nested in itertools.product(FLOATS, (True, False)):
            yield contextlib.nullcontext, functools.partial(_dequantize_cuda, device, dtype, nested)
    for name, context in contexts(device):
        for (m, n, k), dtype in itertools.product(shapes, floats):
            if _regime_fits(name, m):
                yield context, functools.partial(_linears, device, m, n, k, dtype, ranks, name)
        for m, dtype in itertools.product((5, 70), floats):
            if _regime_fits(name, m):
                yield context, functools.partial(_groups, device, m, dtype, name)
    for context, dtype in itertools.product(_plain(device), floats):
        yield context, functools.partial(_blocks, device, dtype)


def _plain(device: str) -> list[Callable[[], AbstractContextManager]]:
    """For what has no regimes: each GPU backend that is here; else the device's own."""
    if device == "cpu" and not backends.interpreted():
        return [contextlib.nullcontext]
    return [functools.partial(backends.use_backend, name) for name in _backends_here()]


def _backends_here() -> tuple[str, ...]:
    return ("cuda", "triton") if backends.available("cuda")[0] else ("triton",)


def _formats(device: str, dtype: torch.dtype, nested: bool) -> int:
    """Quantize and dequantize, bit for bit."""
    for n, k in ((128, 192), (65, 72), (7, 33)):
        weight = quantize_4bit(torch.randn(n, k, device=device).to(dtype), nested=nested, blocksize=64)
        with backends.use_backend("reference"):
            expected = dequantize_4bit(weight)
        _equal(f"dequantize {dtype}, nested {nested}, {n}x{k}", dequantize_4bit(weight), expected)
    return 6


def _split(device: str) -> int:
    """The product of few rows whose contraction several programs share, as of a K from 2,048 on."""
    from peftkern.ops.linear.matmul_calls import matmul_dx, matmul_forward
    from peftkern.ops.linear.matmul_config import MatmulConfig

    weight, config = quantize_4bit(torch.randn(130, 192, device=device)), MatmulConfig(16, 64, 32, split_k=3)
    x, dy = (torch.randn(5, size, device=device) for size in (192, 130))
    packed, quant = operands(weight)
    dense = _reference(lambda: dequantize_4bit(weight))
    y = matmul_forward(x, packed, quant, 130, None, None, None, 1.0, config=config)
    _compare("a split forward", y, x @ dense.t())
    _compare("a split dx", matmul_dx(dy, packed, quant, 192, None, None, config=config), dy @ dense)
    return 2


def _dequantize_cuda(device: str, dtype: torch.dtype, nested: bool) -> int:
    """The CUDA C++ kernels of dequantization, which the ops leave to Triton's."""
    from peftkern.ops.dequantize import cuda

    for n, k in ((128, 192), (65, 72), (7, 33)):
        weight = quantize_4bit(torch.randn(n, k, device=device), nested=nested)
        packed, quant = operands(weight)
        *tables, blocksize, nested_blocksize = quant
        got = cuda.dequantize_4bit(packed, *tables, (n, k), blocksize, nested_blocksize, dtype)
        expected = _reference(lambda weight=weight: dequantize_4bit(weight, dtype=dtype))
        _equal(f"CUDA C++ dequantize {dtype}, nested {nested}, {n}x{k}", got, expected)
        rows, cols = slice(1, n - 1), slice(3, k - 2)  # no row starts where a vector of the weight does
        got = cuda.dequantize_slice(packed, quant, n, k, rows, cols, torch.empty_like(expected[rows, cols]))
        _equal(f"CUDA C++ dequantize {dtype}, nested {nested}, {n}x{k}, a slice", got, expected[rows, cols])
    return 6


def _linears(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], regime: str
) -> int:
    torch.manual_seed(0)
    weight = quantize_4bit(torch.randn(n, k, device=device).to(dtype) * 0.05, nested=m % 2 == 0)
    x = torch.randn(m, k, device=device).to(dtype)
    _compare(
        f"linear {regime} {m}x{n}x{k} {dtype}",
        linear_4bit(x, weight),
        _reference(lambda: linear_4bit(x, weight)),
    )
    for r, dropout_p in zip(ranks, itertools.cycle((0.0, 0.1)), strict=False):
        adapters = dtype if r % 16 else torch.float32
        a, b = (
            torch.randn(r, k, device=device).to(adapters),
            (torch.randn(n, r, device=device) * 0.05).to(adapters),
        )
        bias, seed = torch.randn(n, device=device).to(dtype), torch.tensor([7], device=device)
        tensors = [t.requires_grad_() for t in (x.clone(), bias, a, b)]
        dy = torch.randn(m, n, device=device).to(dtype)

        def both(
            tensors: list = tensors, dropout_p: float = dropout_p, seed=seed, dy=dy
        ) -> tuple[torch.Tensor, ...]:
            leaf, bias, a, b = tensors
            y = qlora_linear(leaf, weight, bias, a, b, scaling=0.5, dropout_p=dropout_p, seed=seed)
            return (y, *torch.autograd.grad(y, tensors, dy))

        for got, expected in zip(both(), _reference(both), strict=True):
            _compare(f"qlora_linear {regime} {m}x{n}x{k} r {r} {dtype}", got, expected)
    return 1 + 2 * len(ranks)


def _groups(device: str, m: int, dtype: torch.dtype, regime: str) -> int:
    """q, k and v, an MLP, and DoRA, with dropout and ragged widths: gradients of x and of every adapter."""
    torch.manual_seed(0)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, device=device) * scale).to(dtype)  # noqa: E731
    seed = torch.tensor([7], device=device)

    def member(n: int, k: int, dropout_p: float = 0.1) -> Member:
        a, b = draw(16, k, scale=0.1).requires_grad_(), draw(n, 16, scale=0.05).requires_grad_()
        return Member(quantize_4bit(draw(n, k, scale=0.05)), adapters=[Adapter(a, b, 0.5, dropout_p, seed)])

    def trained(members: Sequence[Member]) -> list[torch.Tensor]:
        return [t for m in members for adapter in m.adapters for t in (adapter.lora_a, adapter.lora_b)]

    qkv = [member(96, 72), member(40, 72), member(40, 72)]
    gate, up, down = member(80, 72), member(80, 72), member(72, 80)
    dora, magnitude = member(96, 72, 0.0), draw(96).abs().requires_grad_()
    x = draw(m, 72).requires_grad_()
    calls = {
        "group": (lambda: qlora_group(x, qkv), [x, *trained(qkv)]),
        "gated_mlp": (lambda: (gated_mlp(x, gate, up, down),), [x, *trained([gate, up, down])]),
        "dora": (lambda: (dora_linear(x, dora, magnitude),), [x, magnitude, *trained([dora])]),
    }
    where = f"{regime} M={m} {dtype}"
    return sum(_gradients(f"{name} {where}", call, leaves) for name, (call, leaves) in calls.items())


def _blocks(device: str, dtype: torch.dtype) -> int:
    """Norms, rotary embedding, gated activations, the loss and DoRA's squares, ragged."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype).requires_grad_()  # noqa: E731
    x, residual, weight = draw(37, 72), draw(37, 72), draw(72)
    wide = draw(5, 9000)  # a row beyond one tile
    q, k, angle = draw(2, 4, 9, 64), draw(2, 2, 9, 64), torch.randn(1, 9, 64, device=device)
    head, labels = draw(130, 72), torch.randint(0, 130, (37,), device=device)
    packed = quantize_4bit(torch.randn(65, 96, device=device))
    calls = {
        "rms_norm": (lambda: (rms_norm(x, weight),), [x, weight]),
        "rms_norm, wide": (lambda: (rms_norm(wide, torch.ones(9000, device=device, dtype=dtype)),), [wide]),
        "add_rms_norm": (lambda: add_rms_norm(x, residual, weight), [x, residual, weight]),
        "rope": (lambda: rope(q, k, angle.cos().to(dtype), angle.sin().to(dtype)), [q, k]),
        "glu": (lambda: (glu(x, residual),), [x, residual]),
        "linear_cross_entropy": (lambda: (linear_cross_entropy(x, head, labels),), [x, head]),
    }
    done = sum(_gradients(f"{name} {dtype}", call, leaves) for name, (call, leaves) in calls.items())
    _compare("row_squares", row_squares(packed), _reference(lambda: row_squares(packed)))
    return done + 1


def _gradients(what: str, call: Callable[[], Sequence[torch.Tensor]], leaves: Sequence[torch.Tensor]) -> int:
    """Results and gradients against the reference's."""

    def both() -> tuple[torch.Tensor, ...]:
        results = call()
        torch.manual_seed(1)
        outer = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in results]
        return (*results, *torch.autograd.grad(results, leaves, outer))

    for got, expected in zip(both(), _reference(both), strict=True):
        _compare(what, got, expected)
    return 2


def _reference(call):
    with backends.use_backend("reference"):
        return call()


def _equal(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    if not torch.equal(got, expected):
        raise AssertionError(f"{what}: other bits than the reference's")


def _compare(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Coarse on purpose: the tests hold the bounds, this notices a kernel that computed something else."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not error.item() < 0.05:
        raise AssertionError(f"{what}: relative difference {error.item():.3g} from the reference")


def missing(launched: set[str]) -> tuple[set[str], set[str]]:
    """CUDA and Triton kernels of the sources whose name is in no launched kernel's name."""
    cuda, triton = source_kernels()

    def unseen(names):
        return {name for name in names if not any(re.search(rf"\b{name}\b", one) for one in launched)}

    return unseen(cuda), unseen(triton)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--names", action="store_true", help="profile, and print which kernels of the sources did not run"
    )
    p.add_argument("--device", default="cuda")
    p.add_argument("--quick", action="store_true", help="fewer shapes, ranks and dtypes: for a slow checker")
    shares = "every N-th piece of work from the I-th on, to share it among processes"
    p.add_argument("--shard", default="0/1", metavar="I/N", help=shares)
    args = p.parse_args()
    shard = tuple(int(part) for part in args.shard.split("/"))
    if not args.names:
        print(f"{run_all(args.device, args.quick, shard)} calls, all as the reference")
        return 0
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CUDA if args.device == "cuda" else ProfilerActivity.CPU]
    ) as profiler:
        run_all(args.device, args.quick, shard)
    names = {e.name for e in profiler.events() if e.device_type == DeviceType.CUDA}
    cuda, triton = missing(names)
    built = args.device == "cuda" and backends.available("cuda")[0]
    print(
        json.dumps(
            {
                "launched": len(names),
                "cuda_built": built,
                "missing_cuda": sorted(cuda),
                "missing_triton": sorted(triton),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
