"""DoRA's norm, its scaled columns and the whole linear against fp64 and plain PyTorch."""

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
    dora_norm,
    quantize_4bit,
    row_squares,
)
from peftkern.ops import dora_group as op
from peftkern.ops.qlora_linear import config, cpu_rows
from peftkern.ops.scale_columns import scale_columns
from peftkern.runtime.native import native, weight_view

from ..cases import nightly
from .bounds import FACTOR, assert_as_accurate, products_of_many_rows, relative_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _columns(u, scale, bias, dy, dtype, run=lambda u, scale, bias: u * scale + bias):
    u, bias = (t.detach().to(dtype).requires_grad_() for t in (u, bias))
    scale = scale.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y = run(u, scale, bias)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "du": u.grad, "d_scale": scale.grad, "d_bias": bias.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 96), (1000, 70)], ids=str)
def test_scaled_columns(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    runs = []
    for _ in range(4):
        u, dy, bias = (
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
            torch.randn(shape[1]).to(dtype),
        )
        scale = 1 + 0.1 * torch.randn(shape[1])
        case = u, scale, bias, dy
        plain = lambda u, s, b: u * s.to(u.dtype) + b  # noqa: E731
        runs.append(
            (
                _columns(*case, dtype, scale_columns),
                _columns(*case, dtype, plain),
                _columns(*case, torch.float64),
            )
        )
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert_as_accurate(name, ours, plain, exact)


def test_scaled_columns_by_the_reference_and_in_fp64() -> None:
    u, scale = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(7, dtype=torch.float64, requires_grad=True),
    )
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(scale_columns, (u, scale, bias))
    ops = torch.ops.peftkern
    u, scale, bias = u.detach().float(), scale.detach().float(), bias.detach().float()
    library.opcheck(ops.scale_columns_fwd.default, (u, scale, bias))
    library.opcheck(ops.scale_columns_bwd.default, (u, u, scale, [True, True, False]))


def test_no_rows_and_the_same_bits() -> None:
    u, scale = torch.randn(0, 7, requires_grad=True), torch.ones(7, requires_grad=True)
    scale_columns(u, scale, None).sum().backward()
    assert u.grad.shape == (0, 7) and not scale.grad.any()
    case = torch.randn(300, 50), torch.randn(50), torch.randn(50), torch.randn(300, 50)
    first, second = (_columns(*case, torch.float32, scale_columns) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _weights(n: int, k: int, four_bit: bool, dtype=torch.float32):
    weight = torch.randn(n, k) * 0.05
    weight = NF4Weight.from_dense(weight) if four_bit else weight.to(dtype)
    dense = weight if not four_bit else weight.dequantize(torch.float32)
    return weight, dense.double()


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("size", [0.0, 0.1, 3.0], ids=["no update", "small update", "large update"])
def test_the_norm_in_closed_form(four_bit: bool, size: float) -> None:
    """Within a few roundings of fp32: the terms do not cancel unless the update undoes the weight."""
    weight, dense = _weights(70, 192, four_bit)
    a, b = torch.randn(8, 192) / 14, torch.randn(70, 8) * size
    exact = (dense + 0.5 * b.double() @ a.double()).norm(dim=1)
    assert relative_norm(dora_norm(weight, a, b, 0.5), exact) < 4 * torch.finfo(torch.float32).eps
    assert torch.equal(dora_norm(weight, a, b, 0.5), dora_norm(weight, a, b, 0.5, row_squares(weight)))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", [(1, 64), (70, 33), (300, 1000), (3, 70000), (5, 1)], ids=str)
def test_squares_of_rows(shape: tuple[int, int], nested: bool, isa: str) -> None:
    """The bits that the kernel gives for the whole dense weight; what is written to the codes counts."""
    weight = quantize_4bit(torch.randn(shape), nested=nested)
    squares = row_squares(weight)
    assert torch.equal(squares, _squares_of_dense(weight.dequantize(torch.float32)))
    weight.packed.data.bitwise_xor_(0x35)
    assert not torch.equal(row_squares(weight), squares)
    assert torch.equal(row_squares(weight), _squares_of_dense(weight.dequantize(torch.float32)))


def _squares_of_dense(weight):
    """By the native kernel; the op leaves a dense weight to torch."""
    squares = torch.full((weight.shape[0],), torch.nan)
    native().row_squares(weight_view(weight, operands(weight)[1], *weight.shape), squares.data_ptr())
    return squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 2048), (7, 5001), (3, 17), (2, 70000)], ids=str)
def test_squares_of_rows_are_exact_but_for_roundings(
    shape: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    """Within the contract: by torch's own norm of the same values."""
    dense = (torch.randn(shape) * 0.05).to(dtype)
    for weight, values in ((dense, dense), *_four_bit(dense)):
        exact, plain = (
            values.double().square().sum(1),
            torch.linalg.vector_norm(values.float(), dim=1).square(),
        )
        # the contract's two roundings
        bound = max(FACTOR * relative_norm(plain, exact), torch.finfo(torch.float32).eps)
        assert relative_norm(row_squares(weight), exact) <= bound
        assert relative_norm(_squares_of_dense(values), exact) <= bound


def _four_bit(dense):
    """Every format, each with its exact values; blocks of 4096 lie across rows."""
    for quant_type, blocksize, nested in (("nf4", 64, True), ("fp4", 64, False), ("nf4", 4096, False)):
        weight = quantize_4bit(dense.float(), quant_type=quant_type, blocksize=blocksize, nested=nested)
        yield weight, weight.dequantize(torch.float32)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_the_op_of_squares_by_the_reference_and_its_registration(four_bit: bool) -> None:
    weight = _weights(70, 96, four_bit)[0]
    data, quant = operands(weight)
    library.opcheck(torch.ops.peftkern.row_squares.default, (data, *quant, 70, 96))
    ours = row_squares(weight)
    assert torch.equal(torch.compile(row_squares, backend="aot_eager", fullgraph=True)(weight), ours)
    with use_backend("reference"):
        torch.testing.assert_close(row_squares(weight), ours, rtol=1e-6, atol=0)


def test_the_norm_of_an_update_that_undoes_the_weight_is_not_nan() -> None:
    a, b = torch.randn(4, 32), torch.randn(9, 4)
    norm = dora_norm(b @ a, a, b, -1.0)
    assert torch.isfinite(norm).all() and (norm < 0.05).all()


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
        weight, dense = _weights(70, 192, four_bit, dtype)
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
    weight, dense = _weights(70, 192, four_bit, dtype)
    x, dy, bias = torch.randn(m, 192).to(dtype), torch.randn(m, 70).to(dtype), torch.randn(70).to(dtype)
    a, b = (torch.randn(r, 192) / 14).to(dtype), (torch.randn(70, r) * 0.1).to(dtype)
    magnitude = (dense.norm(dim=1) * (1 + 0.1 * torch.randn(70).double())).to(dtype)
    plain, exact = (_dora(x, dense, bias, a, b, magnitude, dy, d) for d in (dtype, torch.float64))
    return _ours(x, weight, bias, a, b, magnitude, dy), plain, exact


def _judge(runs: list) -> None:
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


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


def _group_case(m: int, kind: str, dtype: torch.dtype):
    """Ours, plain PyTorch's and the exact values; q has a bias, v no gradient of its magnitude."""
    made = [
        _weights(n, 192, kind == "nf4" or (kind == "mixed" and i == 1), dtype) for i, n in enumerate(WIDTHS)
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

    return run(dtype, True), products_of_many_rows(run)(dtype, False), run(torch.float64, False)


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
    _judge([_group_case(8, kind, dtype) for _ in range(8)])


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
