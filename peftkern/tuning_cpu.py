"""`peftkern tune` on a CPU: measures on this one, at the level in use, which kernel is the fastest for how
many rows, and keeps the limits for later runs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch

from . import functional
from .formats.nf4 import NF4Weight
from .functional.attention import scaled_dot_product_attention
from .ops.linear import config, cpu_rows, tuned
from .ops.linear.config import Config
from .runtime import backends

__all__ = ["derive", "measure", "tune", "wall_timer"]

SHAPES = ((4096, 4096), (1536, 576))
FEW = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
LARGE = 512
DENSE_ROWS = (1, 16, LARGE)
HEADS, TOKENS = (9, 3, 64), ((2, 256), (2, 1024))
HEAD, HEAD_ROWS = (49152, 576), (64, 512)
NEVER, ALWAYS = 0, 1 << 30
MOST_LOAD = 0.5
DTYPES = ("float32", "bfloat16", "float16")
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


def tune(*, forget: bool = False, busy: bool = False) -> int:
    """Measure and save; 1 with the reason where there is nothing to tune, or, without `busy`, where other
    processes would be measured with it."""
    usable, reason = backends.available("cpu")
    if not usable:
        print(f"peftkern tune: needs the native extension ({reason})")
        return 1
    isa = backends.native().isa()
    if forget:
        cpu_rows.forget(isa)
        print(f"{cpu_rows.cpu_name()}, {isa}: back to the table's row")
        return 0
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    if load > MOST_LOAD and not busy:
        print(
            f"peftkern tune: other processes are busy (load {load:.1f} in the last minute), which makes "
            "parallel calls wait; try again when they are done, or measure nevertheless: --busy"
        )
        return 1
    print(f"{cpu_rows.cpu_name()}, {isa}, {threads} threads: measuring, a few minutes", flush=True)
    timings = measure(isa, wall_timer, print_row=lambda text: print(text, flush=True))
    row = derive(timings, config.TABLE.get(isa, config.TABLE["baseline"]), threads)
    versions = {"torch": torch.__version__, "threads": str(threads), "load": f"{load:.2f}"}
    print(f"{row}\nkept in {cpu_rows.save(isa, row, timings, versions)}")
    return 0


def wall_timer(functions: Mapping[str, Callable[[], object]], seconds: float = 1.5) -> dict[str, float]:
    """Median milliseconds of each, in turn; a single round where one call takes longer than `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while True:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - begin) * 1e3)
        if time.perf_counter() > end:
            return {name: statistics.median(samples) for name, samples in times.items()}


def measure(
    isa: str,
    timer: Timer,
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    few: tuple[int, ...] = FEW,
    rows: tuple[int, ...] = DENSE_ROWS,
    tokens: tuple[tuple[int, int], ...] = TOKENS,
    head: tuple[int, int] = HEAD,
    head_rows: tuple[int, ...] = HEAD_ROWS,
    print_row: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Milliseconds by "what/M/variant", of each dtype: few (gemv, many), large (tiles, gemm, vendor), dense
    (gemm, vendor); attention (tiles, torch), whose M is the tokens of a sequence; loss (tiles, vendor) of a
    dense bf16 `head` [words, width]."""
    out: dict[str, float] = {}

    def compare(what: str, m: int, variants: Mapping[str, Callable[[], object]]) -> None:
        got = timer(variants)
        out.update({f"{what}/{m}/{name}": ms for name, ms in got.items()})
        print_row(f"{what:24} M = {m:<6}" + "  ".join(f"{name} {ms:.3f} ms" for name, ms in got.items()))

    base = replace(config.TABLE.get(isa, config.TABLE["baseline"]), gemv_max_m=NEVER)
    for dtype in DTYPES:
        regimes = _regimes(base, dtype)
        if _too_slow(isa, regimes, dtype):
            regimes.pop("vendor")
        for shape in shapes:
            step = _step(shape, rows[-1], dtype, dense=False, backward=True)
            large = {name: _under(isa, row, step) for name, row in regimes.items()}
            compare(f"large {dtype} {shape[0]}x{shape[1]}", rows[-1], large)
        best = _fastest(out, f"large {dtype} ")
        for shape in shapes:
            for m in few:
                step = _step(shape, m, dtype, dense=False, backward=False)
                variants = {"gemv": _gemv(regimes[best], dtype), "many": regimes[best]}
                named = {name: _under(isa, row, step) for name, row in variants.items()}
                compare(f"few {dtype} {shape[0]}x{shape[1]}", m, named)
        for m in rows:
            dense = {
                "gemm": {**base.dense_vendor, dtype: NEVER},
                "vendor": {**base.dense_vendor, dtype: None},
            }
            if "vendor" not in regimes and m > 1:
                dense.pop("vendor")
            step = _step(shapes[-1], m, dtype, dense=True, backward=True)
            named = {name: _under(isa, replace(base, dense_vendor=d), step) for name, d in dense.items()}
            compare(f"dense {dtype}", m, named)
    if backends.native().attention_served():
        for batch, length in tokens:
            compare("attention", length, _attention(isa, base, batch, length))
        for m in head_rows:
            compare("loss", m, _loss(isa, base, head, m))
    return out


def _regimes(base: Config, dtype: str) -> dict[str, Config]:
    """Rows by which many rows take our product, the tiles' where the level has them, or the vendor's. Beside
    tiles one of the other two serves what they do not: blocks of 32, DoRA."""
    found = {"gemm": replace(base, vendor=(), tiles={}), "vendor": replace(base, vendor=(dtype,), tiles={})}
    if dtype in base.tiles:
        return {"tiles": replace(base, vendor=(), tiles={dtype: NEVER}), **found}
    return found


def _gemv(row: Config, dtype: str) -> Config:
    return replace(row, gemv_max_m=ALWAYS, tiles={name: ALWAYS for name in row.tiles})


def _too_slow(isa: str, regimes: Mapping[str, Config], dtype: str) -> bool:
    """Whether the vendor's product is out of the question: naive loops may take a minute for a large one."""
    step = _step((512, 512), 32, dtype, dense=False, backward=True)
    ours, *_, vendor = (wall_timer({"": _under(isa, row, step)}, 0.05)[""] for row in regimes.values())
    return vendor > 4 * ours


def _step(shape: tuple[int, int], m: int, dtype: str, *, dense: bool, backward: bool) -> Callable[[], object]:
    """A QLoRA linear, r = 16, of m rows."""
    n, k = shape
    kind = getattr(torch, dtype)
    weight = torch.randn(n, k).mul_(0.02)
    weight = weight.to(kind) if dense else NF4Weight.from_dense(weight)
    x, dy = (torch.randn(m, size).to(kind) for size in (k, n))
    a, b = (torch.randn(16, k) / 64).to(kind), (torch.randn(n, 16) / 64).to(kind)
    tensors = [t.requires_grad_(backward) for t in (x, a, b)]

    def step() -> None:
        y = functional.qlora_linear(x, weight, lora_a=a, lora_b=b, scaling=2.0)
        if backward:
            torch.autograd.grad(y, tensors, dy)

    return step


def _under(isa: str, row: Config, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with cpu_rows.use_row(isa, row):
            step()

    return run


def _loss(isa: str, base: Config, head: tuple[int, int], m: int) -> dict[str, Callable[[], object]]:
    """The loss of m rows and its gradient."""
    words, width = head
    x, weight = torch.randn(m, width).bfloat16().requires_grad_(), torch.randn(head).bfloat16()
    labels = torch.randint(0, words, (m,))

    def step() -> None:
        torch.autograd.grad(functional.linear_cross_entropy(x, weight, labels), x)

    rows = {"tiles": replace(base, loss=True), "vendor": replace(base, loss=False)}
    return {name: _under(isa, row, step) for name, row in rows.items()}


def _attention(isa: str, base: Config, batch: int, length: int) -> dict[str, Callable[[], object]]:
    heads, key_heads, width = HEADS
    q, k, v = (
        torch.randn(batch, length, count, width).bfloat16().transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )
    dy = torch.randn(batch, length, heads, width).bfloat16().transpose(1, 2)

    def step() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, causal=True), (q, k, v), dy)

    rows = {"tiles": replace(base, attention=True), "torch": replace(base, attention=False)}
    return {name: _under(isa, row, step) for name, row in rows.items()}


def _fastest(timings: Mapping[str, float], prefix: str, among: Collection[str] = ()) -> str:
    """The variant (of those `among`, if any) that takes the least time over all shapes, each against its
    shape's best."""
    if among:
        timings = {key: ms for key, ms in timings.items() if key.rpartition("/")[2] in among}
    total: dict[str, float] = {}
    for what in dict.fromkeys(key.rpartition("/")[0] for key in timings if key.startswith(prefix)):
        of_shape = {
            key.rpartition("/")[2]: ms for key, ms in timings.items() if key.rpartition("/")[0] == what
        }
        for name, ms in of_shape.items():
            total[name] = total.get(name, 0.0) + ms / min(of_shape.values())
    return min(total, key=total.__getitem__)


def derive(timings: Mapping[str, float], table: Config, threads: int) -> Config:
    """The measured limits; what was not measured stays the table's."""

    def by(prefix: str) -> dict[str, dict[int, dict[str, float]]]:
        found: dict[str, dict[int, dict[str, float]]] = {}
        for key, ms in timings.items():
            what, m, variant = key.split("/")
            if what.startswith(prefix):
                found.setdefault(what, {}).setdefault(int(m), {})[variant] = ms
        return found

    def limit(dtype: str, default: int) -> int:
        """The fewest rows over the shapes: beyond it one of them would lose."""
        found = [
            tuned.crossover(
                sorted(rows), *([rows[m][name] for m in sorted(rows)] for name in ("gemv", "many"))
            )
            for rows in by(f"few {dtype} ").values()
        ]
        return min(found, default=default)

    measured = [dtype for dtype in DTYPES if by(f"large {dtype} ")]
    best = {dtype: _fastest(timings, f"large {dtype} ") for dtype in measured}
    untiled = {dtype: _fastest(timings, f"large {dtype} ", ("gemm", "vendor")) for dtype in measured}
    dense = dict(table.dense_vendor)
    for dtype in DTYPES:
        rows = by(f"dense {dtype}").get(f"dense {dtype}", {})
        faster = [m for m in sorted(rows) if rows[m].get("vendor", float("inf")) <= 1.02 * rows[m]["gemm"]]
        if rows:
            dense[dtype] = None if max(rows) in faster else max(faster, default=0)
    of_attention, of_loss = (by(what).get(what, {}).values() for what in ("attention", "loss"))
    return Config(
        gemv_max_m=limit("float32", table.gemv_max_m),
        vendor=tuple(d for d in DTYPES if (untiled[d] == "vendor" if d in best else d in table.vendor)),
        slice_rows=table.slice_rows,
        dense_vendor=dense,
        measured=f"measured on this CPU with {threads} threads" if timings else table.measured,
        tiles={d: limit(d, few) for d, few in table.tiles.items() if best.get(d, "tiles") == "tiles"},
        attention=all(ms["tiles"] <= ms["torch"] for ms in of_attention) if of_attention else table.attention,
        loss=all(ms["tiles"] <= ms["vendor"] for ms in of_loss) if of_loss else table.loss,
    )
