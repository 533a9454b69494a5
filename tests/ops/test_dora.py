"""DoRA's linears, alone and in groups, against fp64 and plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import library
from torch.nn.functional import linear

from peftkern import NF4Weight, use_backend
from peftkern.formats.nf4 import operands
from peftkern.functional import (
    Adapter,
    Member,
    dora_group,
    dora_linear,
    row_squares,
)
from peftkern.ops.linear import config, cpu_rows
from peftkern.ops.linear import dora as op

from ..cases import nightly
from .bounds import assert_as_accurate, in_other_orders, products_of_many_rows, relative_norm
from .test_dora_pieces import frozen_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@products_of_many_rows
def _dora(x, dense, bias, a, b, magnitude, dy, dtype, dropped=None):
    """Plain PyTorch, PEFT's formula, everything in `dtype` but the norm, which is exact."""
    x, bias, a, b, magnitude = (
        t.detach().to(dtype, copy=True).requires_grad_() for t in (x, bias, a, b, magnitude)
    )
    norm = (dense + 0.5 * b.detach().double() @ a.detach().double()).norm(dim=1).to(dtype)
    g, w = magnitude / norm, dense.to(dtype)
    inner = x if dropped is None else x * dropped.to(dtype)
    y = linear(x, w, bias) + (g - 1) * linear(inner, w) + g * (0.5 * inner @ a.t() @ b.t())
    y.backward(dy.to(dtype))
    return {
        "y": y.detach(),
        "dx": x.grad,
        "d_bias": bias.grad,
        "d_lora_a": a.grad,
        "d_lora_b": b.grad,
        "d_magnitude": magnitude.grad,
    }


def _ours(x, weight, bias, a, b, magnitude, dy, dropped=None):
    x, bias, a, b, magnitude = (t.detach().clone().requires_grad_() for t in (x, bias, a, b, magnitude))
    member = Member(weight, bias, [Adapter(a, b, 0.5)])
    y = dora_linear(x, member, magnitude, dropped=None if dropped is None else x * dropped.to(x.dtype))
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "d_bias": bias.grad,
        "d_lora_a": a.grad,
        "d_lora_b": b.grad,
        "d_magnitude": magnitude.grad,
    }


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_and_gradient(isa: str, four_bit: bool, drop: bool, dtype: torch.dtype) -> None:
    runs = []
    for _ in range(4):
        weight, dense = frozen_weight(70, 192, four_bit, dtype)
        x, dy, bias = torch.randn(37, 192).to(dtype), torch.randn(37, 70).to(dtype), torch.randn(70).to(dtype)
        a, b = (torch.randn(8, 192) / 14).to(dtype), (torch.randn(70, 8) * 0.1).to(dtype)
        magnitude = (dense.norm(dim=1) * (1 + 0.1 * torch.randn(70).double())).to(dtype)
        dropped = torch.bernoulli(torch.full((37, 192), 0.75)) / 0.75 if drop else None
        plain, exact = (
            _dora(x, dense, bias, a, b, magnitude, dy, d, dropped) for d in (dtype, torch.float64)
        )
        runs.append((_ours(x, weight, bias, a, b, magnitude, dy, dropped), plain, exact))
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["gemm", "gemv", "vendor", "composed"])
def test_every_regime_serves_the_same_call(
    isa: str, regime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does the composition of other ops that a GPU takes."""
    if regime == "composed":
        monkeypatch.setattr(op, "served", lambda x: False)
    else:
        monkeypatch.setattr(cpu_rows, "choose", lambda **_: config.Choice(regime, "the test says so"))
    for four_bit in (True, False):
        runs = [_case(8, four_bit, dtype) for _ in range(8)]
        _judge(runs)


@pytest.mark.parametrize("m", [1, 5, 37, 600])
def test_rows(isa: str, m: int) -> None:
    _judge([_case(m, True, torch.float32) for _ in range(1 if m > 100 else 8)])


@pytest.mark.parametrize("r", [1, 17, 256])
def test_ranks(isa: str, r: int) -> None:
    """Less than a panel of A's rows, more than one, and as many as there may be."""
    _judge([_case(37, True, torch.float32, r) for _ in range(4)])


def _case(m: int, four_bit: bool, dtype: torch.dtype, r: int = 8):
    weight, dense = frozen_weight(70, 192, four_bit, dtype)
    x, dy, bias = torch.randn(m, 192).to(dtype), torch.randn(m, 70).to(dtype), torch.randn(70).to(dtype)
    a, b = (torch.randn(r, 192) / 14).to(dtype), (torch.randn(70, r) * 0.1).to(dtype)
    magnitude = (dense.norm(dim=1) * (1 + 0.1 * torch.randn(70).double())).to(dtype)
    plain, exact = (_dora(x, dense, bias, a, b, magnitude, dy, d) for d in (dtype, torch.float64))
    return _ours(x, weight, bias, a, b, magnitude, dy), plain, exact


def _judge(runs: list) -> None:
    """Each: ours, plain PyTorch's and the exact values, and perhaps plain PyTorch's in other orders."""
    for name in runs[0][2]:
        columns = ([run[i][name].flatten() for run in runs] for i in range(len(runs[0])))
        ours, plain, exact, *others = map(torch.cat, columns)
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact, others)


def _inputs(m: int = 12) -> tuple:
    weight = NF4Weight.from_dense(torch.randn(70, 192) * 0.05)
    tensors = (
        torch.randn(m, 192),
        torch.randn(70),
        torch.randn(8, 192) / 14,
        torch.randn(70, 8) * 0.1,
        torch.rand(70) + 0.5,
    )
    return weight, [t.requires_grad_() for t in tensors]


def _call(weight, x, bias, a, b, magnitude):
    return dora_linear(x, Member(weight, bias, [Adapter(a, b, 0.5)]), magnitude)


def test_no_rows_of_a_linear() -> None:
    weight, inputs = _inputs(0)
    y = _call(weight, *inputs)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (0, 70) and all(
        g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True)
    )


def test_only_what_needs_a_gradient_gets_one(isa: str) -> None:
    weight, inputs = _inputs()
    everything = torch.autograd.grad(_call(weight, *inputs).square().sum(), inputs)
    for i in range(len(inputs)):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        _call(weight, *alone).square().sum().backward()
        assert torch.equal(alone[i].grad, everything[i]) and [t.grad is None for t in alone].count(False) == 1
    with torch.no_grad():
        assert torch.equal(_call(weight, *inputs), _call(weight, *(t.detach() for t in inputs)))


def test_what_is_kept_for_backward(isa: str) -> None:
    """x, u and small things with everything to train; neither with a frozen adapter."""
    weight, inputs = _inputs(100)
    for trained, kept in ((True, 100 * (192 + 70 + 8)), (False, 0)):
        saved: list[torch.Tensor] = []
        for t in inputs[1:]:
            t.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
            _call(weight, *inputs)
        assert sum(t.numel() for t in saved if t.shape[:1] == (100,)) == kept


def test_strides_the_same_bits(isa: str) -> None:
    weight, (x, bias, a, b, magnitude) = _inputs(24)
    expected = _call(weight, x, bias, a, b, magnitude)
    strided = [torch.empty(t.shape[::-1]).t().copy_(t) for t in (x.detach(), a.detach(), b.detach())]
    assert torch.equal(_call(weight, strided[0], bias, strided[1], strided[2], magnitude), expected)
    assert torch.equal(_call(weight, x.view(4, 6, 192), bias, a, b, magnitude).view(24, 70), expected)


def test_every_output_is_written(isa: str) -> None:
    """Memory that torch hands out uninitialized is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        for m in (3, 12, 40):
            weight, inputs = _inputs(m)
            y = _call(weight, *inputs)
            assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), inputs)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_adapter_of_some_rows(isa: str) -> None:
    weight, (x, bias, a, b, magnitude) = _inputs(20)
    member = Member(weight, bias, [Adapter(a, b, 0.5, rows=(0, 7))])
    y, whole = dora_linear(x, member, magnitude), _call(weight, x, bias, a, b, magnitude)
    assert torch.allclose(y[:7], whole[:7], rtol=1e-4, atol=1e-5) and not torch.allclose(
        y[7:], whole[7:], rtol=1e-4, atol=1e-5
    )


def test_the_op_by_the_reference_and_its_registration(isa: str) -> None:
    weight, inputs = _inputs()
    x, bias, a, b, magnitude = (t.detach() for t in inputs)
    quant, squares = operands(weight)[1], row_squares(weight)
    base = (
        [weight.packed] * 2,
        [*quant[:6]] * 2,
        [*quant[6:]] * 2,
        [a, a.flip(0)],
        [b, b],
        [0.5, 2.0],
        [magnitude] * 2,
    )
    forward = (x, [bias, None], *base, [squares] * 2, [True, False])
    y, u, xa, norms = torch.ops.peftkern.dora_group_fwd(*forward)
    library.opcheck(torch.ops.peftkern.dora_group_fwd.default, forward)
    some = [True, False, True, True, False, False, True, True, False]
    for dy, needs in ((y, [True] * 9), (y, some), ([y[0], None], some)):
        backward = (dy, x, *base, norms, [u[0], y[1]], xa, needs)
        library.opcheck(torch.ops.peftkern.dora_group_bwd.default, backward)


def test_the_reference_is_the_definition() -> None:
    """Two members, in fp64. Of A and B the norm is a constant."""
    dense, other = torch.randn(9, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    wide = {"dtype": torch.float64, "requires_grad": True}
    x, bias, *magnitudes = (torch.randn(*shape, **wide) for shape in ((3, 12), (9,), (9,), (5,)))
    a = [torch.randn(2, 12, **wide), torch.randn(3, 12, **wide)]
    b = [torch.randn(9, 2, **wide), torch.randn(5, 3, **wide)]
    spec = op.Spec(
        (dense, other),
        (None,) * 12,
        (64, 256) * 2,
        (0.5, 2.0),
        tuple(w.square().sum(1) for w in (dense, other)),
    )

    def run(x, bias, *magnitudes):
        return op.dora_group(x, spec, (bias, None, *a, *b, *magnitudes))

    with use_backend("reference"):
        assert torch.autograd.gradcheck(run, (x, bias, *magnitudes))
        ours = torch.autograd.grad([y.sin().sum() for y in run(x, bias, *magnitudes)], (*a, *b))
    fixed = []
    for i, w in enumerate((dense, other)):
        scaling = spec.scalings[i]
        g = magnitudes[i].detach() / (w + scaling * b[i] @ a[i]).norm(dim=1).detach()
        y = g * (x @ w.t() + scaling * (x @ a[i].t() @ b[i].t()))
        fixed.append((y + bias if i == 0 else y).sin().sum())
    for got, expected in zip(ours, torch.autograd.grad(fixed, (*a, *b)), strict=True):
        torch.testing.assert_close(got, expected)


WIDTHS = (70, 33, 48)  # of three members, whose tasks share rows of two


def _group_case(m: int, kind: str, dtype: torch.dtype, composed: bool = False):
    """Ours, plain PyTorch's and the exact values; q has a bias, v no gradient of its magnitude. composed:
    ours are torch's products too, of as few rows."""
    made = [
        frozen_weight(n, 192, kind == "nf4" or (kind == "mixed" and i == 1), dtype)
        for i, n in enumerate(WIDTHS)
    ]
    x, bias = torch.randn(m, 192).to(dtype), torch.randn(WIDTHS[0]).to(dtype)
    dys = [torch.randn(m, n).to(dtype) for n in WIDTHS]
    a, b = (
        [(torch.randn(r, 192) / 14).to(dtype) for r in (8, 16, 40)],
        [(torch.randn(n, r) * 0.1).to(dtype) for n, r in zip(WIDTHS, (8, 16, 40), strict=True)],
    )
    magnitudes = [
        (dense.norm(dim=1) * (1 + 0.1 * torch.randn(len(dense)).double())).to(dtype) for _, dense in made
    ]

    def run(wide: torch.dtype, ours: bool) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(wide, copy=True).requires_grad_() for t in (x, bias, *a, *b, *magnitudes)]
        inputs, added, low_a, low_b, g = leaves[0], leaves[1], leaves[2:5], leaves[5:8], leaves[8:]
        biases = [added, None, None]
        if ours:
            members = [Member(made[i][0], biases[i], [Adapter(low_a[i], low_b[i], 0.5)]) for i in range(3)]
            ys = dora_group(inputs, members, [*g[:2], g[2].detach()])
        else:
            ys = []
            for i, (_, dense) in enumerate(made):
                norm = (dense + 0.5 * b[i].double() @ a[i].double()).norm(dim=1).to(wide)
                u = linear(inputs, dense.to(wide)) + 0.5 * inputs @ low_a[i].t() @ low_b[i].t()
                y = (g[i] if i < 2 else g[i].detach()) / norm * u
                ys.append(y if biases[i] is None else y + biases[i])
        grads = torch.autograd.grad(ys, leaves[:-1], [dy.to(wide) for dy in dys])
        names = ("x", "bias", *(f"{name}{i}" for name in ("a", "b") for i in range(3)), "m0", "m1")
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(names, grads, strict=True))

    ours, exact = run(dtype, True), run(torch.float64, False)
    if composed:
        return ours, run(dtype, False), exact, *in_other_orders(run)(dtype, False)
    return ours, products_of_many_rows(run)(dtype, False), exact


# Where the table says so: the vendor's product never serves a decoded weight in fp32.
REGIMES = [
    (regime, kind, dtype)
    for regime in ("gemm", "gemv", "vendor", "composed")
    for kind in ("nf4", "dense", "mixed")
    for dtype in DTYPES
    if regime != "vendor" or kind == "dense" or dtype != torch.float32
]


def test_the_vendor_never_multiplies_a_decoded_weight_in_fp32() -> None:
    assert not any("float32" in row.vendor for row in config.TABLE.values())


# Every regime with every kind of weight, the dtype in turn.
SERVED: dict[tuple[str, str], list[tuple]] = {}
for _served in REGIMES:
    SERVED.setdefault(_served[:2], []).append(_served)
TURNS = [cases[(i + i // 3) % len(cases)] for i, cases in enumerate(SERVED.values())]


@pytest.mark.parametrize("case", nightly(REGIMES, quick=TURNS), ids=lambda case: "-".join(map(str, case)))
def test_a_group_in_every_regime(
    isa: str, case: tuple[str, str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    regime, kind, dtype = case
    if regime == "composed":
        monkeypatch.setattr(op, "served", lambda x: False)
    elif regime != "gemv" or kind == "nf4":
        monkeypatch.setattr(cpu_rows, "choose", lambda **_: config.Choice(regime, "the test says so"))
    _judge([_group_case(8, kind, dtype, regime == "composed") for _ in range(8)])


@pytest.mark.parametrize("m", nightly([1, 3, 37, 600, 1100], quick=[3, 37, 600, 1100]))
def test_rows_of_a_group(isa: str, m: int) -> None:
    """Up to three blocks of rows, the first of which makes the norms. With one row dA and dB are outer
    products, of few errors a draw."""
    _judge([_group_case(m, "nf4", torch.float32) for _ in range({1: 800, 3: 8, 37: 8}.get(m, 1))])


def test_members_whose_result_is_not_used(isa: str) -> None:
    weights = [NF4Weight.from_dense(torch.randn(n, 192) * 0.05) for n in WIDTHS]
    a, b = [torch.randn(4, 192) / 14 for _ in WIDTHS], [torch.randn(n, 4) for n in WIDTHS]
    g = [torch.rand(n) + 0.5 for n in WIDTHS]
    leaves = [t.requires_grad_() for t in (torch.randn(40, 192), *a, *b, *g)]
    members = [Member(w, None, [Adapter(*pair)]) for w, *pair in zip(weights, a, b, strict=True)]
    y = dora_group(leaves[0], members, g)[1]
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    alone = dora_linear(leaves[0], members[1], g[1])
    expected = torch.autograd.grad(alone.square().sum(), leaves, allow_unused=True)
    assert [t is None for t in grads] == [t is None for t in expected] and sum(
        t is not None for t in grads
    ) == 4
    assert torch.equal(y, alone)
    for got, wanted in zip(grads, expected, strict=True):
        assert got is None or relative_norm(got, wanted.double()) < 1e-6  # dx is blocked by the group's width


def test_errors() -> None:
    weight, a, b = torch.randn(9, 32), torch.randn(4, 32), torch.randn(9, 4)
    member = Member(weight, None, [Adapter(a, b)])
    with pytest.raises(ValueError, match=r"magnitude: got torch.float32 \(8,\)"):
        dora_linear(torch.randn(2, 32), member, torch.randn(8))
    with pytest.raises(ValueError, match="member: got 0 adapters, expected one"):
        dora_linear(torch.randn(2, 32), Member(weight), torch.randn(9))
    with pytest.raises(ValueError, match="pass `dropped`"):
        dora_linear(
            torch.randn(2, 32), replace(member, adapters=[Adapter(a, b, dropout_p=0.1)]), torch.randn(9)
        )
    with pytest.raises(
        ValueError, match="members: got 1 members, 2 magnitudes, no squares; expected as many of each"
    ):
        dora_group(torch.randn(2, 32), [member], [torch.randn(9)] * 2)
    with pytest.raises(ValueError, match=r"members\[1\]: got 0 adapters, expected one"):
        dora_group(torch.randn(2, 32), [member, Member(weight)], [torch.randn(9)] * 2)
    with pytest.raises(ValueError, match=r"magnitudes\[1\]: got torch.float32 \(8,\)"):
        dora_group(torch.randn(2, 32), [member, member], [torch.randn(9), torch.randn(8)])
    with pytest.raises(ValueError, match=r"squares: got torch.float32 \(8,\)"):
        dora_linear(torch.randn(2, 32), member, torch.randn(9), torch.ones(8))
    with pytest.raises(ValueError, match=r"squares\[1\]: got torch.float32 \(8,\)"):
        dora_group(torch.randn(2, 32), [member, member], [torch.randn(9)] * 2, [torch.ones(9), torch.ones(8)])
