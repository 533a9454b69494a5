"""Scratch of one large linear, and what its forward saves for backward: bytes counted, not timed."""

from __future__ import annotations

import torch

from peftkern import NF4Weight, explain
from peftkern.functional import qlora_linear
from peftkern.ops.linear import cpu as launcher
from peftkern.runtime import backends

from .harness import OURS, Row, force_isa, parser, write_csv
from .machine import describe
from .shapes import GATE_8B, KV_135M

__all__ = ["rows", "saved_bytes", "scratch_bytes"]

R = 16


def scratch_bytes(m: int, n: int, k: int, regime: str) -> int:
    """What a forward and a backward of this size need beside their results: the plan's scratch, and the
    vendor regime's decoded slice."""
    native = backends.native().scratch_bytes(m, n, k, R)
    if regime != "vendor":
        return native
    return native + max(launcher.slices(*sizes, torch.bfloat16)[1].nbytes for sizes in ((n, k), (k, n)))


def saved_bytes(m: int, n: int, k: int) -> tuple[int, int]:
    """Bytes that the forward saves, and those of x, packed, absmax, A, B and xa; the two must be one
    number."""
    weight = NF4Weight.from_dense(torch.randn(n, k, dtype=torch.bfloat16))
    x, a, b = (
        torch.randn(m, k, dtype=torch.bfloat16),
        torch.randn(R, k, dtype=torch.bfloat16),
        torch.randn(n, R, dtype=torch.bfloat16),
    )
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qlora_linear(x.requires_grad_(), weight, lora_a=a.requires_grad_(), lora_b=b.requires_grad_())
    parts = sum(t.nbytes for t in (x, a, b)) + weight.nbytes + m * R * 4
    return sum(t.nbytes for t in saved), parts


def rows(m: int, n: int, k: int) -> list[Row]:
    x = torch.empty(m, k, dtype=torch.bfloat16)
    regime = next(r for r in ("vendor", "gemv", "gemm") if r in explain(x, n, k))
    scratch, (saved, parts) = scratch_bytes(m, n, k, regime), saved_bytes(m, n, k)
    found = (
        ("scratch", OURS, scratch),
        ("saved", OURS, saved),
        ("saved", "x, packed, absmax, A, B, xa", parts),
        ("saved", "dense bf16 weight", n * k * 2),
    )
    ours = {"scratch": scratch, "saved": saved}
    head = describe()
    return [
        Row(
            *head,
            "memory",
            who,
            mode,
            "bfloat16",
            f"{n}x{k}",
            m,
            *(size / 1e6,) * 3,
            size / ours[mode],
            "MB",
            "",
            note=f"regime {regime}",
        )
        for mode, who, size in found
    ]


def main() -> int:
    args = parser(__doc__).parse_args()
    force_isa(args.isa)
    shape, m = (KV_135M, 32) if args.small else (GATE_8B, 512)
    found = rows(m, shape.n, shape.k)
    for row in found:
        print(
            f"{row.kernel:8s} {row.mode:8s} {row.shape} M={row.M} {row.provider:30s} {row.p50:10.3f} "
            f"MB  {row.note}"
        )
    if args.out:
        write_csv(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
