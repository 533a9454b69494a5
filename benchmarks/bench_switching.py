"""One OpenMP runtime: our kernel and torch.mm in turn, against each of them alone. "alone" is the sum of the
two times."""

from __future__ import annotations

import torch

from peftkern import NF4Weight
from peftkern.functional import linear_4bit

from .harness import OURS, Provider, Spec, main
from .peers import close, within_bound
from .shapes import GATE_135M, KV_135M, Q_8B

__all__ = ["build", "specs"]

RUN = 8  # calls in a row


def specs(small: bool) -> list[Spec]:
    cases = ((KV_135M, 32),) if small else ((GATE_135M, 1), (GATE_135M, 512), (Q_8B, 64))
    return [Spec("switching", "in turn", "float32", s.n, s.k, m) for s, m in cases]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dense, x = torch.randn(spec.n, spec.k) * 0.05, torch.randn(spec.m, spec.k)
    weight = NF4Weight.from_dense(dense)
    decoded = weight.dequantize()
    exact, plain = (
        {"y": x.double() @ decoded.double().t(), "mm": x.double() @ dense.double().t()},
        {"y": x @ decoded.t(), "mm": x @ dense.t()},
    )

    def native() -> torch.Tensor:
        return linear_4bit(x, weight)

    def vendor() -> torch.Tensor:
        return torch.mm(x, dense.t())

    def in_turn() -> dict[str, torch.Tensor]:
        for _ in range(RUN):
            y, mm = native(), vendor()
        return {"y": y, "mm": mm}

    def alone() -> dict[str, torch.Tensor]:
        for _ in range(RUN):
            y = native()
        for _ in range(RUN):
            mm = vendor()
        return {"y": y, "mm": mm}

    return [
        Provider(OURS, in_turn, within_bound(exact, plain)),
        Provider("alone", alone, close(exact, torch.float32)),
    ]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
