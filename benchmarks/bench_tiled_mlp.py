"""A checkpointed x + MLP(norm(x)) with 4-bit weights and adapters, its MLP in tiles: bytes at the peak of a
forward and backward pass, counted, and their time; against the same with the MLP whole, and without
checkpointing.

    python -m benchmarks.bench_tiled_mlp --out tiled_mlp.csv
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkern import NF4Weight
from peftkern.functional import Adapter, Member, add_rms_norm, gated_mlp
from peftkern.memory.count import MemoryCount
from peftkern.memory.row_blocks import RowBlocks
from peftkern.memory.tiles import mlp_tile_bytes

from .harness import OURS, Provider, Row, Spec, force_isa, measure_spec, parser, show, write_csv
from .machine import describe
from .peers import close

__all__ = ["MLP", "Case", "build", "peak", "rows"]

_RANK = 16


class Case(NamedTuple):
    """hidden, intermediate: the MLP's widths; tokens; tile: rows at a time."""

    hidden: int
    intermediate: int
    tokens: int
    tile: int

    @property
    def spec(self) -> Spec:
        mode = f"checkpointed, tiles of {self.tile}"
        return Spec("tiled_mlp", mode, "bfloat16", self.intermediate, self.hidden, self.tokens)


SMALL = (Case(64, 176, 512, 64),)
LARGE = (Case(576, 1536, 4096, 256), Case(576, 1536, 4096, 1024), Case(2048, 8192, 2048, 1024))


class MLP(nn.Module):
    """A gated MLP of random NF4 weights with adapters of rank 16."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weights, shapes = [], [(case.intermediate, case.hidden)] * 2 + [(case.hidden, case.intermediate)]
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for n, k in shapes:
            self.weights.append(NF4Weight.from_dense(torch.randn(n, k) * 0.02))
            self.a.append(nn.Parameter(torch.randn(_RANK, k) * 0.02))
            self.b.append(nn.Parameter(torch.randn(n, _RANK) * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        adapters = [[Adapter(a, b)] for a, b in zip(self.a, self.b, strict=True)]
        members = [Member(w, adapters=own) for w, own in zip(self.weights, adapters, strict=True)]
        return gated_mlp(x, *members)


def build(case: Case) -> tuple[dict[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]:
    """A forward and backward pass of each kind, which gives dx and the adapters' gradients; and these as they
    should be."""
    torch.manual_seed(0)
    mlp, weight = MLP(case), torch.ones(case.hidden, dtype=torch.bfloat16)
    x, dy = (torch.randn(1, case.tokens, case.hidden).bfloat16() for _ in range(2))
    tiles = RowBlocks(mlp, mlp.forward, case.tile)

    def half_layer(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, s = add_rms_norm(x, None, weight)
        return s + call(y)

    def step(call: Callable[[Tensor], Tensor], checkpointed: bool) -> dict[str, Tensor]:
        own = x.detach().requires_grad_()
        options = {"use_reentrant": False, "preserve_rng_state": False}
        run = functools.partial(checkpoint, half_layer, **options) if checkpointed else half_layer
        out = run(call, own)
        wanted = [own, *mlp.parameters()]
        names = ["dx", *(name for name, _ in mlp.named_parameters())]
        return dict(zip(names, torch.autograd.grad(out, wanted, dy), strict=True))

    passes = {
        OURS: lambda: step(tiles, True),
        "checkpointed, MLP whole": lambda: step(mlp, True),
        "without checkpointing": lambda: step(mlp, False),
    }
    return passes, step(mlp, False)


def peak(call: Callable[[], dict[str, Tensor]]) -> int:
    """The most bytes of tensors alive at once, beside those that were there: inputs, weights and adapters."""
    with MemoryCount(phase="step", classify=None) as count:
        call()
    return count.peaks["step"]


def rows(case: Case, rounds: int, cap_s: float) -> list[Row]:
    """Times of all three, and their bytes at the peak."""
    passes, expected = build(case)
    check = close({name: value.double() for name, value in expected.items()}, torch.bfloat16)
    spec, providers = case.spec, [Provider(name, call, check) for name, call in passes.items()]
    found = measure_spec(spec, providers, rounds=rounds, cap_s=cap_s)
    peaks = {name: peak(call) for name, call in passes.items()}
    words = (
        f"a tile of {mlp_tile_bytes(case.tile, case.hidden, case.intermediate) / 1e6:.1f} MB by its formula"
    )
    what = ("bfloat16", spec.shape, spec.m)
    for name, size in peaks.items():
        where = ("tiled_mlp", name, "peak bytes", *what)
        figures = (*(size / 1e6,) * 3, size / peaks[OURS], "MB", "")
        found.append(Row(*describe(), *where, *figures, note=words if name == OURS else ""))
    return found


def main() -> int:
    args: argparse.Namespace = parser(__doc__).parse_args()
    force_isa(args.isa)
    busy = False
    for case in SMALL if args.small else LARGE:
        found = rows(case, args.rounds or (3 if args.small else 7), args.cap)
        for row in found:
            show(row)
        if args.out:
            write_csv(args.out, found)
        busy |= found[0].load.endswith("BUSY")
    if busy:
        print(
            "warning: other processes used the CPU meanwhile; do not record these numbers.", file=sys.stderr
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
