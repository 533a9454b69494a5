"""python -m benchmarks.roofline: times of a QLoRA linear's launches as data sheets allow them. Derived, not
measured.

A launch takes the longest of its tensor-core FLOPs, its ALU operations and its bytes, at the card's rates
times an efficiency each (they are taken to overlap perfectly), plus a fixed cost. Bytes go to device memory
once each: a last-level cache that keeps a slab or an activation between launches makes reality better than
the model, products with few rows that leave SMs idle make it worse.

Our launches are those of `peftkern/ops/qlora_linear/plan.py`. Of the peers only sums are known, launches and
passes over x-like and y-like tensors, counted in their code for M > 1536: their extra passes are memory-bound
launches of equal size here, whatever M is.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftkern.ops.qlora_group.plan import decoder_layer_plan
from peftkern.ops.qlora_linear import config, plan
from peftkern.ops.qlora_linear.plan import Launch, Shape
from peftkern.runtime.targets import CARDS, Card

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


def frozen(s: Shape) -> list[Launch]:
    """A frozen linear of x's dtype: y = x W^T and dx = dy W."""
    weight = s.n * s.k * s.itemsize
    flops = s.gemm(s.n, s.k)
    return [Launch("y", s.x + weight, s.y, flops), Launch("dx", s.y + weight, s.x, flops)]


def _passes(name: str, count: int, size: int) -> list[Launch]:
    """`count` launches that move `size` bytes together."""
    share = -(-size // count)
    return [Launch(name, share, 0)] * count


def peer(p: Peer, s: Shape) -> list[Launch]:
    """Its products, its decodings, and all else as memory-bound launches."""
    decode = Launch("decode", s.weight(s.n * s.k), s.n * s.k * s.itemsize)
    rest = p.launches - 2 - p.decodes
    return [*frozen(s), *[decode] * p.decodes, *_passes("pass", rest, p.x_passes * s.x + p.y_passes * s.y)]


def floor(s: Shape) -> list[Launch]:
    """What passes apart from the products cannot avoid: two decodings, x read once more forward (xa), dy
    (dyb, dB) and x (dA) backward; the low-rank products inside the passes that read their operands."""
    y, dx = frozen(s)
    to_y, to_dx = s.gemm(s.n, s.r), s.gemm(s.k, s.r)
    decode = s.weight(s.n * s.k) + s.n * s.k * s.itemsize
    passes = Launch("decode, xa, dyb, dB, dA", 2 * decode + 2 * s.x + s.y, 0, 2 * (to_y + to_dx))
    return [replace(y, flops=y.flops + to_y), replace(dx, flops=dx.flops + to_dx), passes]


def ours(s: Shape, card: Card, gemm: str = "") -> tuple[list[Launch], bool]:
    """Our launches, forward then backward, as dispatched on the card or with `gemm` multiplying; whether that
    is Triton."""
    choices = [
        config.choose_gpu(
            arch=card.sm, dtype="bfloat16", m=s.m, forward=forward, cuda=True, mma=True, dense=s.dense
        )
        for forward in (True, False)
    ]
    forward, backward = (replace(choice, gemm=gemm) if gemm and choice.gemm else choice for choice in choices)
    triton = (backward.gemm or "triton") == "triton"
    return [*plan.forward_plan(s, forward), *plan.backward_plan(s, backward)], triton


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
            plans, gemms = [], set()
            for m in ms:
                choices = [
                    config.choose_gpu(arch=card.sm, dtype="bfloat16", m=m, forward=way, cuda=True, mma=True)
                    for way in (True, False)
                ]
                choices = [replace(choice, slab_bytes=mib << 20) for choice in choices]
                plans.append(decoder_layer_plan(Shape(m, 1, 1, r, dropout=dropout), *choices))
                gemms.add(choices[1].gemm)
            cells = [
                f"{1e3 * seconds(launches, card, a, triton='triton' in gemms):.1f}" for launches in plans
            ]
            counts = "/".join(dict.fromkeys(str(len(launches)) for launches in plans))
            out.append(
                f"| {card.name}, {'/'.join(sorted(gemms))}, {mib} MiB | {counts} | {' | '.join(cells)} |"
            )
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
