"""Gated linear units: the native kernels against fp64, bounded by plain PyTorch's own error, on every ISA
level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F

from peftkern import use_backend
from peftkern.functional import glu
from peftkern.ops.glu import ACTIVATIONS, reference

from ..cases import each_pair
from .bounds import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
# One value, less than a vector, ragged, several pieces of a row, more rows than threads.
SHAPES = [(1, 1), (1, 3), (3, 50), (2, 3, 257), (2, 4099), (64, 320)]
OPS = torch.ops.peftkern


def _run(f, gate: Tensor, up: Tensor, dy: Tensor) -> dict[str, Tensor]:
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    h = f(gate, up)
    h.backward(dy)
    return {"h": h.detach(), "d_gate": gate.grad, "d_up": up.grad}


def _check(shape: tuple[int, ...], dtype: torch.dtype, activation: str, draws: int) -> None:
    runs = []
    for _ in range(draws):
        gate, up, dy = 2 * torch.randn(shape), torch.randn(shape), torch.randn(shape)
        args = [t.to(dtype) for t in (gate, up, dy)]
        ours = _run(lambda g, u: glu(g, u, activation=activation), *args)
        plain = _run(lambda g, u: ACTS[activation](g) * u, *args)
        exact = _run(lambda g, u: ACTS[activation](g) * u, *(t.double() for t in args))
        runs.append((ours, plain, exact))
    for name in runs[0][0]:
        got, plainly, exactly = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == dtype
        assert_as_accurate(name, got, plainly, exactly)


@pytest.mark.parametrize("shape, activation, dtype", each_pair(SHAPES, ACTIVATIONS, DTYPES))
def test_every_output_and_gradient(
    isa: str, shape: tuple[int, ...], activation: str, dtype: torch.dtype
) -> None:
    _check(shape, dtype, activation, draws=max(1, min(400, 2048 // torch.Size(shape).numel())))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_what_autograd_says(activation: str) -> None:
    gate, up, dy = (torch.randn(4, 30, dtype=torch.float64) for _ in range(3))
    exact = _run(lambda g, u: ACTS[activation](g) * u, gate, up, dy)
    d_gate, d_up, h = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(dy)
    reference.backward(dy, gate, up, activation, d_gate, d_up, h)
    for got, name in (
        (h, "h"),
        (reference.forward(gate, up, activation), "h"),
        (d_gate, "d_gate"),
        (d_up, "d_up"),
    ):
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


# Largest error in ulp of fp32, from each lower limit up to the next; what docstrings and math_impl.h promise.
ULP = {
    "silu": {-87.0: 3, 0.0: 2},
    "gelu": {-12.9: 12, -5.0: 5, 0.0: 3},
    "gelu_tanh": {-10.0: 200, -5.0: 40, -2.0: 6, 0.0: 2},
}


def _exact(x: Tensor, activation: str) -> Tensor:
    """In fp64, without cancellation in the tails."""
    x = x.double()
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_err_by_a_few_ulp(isa: str, activation: str) -> None:
    """Over the whole range in which the result is a normal number, dense near zero and in the tails."""
    small = torch.logspace(-30, 2, 4001)
    x = torch.cat([torch.linspace(-20, 20, 80001), torch.linspace(-90, 90, 20001), small, -small])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(torch.inf))])
    exact = _exact(x, activation)
    ulp = 2.0 ** (exact.abs().clamp_min(2.0**-126).log2().floor() - 23)
    error = (glu(x, torch.ones_like(x), activation=activation).double() - exact).abs() / ulp
    for low, allowed in ULP[activation].items():
        part = (x >= low) & (exact.abs() > 2.0**-120)
        above = [limit for limit in ULP[activation] if limit > low]
        part &= x < min(above) if above else True
        assert error[part].max() <= allowed, (low, error[part].max(), x[part][error[part].argmax()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_16_bit_results_are_exact_ones_rounded(isa: str, activation: str, dtype: torch.dtype) -> None:
    """Before rounding, an error of 2^-16 of the value is left (2^-15 in the tail of gelu_tanh), a sixteenth
    of fp16's half unit; where the results are subnormal, they are kept as such."""
    x = torch.cat([torch.linspace(-20, 20, 80001), torch.linspace(-90, 90, 20001)]).to(dtype)
    exact, smallest = _exact(x, activation), torch.finfo(dtype).tiny
    ulp = exact.abs().clamp_min(smallest).log2().floor().exp2() * torch.finfo(dtype).eps
    slack = 2.0**-15 if activation == "gelu_tanh" else 2.0**-16
    allowed = ulp / 2 + slack * exact.abs()
    error = (glu(x, torch.ones_like(x), activation=activation).double() - exact).abs()
    assert (error <= allowed).all(), x[(error > allowed)]
    one, tiny = torch.full((70,), 40.0, dtype=dtype), torch.arange(1, 71).to(dtype) * (smallest / 2**6)
    assert torch.equal(glu(one, tiny, activation=activation), 40 * tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values_are_as_exact_arithmetic_has_them(
    isa: str, activation: str, dtype: torch.dtype
) -> None:
    """Large ones saturate without NaN, in the slope too; inf and NaN go where the definition sends them; at
    every place in a vector.

    The definition is PyTorch's in fp64, one number at a time: its vectorized gelu gives NaN for inf on CPUs
    with AVX-512.
    """
    top = torch.finfo(dtype).max
    x = (
        torch.tensor([top, -top, 1e4, -1e4, 300.0, -300.0, 104.0, -104.0, 0.0, -0.0, 1e-7, -1e-7])
        .to(dtype)
        .repeat(3)
    )
    got = _run(lambda g, u: glu(g, u, activation=activation), x, torch.ones_like(x), torch.ones_like(x))
    exact = _run(
        lambda g, u: ACTS[activation](g) * u,
        *(t.double() for t in (x, torch.ones_like(x), torch.ones_like(x))),
    )
    for name in ("h", "d_up"):
        torch.testing.assert_close(
            got[name].double(), exact[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-30
        )
    torch.testing.assert_close(
        got["d_gate"].double(),
        torch.where(x > 1, 1.0, torch.where(x < -1, 0.0, 0.5)).double(),
        rtol=1e-6,
        atol=1e-6,
    )
    odd = torch.tensor([torch.inf, torch.nan, -torch.inf, 1.0] * 9).to(dtype)
    h, wanted = (
        glu(odd, torch.ones_like(odd), activation=activation),
        torch.stack([ACTS[activation](value) for value in odd.double()]),
    )
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if activation != "gelu_tanh" or kind is torch.isposinf:
            assert torch.equal(kind(h), kind(wanted)), kind
    assert torch.isnan(h[1::4]).all() and torch.isposinf(h[0::4]).all() and torch.isfinite(h[3::4]).all()


def _halves(m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    both = torch.randn(m, 2 * n).to(dtype)
    return both[:, :n], both[:, n:]


def test_halves_of_one_matrix_are_not_copied(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.ops import rows

    gate, up = _halves(6, 40)
    assert (
        rows.rows_of(gate).data_ptr() == gate.data_ptr()
        and rows.rows_of(up.view(2, 3, 40)).data_ptr() == up.data_ptr()
    )
    expected = glu(gate.contiguous(), up.contiguous(), activation="gelu")
    assert torch.equal(glu(gate, up, activation="gelu"), expected)


def test_gradients_into_halves_of_one_matrix(isa: str) -> None:
    """What a fused gate_up projection wants: no concatenation, nothing written beside the rows."""
    gate, up = _halves(5, 37)
    dy = torch.randn(5, 37)
    both, h = torch.full((5, 80), torch.nan), torch.full((5, 37), torch.nan)
    OPS.glu_bwd_out(dy, gate, up, "silu", both[:, :37], both[:, 40:77], h)
    d_gate, d_up, again = OPS.glu_bwd(dy, gate, up, "silu", True)
    assert torch.equal(both[:, :37], d_gate) and torch.equal(both[:, 40:77], d_up) and torch.equal(h, again)
    assert both[:, 37:40].isnan().all() and both[:, 77:].isnan().all()
    assert torch.equal(h, OPS.glu_fwd(gate, up, "silu"))


def test_strides_of_every_kind(isa: str) -> None:
    """Transposed, expanded and gapped inputs give the bits of contiguous ones."""
    gate, up, dy = torch.randn(12, 30), torch.randn(12, 30), torch.randn(12, 30)
    expected = _run(lambda g, u: glu(g, u, activation="gelu_tanh"), gate, up, dy)
    strided = gate.t().contiguous().t(), torch.empty(12, 60)[:, ::2].copy_(up), dy.t().contiguous().t()
    got_h = glu(strided[0], strided[1], activation="gelu_tanh")
    grads = OPS.glu_bwd(strided[2], strided[0], strided[1], "gelu_tanh", False)
    assert (
        torch.equal(got_h, expected["h"])
        and torch.equal(grads[0], expected["d_gate"])
        and torch.equal(grads[1], expected["d_up"])
    )
    assert grads[2].numel() == 0
    row = torch.randn(30).expand(12, 30)
    assert torch.equal(glu(row, up), glu(row.contiguous(), up))


@pytest.mark.parametrize("shape", [(0, 30), (3, 0), (2, 0, 5)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    gate, up = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    h = glu(gate, up)
    h.sum().backward()
    assert h.shape == gate.grad.shape == up.grad.shape == shape


def test_two_runs_give_the_same_bits(isa: str) -> None:
    args = [torch.randn(33, 4100).bfloat16() for _ in range(3)]
    first, second = (_run(lambda g, u: glu(g, u, activation="gelu"), *args) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saves_gate_and_up_alone() -> None:
    saved: list[Tensor] = []
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


def test_only_what_needs_a_gradient_gets_one() -> None:
    gate, up = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    glu(gate, up).sum().backward()
    assert gate.grad is None and up.grad is not None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    gate, up = _halves(5, 20)
    dy, outs = torch.randn(5, 20), [torch.empty(5, 20) for _ in range(3)]
    with use_backend(backend):
        for activation in ACTIVATIONS:
            library.opcheck(OPS.glu_fwd.default, (gate, up, activation))
            library.opcheck(OPS.glu_bwd.default, (dy, gate, up, activation, True))
            library.opcheck(OPS.glu_bwd.default, (dy, gate, up, activation, False))
        library.opcheck(OPS.glu_bwd_out.default, (dy, gate, up, "silu", *outs))
        library.opcheck(OPS.glu_bwd_out.default, (dy, gate, up, "silu", *outs[:2], None))


def test_compile_fullgraph_forward_and_backward() -> None:
    both = torch.randn(6, 40, requires_grad=True)

    def f(both):
        return glu(*both.chunk(2, -1), activation="gelu").square().sum()

    (eager,) = torch.autograd.grad(f(both), both)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(compiled(both), both)[0], eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.randn(3, 4).double()}, TypeError, "gate: got torch.float64"),
        ({"gate": torch.tensor(1.0)}, ValueError, "gate: got a scalar"),
        ({"up": torch.randn(3, 5)}, ValueError, "up: got torch.float32 \\(3, 5\\)"),
        ({"up": torch.randn(3, 4).bfloat16()}, ValueError, "up: got torch.bfloat16"),
        ({"up": torch.randn(3, 4, device="meta")}, ValueError, "on meta"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_are_checked(change: dict, error: type, message: str) -> None:
    arguments = {"gate": torch.randn(3, 4), "up": torch.randn(3, 4), "activation": "silu"} | change
    with pytest.raises(error, match=message):
        glu(**arguments)
