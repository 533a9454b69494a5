"""The GPU ops' calls, replayed, give the bits of the calls that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, use_backend
from peftkern.functional import (
    Adapter,
    Member,
    add_rms_norm,
    glu,
    group,
    linear,
    mlp,
    qlora_group,
    qlora_linear,
    rms_norm,
    rope,
)
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


# ---- what is held for calls to come


@pytest.fixture
def looks(device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a call's arguments are looked at, one by one."""
    if device == "cpu":
        monkeypatch.setattr(replay, "_current_device", lambda: -1)
    seen, key = [], replay._key
    monkeypatch.setattr(replay, "_key", lambda *args: (seen.append(1), key(*args))[1])
    return seen


def _prepared_holds(
    call: Callable[[Tensor], Sequence[Tensor]], leaves: Sequence[Tensor], k: int, looks: list[int], m: int
) -> None:
    """The fourth call finds its record without a look at what is held, and has the bits of one that runs by
    itself."""

    def results(draw: int) -> list[Tensor]:
        torch.manual_seed(draw)
        device = leaves[0].device
        x = torch.randn(m, k).to(device).requires_grad_()
        ys = call(x.view(1, m, k))
        assert all(y.shape[:2] == (1, m) for y in ys)
        dys = [torch.randn(y.shape).to(device) for y in ys]
        grads = torch.autograd.grad(ys, [x, *leaves], dys)
        ys[0].mul_(2)  # a result like any other
        return [*(y.detach() for y in ys), *grads]

    for draw in range(3):
        results(draw)
    looks.clear()
    got = results(3)
    assert not looks
    replay.forget()
    with torch.autograd.profiler.profile():  # for whom every call goes by torch's dispatcher
        expected = results(3)
    assert looks
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def _low(n: int, k: int, device: str, rank: int = 4) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(*size, device=device).requires_grad_() for size in ((rank, k), (n, rank)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_held_linear(device: str, row: GPUConfig, dropout: float, looks: list[int]) -> None:
    weight, (a, b) = _weight(40, 128, device), _low(40, 128, device)
    bias = torch.randn(40, device=device).requires_grad_()
    with use_backend("triton"), tuned.use_row(row):
        like = torch.zeros(1, 128, device=device)
        run = linear.prepared(like, weight, bias, a, b, scaling=0.7, dropout_p=dropout)
        for m in (9, 1):
            _prepared_holds(lambda x: [run(x)], [a, b, bias], 128, looks, m)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("gemm", ["cublas", "triton"])
def test_a_held_group(device: str, gemm: str, dropout: float, looks: list[int]) -> None:
    lows = [_low(n, 64, device) for n in (64, 32)]
    members = [
        Member(_weight(n, 64, device), None, [Adapter(*low, 0.5, dropout)])
        for n, low in zip((64, 32), lows, strict=True)
    ]
    with use_backend("triton"), tuned.use_row(replace(SLAB, gemm=gemm)):
        run = group.prepared(torch.zeros(1, 64, device=device), members)
        _prepared_holds(run, [t for low in lows for t in low], 64, looks, 9)


@pytest.mark.parametrize("gemm", ["cublas", "triton"])
def test_a_held_mlp(device: str, gemm: str, looks: list[int]) -> None:
    shapes = ((64, 32), (64, 32), (32, 64))
    lows = [_low(*shape, device) for shape in shapes]
    gate, up, down = (
        Member(_weight(*shape, device), None, [Adapter(*low, 0.5)])
        for shape, low in zip(shapes, lows, strict=True)
    )
    with use_backend("triton"), tuned.use_row(replace(SLAB, gemm=gemm)):
        like = torch.zeros(1, 32, device=device)
        run = mlp.prepared(like, {"gate": gate, "up": up}, down, activation="silu")

        def call(x: Tensor) -> list[Tensor]:
            return [run(x)]

        torch.manual_seed(0)
        x = torch.randn(1, 9, 32).to(device).requires_grad_()
        leaves = [x, *(t for low in lows for t in low)]
        dy = torch.randn(1, 9, 32).to(device)
        found = [torch.autograd.grad(call(x), leaves, [dy]) for _ in range(4)]
        assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))
        groups = [held for held in replay._helds if held.records]
        assert len(groups) >= 3  # both forward, the inner one backward


def test_a_held_linear_follows_what_changes(device: str, looks: list[int]) -> None:
    """Rows, dtype of the input's memory, a forgotten record: each kind of call is met anew."""
    weight, (a, b) = _weight(40, 128, device), _low(40, 128, device)
    with use_backend("triton"):
        run = linear.prepared(torch.zeros(1, 128, device=device), weight, None, a, b)
        with torch.no_grad():
            for row in (*ROWS.values(), *ROWS.values()):
                with tuned.use_row(row):
                    for m in (1, 9, 1, 9, 1, 9, 1):
                        x = torch.randn(m, 128).to(device)
                        flat = torch.randn(m * 128 + 1).to(device)[1:].view(m, 128)  # aligned to 4 bytes
                        for given in (x, flat, x[:, :128]):
                            expected = qlora_linear(given, weight, None, a, b)
                            assert torch.equal(run(given), expected)
                    replay.forget()
