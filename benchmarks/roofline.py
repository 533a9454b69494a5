"""python -m benchmarks.roofline: times of a QLoRA linear's launches as data sheets allow them. Derived, not
measured.

A launch takes the longest of its tensor-core FLOPs, its ALU operations and its bytes, at the card's rates
times an efficiency each (they are taken to overlap perfectly), plus a fixed cost. Bytes go to device memory
once each: a last-level cache that keeps a slab or an activation between launches makes reality better than
the model, products with few rows that leave SMs idle make it worse.

Our launches are what the ops launch (`peftkern/runtime/plan.py`). Of the peers only sums are known, launches
and passes over x-like and y-like tensors, counted in their code for M > 1536: their extra passes are bound by
memory and of equal size here, whatever M is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftkern.ops.linear import config, plan, tuned
from peftkern.ops.linear.plan import Shape
from peftkern.ops.sizes import weight_bytes
from peftkern.runtime.plan import Device, Launch
from peftkern.runtime.targets import CARDS, Card

from .layer_plan import decoder_layer_plan
from .pages import put
from .shapes import LARGE

__all__ = [
    "PEERS",
    "Assumptions",
    "Peer",
    "Row",
    "frozen",
    "layers",
    "main",
    "ours",
    "peer",
    "rows",
    "seconds",
    "table",
]

LABEL = "derived, not measured"


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's rates that are reached, and the cost of a launch beside its work.

    gemm: of the dense tensor-core rate; triton: of that again, for a product in Triton instead of cuBLAS;
    dram: of the memory bandwidth;
    alu: of the integer rate; launch: seconds from one kernel's end to the next one's start, the host keeping
    ahead. All are assumptions.
    """

    gemm: float = 0.8
    triton: float = 1.0
    dram: float = 0.9
    alu: float = 0.7
    launch: float = 2e-6


PEAKS = Assumptions(gemm=1.0, dram=1.0, alu=1.0, launch=0.5e-6)


@dataclass(frozen=True)
class Peer:
    """Forward and backward of one QLoRA linear: all launches, extra passes over [M, K] and [M, N] tensors,
    decodings of the weight."""

    name: str
    launches: int
    x_passes: int
    y_passes: int
    decodes: int = 2


# Counted in the code of bitsandbytes 0.50 and the peers' releases of mid-2026. LoRAFusion multiplies a bf16
# weight: it decodes nothing.
PEERS = (
    Peer("PEFT + bitsandbytes", 23, 6, 12),
    Peer("unsloth", 22, 5, 5),
    Peer("axolotl", 21, 5, 4),
    Peer("LoRAFusion (bf16 base)", 10, 5, 1, decodes=0),
)


def seconds(launches: Iterable[Launch], card: Card, a: Assumptions, *, triton: bool = False) -> float:
    """Of launches that run one after the other; `triton`: who multiplies."""
    rate = card.half * a.gemm * (a.triton if triton else 1.0)
    work = (
        max(one.flops / rate, one.ops / (card.alu * a.alu), (one.reads + one.writes) / (card.dram * a.dram))
        for one in launches
    )
    return sum(work_time + a.launch for work_time in work)


def _bytes(s: Shape, rows: int, columns: int) -> int:
    """Of a matrix of x's dtype."""
    return rows * columns * s.dtype.itemsize


def frozen(s: Shape) -> list[Launch]:
    """A frozen linear of x's dtype: y = x W^T and dx = dy W."""
    x, y, weight = _bytes(s, s.m, s.k), _bytes(s, s.m, s.n), _bytes(s, s.n, s.k)
    flops = 2 * s.m * s.n * s.k
    return [Launch("y", x + weight, y, flops), Launch("dx", y + weight, x, flops)]


def _decode(s: Shape) -> Launch:
    packed = weight_bytes(s.n * s.k, None if s.nested else 1, s.blocksize, 256)
    return Launch("decode", packed, _bytes(s, s.n, s.k))


def _passes(name: str, count: int, size: int) -> list[Launch]:
    """`count` launches that move `size` bytes together."""
    share = -(-size // count)
    return [Launch(name, share, 0)] * count


def peer(p: Peer, s: Shape) -> list[Launch]:
    """Its products, its decodings, and all else as memory-bound launches."""
    rest, moved = p.launches - 2 - p.decodes, _bytes(s, s.m, p.x_passes * s.k + p.y_passes * s.n)
    return [*frozen(s), *[_decode(s)] * p.decodes, *_passes("pass", rest, moved)]


def floor(s: Shape) -> list[Launch]:
    """What passes apart from the products cannot avoid: two decodings, x read once more forward (xa), dy
    (dyb, dB) and x (dA) backward; the low-rank products inside the passes that read their operands."""
    y, dx = frozen(s)
    to_y, to_dx = 2 * s.m * s.n * s.r, 2 * s.m * s.k * s.r
    decode = 2 * (_decode(s).reads + _decode(s).writes)
    activations = _bytes(s, s.m, 2 * s.k + s.n)
    passes = Launch("decode, xa, dyb, dB, dA", decode + activations, 0, 2 * (to_y + to_dx))
    return [replace(y, flops=y.flops + to_y), replace(dx, flops=dx.flops + to_dx), passes]


def _device(card: Card) -> Device:
    return Device(card.sm, card.sms, card.l2, cuda=True)


def _row(card: Card, **limits: object) -> config.GPUConfig:
    """The card's limits, some of them replaced."""
    return replace(config.GPU_TABLE[config.nearest_arch(card.sm)], **limits)


def ours(s: Shape, card: Card, gemm: str = "") -> tuple[list[Launch], bool]:
    """Our launches, forward then backward, as dispatched on the card or with `gemm` multiplying; whether that
    is Triton."""
    device = _device(card)
    with tuned.use_row(_row(card, gemm=gemm)) if gemm else contextlib.nullcontext():
        triton = (plan.choices(s, device)[1].gemm or "triton") == "triton"
        return [*plan.forward_plan(s, device), *plan.backward_plan(s, device)], triton


@dataclass(frozen=True)
class Row:
    """One prediction. `ratio`: to the frozen linear; `at_peaks`: the same at the data sheet's full rates and
    0.5 us a launch."""

    card: str
    shape: str
    m: int
    r: int
    provider: str
    launches: int
    microseconds: float
    ratio: float
    at_peaks: float
    kind: str = LABEL


def _providers(s: Shape, card: Card) -> list[tuple[str, list[Launch], bool]]:
    found = [("frozen bf16 linear", frozen(s), False), ("floor", floor(s), False)]
    launches, triton = ours(s, card)
    found.append((f"peftkern ({'Triton' if triton else 'cuBLAS'} GEMM, as dispatched)", launches, triton))
    other, other_triton = ours(s, card, "cublas" if triton else "triton")
    if other != launches:
        found.append((f"peftkern ({'Triton' if other_triton else 'cuBLAS'} GEMM)", other, other_triton))
    return found + [(p.name, peer(p, s), False) for p in PEERS]


def rows(
    cards: Sequence[Card],
    shapes: Sequence[tuple[int, int]],
    ms: Sequence[int],
    r: int,
    a: Assumptions,
    **options: bool,
) -> list[Row]:
    """Of every card, (N, K) and M; `options` are fields of plan.Shape."""
    found = []
    for card in cards:
        for n, k in shapes:
            for m in ms:
                s = Shape(m, n, k, r, **options)
                base, peak = (seconds(frozen(s), card, assumed) for assumed in (a, PEAKS))
                for name, launches, triton in _providers(s, card):
                    time, best = (seconds(launches, card, assumed, triton=triton) for assumed in (a, PEAKS))
                    count = 0 if name == "floor" else len(launches)
                    found.append(
                        Row(card.name, f"{n}x{k}", m, r, name, count, time * 1e6, time / base, best / peak)
                    )
    return found


def table(found: Sequence[Row], a: Assumptions) -> str:
    """Markdown: a section a card and shape, a row a provider, a column an M."""
    products = f"{a.gemm:g} of the tensor-core rate (Triton: {a.gemm * a.triton:g})"
    assumed = f"{products}, {a.dram:g} of the DRAM bandwidth, {a.launch * 1e6:g} us a launch"
    out = [
        "Forward + backward of one QLoRA linear ÷ forward + dx of a frozen bf16 linear, r = "
        f"{found[0].r}: **{LABEL}**.",
        "",
    ]
    out.append(f"Assumed: {assumed}. In brackets: all rates at the data sheet's peak, 0.5 us a launch.")
    for card, shape in dict.fromkeys((row.card, row.shape) for row in found):
        here = [row for row in found if (row.card, row.shape) == (card, shape)]
        ms = list(dict.fromkeys(row.m for row in here))
        out += [
            "",
            f"### {card}, {shape} ({LABEL})",
            "",
            f"| provider | launches | {' | '.join(f'M = {m}' for m in ms)} |",
        ]
        out.append("|---" * (len(ms) + 2) + "|")
        for name in dict.fromkeys(row.provider for row in here):
            by_m = {row.m: row for row in here if row.provider == name}
            counts = "/".join(dict.fromkeys(str(row.launches) for row in by_m.values() if row.launches))
            cells = (f"{by_m[m].ratio:.2f} ({by_m[m].at_peaks:.2f})" if m in by_m else "" for m in ms)
            out.append(f"| {name} | {counts} | {' | '.join(cells)} |")
    return "\n".join(out)


def layers(cards: Sequence[Card], ms: Sequence[int], r: int, a: Assumptions, *, dropout: bool = False) -> str:
    """Markdown: the launches of a patched decoder layer of an 8B Llama and their time, with slab buffers of
    128 and 256 MiB."""
    out = [
        f"One decoder layer of an 8B Llama, forward + backward, sequences of 2048, r = {r}: launches "
        f"and ms, **{LABEL}**.",
        "",
    ]
    out += [
        f"| card, GEMM, buffer | launches | {' | '.join(f'M = {m}' for m in ms)} |",
        "|---" * (len(ms) + 2) + "|",
    ]
    for card in cards:
        for mib in (128, 256):
            row = _row(card, slab_bytes=mib << 20)
            with tuned.use_row(row):
                shapes = [Shape(m, 1, 1, r, dropout=dropout) for m in ms]
                plans = [decoder_layer_plan(s, _device(card)) for s in shapes]
            cells = [
                f"{1e3 * seconds(launches, card, a, triton=row.gemm == 'triton'):.1f}" for launches in plans
            ]
            counts = "/".join(dict.fromkeys(str(len(launches)) for launches in plans))
            out.append(f"| {card.name}, {row.gemm}, {mib} MiB | {counts} | {' | '.join(cells)} |")
    return "\n".join(out)


def _shape(words: str) -> tuple[int, int]:
    n, k = words.lower().split("x")
    return int(n), int(k)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=f"Predicted times, {LABEL}"
    )
    parser.add_argument("--card", nargs="+", choices=list(CARDS), default=["RTX 3090", "RTX 4090", "H200"])
    parser.add_argument("--shape", nargs="+", type=_shape, default=[(s.n, s.k) for s in LARGE], metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument(
        "--gemm",
        type=float,
        default=Assumptions.gemm,
        help="share of the dense tensor-core rate that products reach",
    )
    parser.add_argument(
        "--triton",
        type=float,
        default=Assumptions.triton,
        help="share of that rate which Triton's products reach",
    )
    parser.add_argument(
        "--dram", type=float, default=Assumptions.dram, help="share of the memory bandwidth that is reached"
    )
    parser.add_argument(
        "--launch-us", type=float, default=Assumptions.launch * 1e6, help="cost of a launch beside its work"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="replace what is between the markers of this page"
    )
    args = parser.parse_args(arguments)
    assumed = Assumptions(args.gemm, args.triton, args.dram, launch=args.launch_us * 1e-6)
    found = rows(
        [CARDS[name] for name in args.card], args.shape, args.m, args.r, assumed, dropout=args.dropout
    )
    if args.write:
        put(args.write, "roofline", table(found, assumed))
    else:
        print(table(found, assumed))
        print(
            "\n" + layers([CARDS[name] for name in args.card], args.m, args.r, assumed, dropout=args.dropout)
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(vars(found[0])))
            writer.writeheader()
            writer.writerows(vars(row) for row in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
