"""The GPU ops' calls, replayed, give the bits of the calls that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, use_backend
from peftkern.functional import Adapter, Member, add_rms_norm, glu, qlora_group, qlora_linear, rms_norm, rope
from peftkern.ops.linear import tuned
from peftkern.ops.linear.config import GPU_TABLE, GPUConfig
from peftkern.runtime import replay
from peftkern.runtime.record import Record

FUSED = replace(GPU_TABLE[89], gemv_max_m=0, fused_max_m=1 << 30)
SLAB = replace(FUSED, fused_max_m=0, gemm="cublas", slab_bytes=1 << 20)
ROWS = {
    "fused": FUSED,
    "triton": replace(SLAB, gemm="triton"),
    "cublas, slices": replace(SLAB, slab_bytes=1 << 14),
}
MET, RECORDED, REPLAYED = range(3)


@pytest.fixture(autouse=True)
def on(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls in the interpreter are replayed too."""
    if device == "cpu":
        monkeypatch.setattr(replay, "_on_gpu", lambda first: True)
    replay.forget()
    yield
    replay.forget()


def _held(made: Callable[[], list[Tensor]], row: GPUConfig = SLAB) -> None:
    """The third call is replayed, with the bits of one that is not."""

    def results(draw: int) -> list[Tensor]:
        torch.manual_seed(draw)
        return made()

    with use_backend("triton"), tuned.use_row(row):
        got = [results(draw) for draw in (MET, RECORDED, REPLAYED)][REPLAYED]
        records = [r for table in replay._tables for r in table.values()]
        replay.forget()
        expected = results(REPLAYED)
    assert records, "no call was met"
    assert all(type(r) is Record for r in records), replay.refusals()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def _weight(n: int, k: int, device: str) -> NF4Weight:
    with use_backend("reference"):
        return NF4Weight.from_dense(torch.randn(n, k) * 0.05).to(device)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_linear(device: str, row: GPUConfig) -> None:
    weight = _weight(40, 128, device)
    a, b, bias = (torch.randn(*size, device=device) for size in ((5, 128), (40, 5), (40,)))

    def made() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (torch.randn(9, 128).to(device), a, b, bias)]
        seed = torch.randint(1 << 30, (1,)).to(device)
        x, leaf_a, leaf_b, leaf_bias = leaves
        y = qlora_linear(x, weight, leaf_bias, leaf_a, leaf_b, scaling=0.7, dropout_p=0.25, seed=seed)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn(9, 40).to(device))]

    _held(made, row)


@pytest.mark.parametrize("gemm", ["cublas", "triton"])
def test_a_group(device: str, gemm: str) -> None:
    weights = [_weight(n, 64, device) for n in (64, 32)]
    lows = [(torch.randn(4, 64).to(device), torch.randn(n, 4).to(device)) for n in (64, 32)]

    def made() -> list[Tensor]:
        x = torch.randn(9, 64).to(device).requires_grad_()
        pairs = [tuple(t.clone().requires_grad_() for t in low) for low in lows]
        ys = qlora_group(
            x, [Member(w, None, [Adapter(*low, 0.5)]) for w, low in zip(weights, pairs, strict=True)]
        )
        leaves, dys = [x, *(t for low in pairs for t in low)], [torch.randn(y.shape).to(device) for y in ys]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]

    _held(made, replace(SLAB, gemm=gemm))


def test_norms(device: str) -> None:
    def made() -> list[Tensor]:
        x, residual = (torch.randn(3, 32).to(device).requires_grad_() for _ in range(2))
        weight = torch.randn(32).to(device).requires_grad_()
        y = rms_norm(x, weight)
        z, s = add_rms_norm(x, residual, weight)
        outputs = [y, z, s]
        grads = torch.autograd.grad(
            outputs, [x, residual, weight], [torch.randn(3, 32).to(device) for _ in outputs]
        )
        return [*(t.detach() for t in outputs), *grads]

    _held(made)


def test_rope_and_glu(device: str) -> None:
    def made() -> list[Tensor]:
        q, k = (torch.randn(1, heads, 5, 16).to(device).requires_grad_() for heads in (4, 2))
        cos, sin = (torch.randn(1, 5, 16).to(device) for _ in range(2))
        rotated = rope(q, k, cos, sin)
        gate, up = (torch.randn(7, 24).to(device).requires_grad_() for _ in range(2))
        outputs = [*rotated, glu(gate, up)]
        dys = [torch.randn(t.shape).to(device) for t in outputs]
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, [q, k, gate, up], dys)]

    _held(made)
