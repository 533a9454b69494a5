"""Quantizing a dense weight to NF4 with nested absmax, against bitsandbytes."""

from __future__ import annotations

import torch

from peftkern import NF4Weight
from peftkern.functional import quantize_4bit

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, has
from .shapes import GATE_8B, GATE_135M, KV_135M, Q_8B

__all__ = ["build", "specs"]


def specs(small: bool) -> list[Spec]:
    shapes = (KV_135M,) if small else (Q_8B, GATE_8B, GATE_135M)
    return [Spec("quantize", "nested", d, s.n, s.k) for s in shapes for d in ("bfloat16", "float32")]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dense = (torch.randn(spec.n, spec.k) * 0.05).to(DTYPES[spec.dtype])
    moved = dense.nbytes + quantize_4bit(dense).nbytes
    providers = [Provider(OURS, lambda: quantize_4bit(dense), _check_codes(dense), moved)]
    if has("bitsandbytes"):
        import bitsandbytes.functional as bnb

        def peer() -> tuple:
            return bnb.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")

        providers.append(Provider("bitsandbytes", peer, _check_peer(quantize_4bit(dense)), moved))
    return providers


def _check_codes(dense: torch.Tensor):
    """Every code is the nearest: no other code's value lies nearer to w/absmax, but by the rounding of that
    quotient."""

    def check(w: NF4Weight) -> None:
        plain = quantize_4bit(dense, nested=False)
        if not torch.equal(w.packed, plain.packed):
            raise AssertionError("codes depend on whether the absmax is nested")
        blocks = dense.float().reshape(-1, w.blocksize)
        if not torch.equal(plain.absmax, blocks.abs().amax(1)):
            raise AssertionError("absmax is not the largest magnitude of its block")
        scaled = blocks / plain.absmax[:, None]
        index = torch.stack([w.packed.view(-1) >> 4, w.packed.view(-1) & 15], 1).view_as(scaled).long()
        distance = (scaled - w.code[index]).abs()
        middle = (w.code[1:] + w.code[:-1]) / 2
        best = (scaled - w.code[torch.bucketize(scaled, middle)]).abs()
        if not (distance <= best + 1e-6).all():
            raise AssertionError("a code is not the nearest one")

    return check


def _check_peer(ours: NF4Weight):
    def check(result: tuple) -> None:
        packed = result[0].view(torch.uint8).view(-1)
        same = (packed == ours.packed.view(-1)).float().mean().item()
        if same < 0.9999:
            raise AssertionError(f"only {same:.2%} of its bytes are ours")

    return check


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
