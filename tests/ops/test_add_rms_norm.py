"""A residual addition and the RMSNorm behind it: against fp64, bounded by plain PyTorch's own error, on every
ISA level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from peftkern import use_backend
from peftkern.functional import add_rms_norm, rms_norm
from peftkern.ops.rms_norm import reference

from ..cases import each_pair
from .bounds import assert_as_accurate
from .test_rms_norm import DTYPES, MODES, SHAPES
from .test_rms_norm import case as norm_case
from .test_rms_norm import stock as norm_stock

OPS = torch.ops.peftkern


def case(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight, and the gradients of y and of s. The sums are the norm's own cases: errors of dx
    go with 1 / |s|."""
    total, weight, dy = norm_case(shape, torch.float32, weight_dtype)
    x = torch.randn(shape)
    return [x.to(dtype), (total - x).to(dtype), weight, dy.to(dtype), torch.randn(shape).to(dtype)]


def stock(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor]:
    """What a decoder layer does, differentiable."""
    s = x if residual is None else residual + x
    return norm_stock(s, weight, eps, offset, cast), s


def ours(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, weight, eps=eps, offset=offset, cast=cast)


def run(
    f, x: Tensor, residual: Tensor | None, weight: Tensor, dy: Tensor | None, ds: Tensor | None, *mode
) -> dict[str, Tensor]:
    """Outputs and gradients; dy or ds None: that output is not used."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, residual, weight)]
    y, s = f(*leaves, 1e-5, *mode)
    used = [(out, d.to(out.dtype)) for out, d in ((y, dy), (s, ds)) if d is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    found = {"y": y.detach(), "s": s.detach()}
    return found | {
        name: t.grad
        for name, t in zip(("dx", "d_residual", "d_weight"), leaves, strict=True)
        if t is not None
    }


def check(shape, dtype, weight_dtype, cast, offset, draws, residual=True) -> None:
    runs = []
    for _ in range(draws):
        args = case(shape, dtype, weight_dtype)
        if not residual:
            args[1] = None
        double = [None if t is None else t.double() for t in args]
        runs.append([run(f, *a, offset, cast) for f, a in ((ours, args), (stock, args), (stock, double))])
        assert torch.equal(runs[-1][0]["s"], runs[-1][1]["s"]), "the stream has torch's bits"
    for name in runs[0][1]:
        got, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == plain.dtype, name
        assert_as_accurate(name, got, plain, exact)


@pytest.mark.parametrize("shape, mode, dtype", each_pair(SHAPES, MODES, DTYPES))
def test_every_output_and_gradient(isa: str, shape, mode: tuple[str, float], dtype: torch.dtype) -> None:
    check(shape, dtype, dtype, *mode, draws=max(2, min(200, 1024 // torch.Size(shape).numel())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_a_stream_without_an_addition(isa: str, dtype: torch.dtype, cast: str, offset: float) -> None:
    """A layer's first norm: s is x, and the stream's gradient is added all the same."""
    check((9, 57), dtype, dtype, cast, offset, draws=4, residual=False)
    x, weight = torch.randn(4, 8), torch.rand(8)
    with torch.no_grad():
        assert add_rms_norm(x, None, weight)[1] is x
    assert add_rms_norm(x.requires_grad_(), None, weight)[1].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_weights_of_another_dtype_promote_as_in_pytorch(isa: str, dtypes, cast: str, offset: float) -> None:
    check((7, 96), *dtypes, cast, offset, draws=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradients_sum_is_rounded_once(isa: str, dtype: torch.dtype) -> None:
    """Nearer to the exact value than autograd's sum of two rounded terms."""
    args = case((200, 64), dtype, dtype)
    got, plain, exact = (
        run(f, *a, 0.0, "llama")["dx"]
        for f, a in ((ours, args), (stock, args), (stock, [t.double() for t in args]))
    )
    error, plain_error = ((t.double() - exact).norm() for t in (got, plain))
    assert error < 0.95 * plain_error


def test_y_is_rms_norm_of_the_rounded_sum_and_nothing_else_changes_its_bits(isa: str) -> None:
    x, residual, weight, dy, _ = case((30, 70), torch.bfloat16, torch.bfloat16)
    y, s = add_rms_norm(x, residual, weight)
    assert torch.equal(y, rms_norm(s, weight)) and torch.equal(s, residual + x)
    with_zero, without = (
        run(ours, x, residual, weight, dy, ds, 0.0, "llama") for ds in (torch.zeros_like(s), None)
    )
    assert torch.equal(with_zero["dx"], without["dx"])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("used", ["y", "s"])
def test_an_output_nobody_uses(isa: str, used: str, residual: bool) -> None:
    args = case((5, 40), torch.float32, torch.float32)
    args[1] = args[1] if residual else None
    args[3 if used == "s" else 4] = None
    got, expected = run(ours, *args, 0.0, "llama"), run(stock, *args, 0.0, "llama")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value)


def test_each_input_gets_a_gradient_only_where_it_needs_one(isa: str) -> None:
    args = case((6, 40), torch.float32, torch.float32)
    whole = run(ours, *args, 1.0, "gemma")
    for needed in range(3):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate(args[:3])]
        torch.autograd.backward(ours(*leaves, 1e-5, 1.0, "gemma"), args[3:])
        for i, (leaf, name) in enumerate(zip(leaves, ("dx", "d_residual", "d_weight"), strict=True)):
            assert leaf.grad is None if i != needed else torch.equal(leaf.grad, whole[name])


def test_gradients_of_two_leaves_are_independent_tensors() -> None:
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    y, s = add_rms_norm(x, residual, torch.rand(8))
    (y.sum() + s.square().sum()).backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_reference_is_what_autograd_says(dtype: torch.dtype, cast: str, offset: float) -> None:
    args = case((4, 30), dtype, dtype)
    with use_backend("reference"):
        got = ours(*args[:3], 1e-5, offset, cast)
    assert all(torch.equal(a, b) for a, b in zip(got, stock(*args[:3], 1e-5, offset, cast), strict=True))
    x, residual, weight, dy, ds = (t.double() for t in args)
    exact = run(stock, x, residual, weight, dy, ds, offset, cast)
    y, s, rstd = reference.add_forward(x, residual, weight, 1e-5, offset, cast)
    d_sum, d_weight = reference.add_backward(dy, ds, s, weight, rstd, offset, cast, True)
    for got, name in ((y, "y"), (s, "s"), (d_sum, "dx"), (d_sum, "d_residual"), (d_weight, "d_weight")):
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


def test_strides_of_every_kind(isa: str) -> None:
    """Slices, transposed, expanded and gapped operands give the bits of contiguous ones."""
    wide, weight = torch.randn(12, 90), torch.rand(80)[::2]
    kinds = (
        wide[:, 5:45],
        torch.randn(40, 12).t(),
        torch.randn(40).expand(12, 40),
        torch.randn(12, 80)[:, ::2],
    )
    for x, residual in zip(kinds, (*kinds[1:], kinds[0]), strict=True):
        expected = OPS.add_rms_norm_fwd(
            x.contiguous(), residual.contiguous(), weight.contiguous(), 1e-5, 0.0, "llama"
        )
        got = OPS.add_rms_norm_fwd(x, residual, weight, 1e-5, 0.0, "llama")
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, expected, strict=True))
        grads = [
            OPS.add_rms_norm_bwd(f(residual), f(x), f(wide[:, 5:45]), weight, got[2], 0.0, "llama", True)
            for f in (lambda t: t, lambda t: t.contiguous())
        ]
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(*grads, strict=True))


def test_no_rows() -> None:
    x, weight = torch.randn(0, 30, requires_grad=True), torch.rand(30, requires_grad=True)
    y, s = add_rms_norm(x, torch.randn(0, 30), weight)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == (0, 30) and not weight.grad.any()


def test_two_runs_and_any_number_of_threads_give_the_same_bits(isa: str) -> None:
    args, threads = case((700, 130), torch.bfloat16, torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(ours, *args, 0.0, "llama"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("residual", [True, False])
def test_saves_the_stream_the_weight_and_one_number_a_row(residual: bool) -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(4, 6, 8, requires_grad=True), torch.rand(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, s = add_rms_norm(x, torch.randn(4, 6, 8) if residual else None, weight)
    assert [t.data_ptr() for t in saved[:2]] == [s.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((24,), torch.float32)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    x, residual, ds = torch.randn(3, 3, 5, 20).bfloat16()
    weight, dy = torch.rand(20), torch.randn(3, 5, 20)
    with use_backend(backend):
        for cast, offset in MODES:
            library.opcheck(OPS.add_rms_norm_fwd.default, (x, residual, weight, 1e-6, offset, cast))
            for with_d_weight in (True, False):
                d = dy if cast == "llama" else dy.bfloat16()
                library.opcheck(
                    OPS.add_rms_norm_bwd.default,
                    (d, ds, x, weight, torch.rand(15), offset, cast, with_d_weight),
                )


@pytest.mark.parametrize("uses", ["both", "y", "s"])
@pytest.mark.parametrize("residual", [True, False])
def test_compile_fullgraph_forward_and_backward(residual: bool, uses: str) -> None:
    torch._dynamo.reset()
    leaves = [
        torch.randn(6, 40, requires_grad=True),
        torch.randn(6, 40, requires_grad=True),
        torch.rand(40, requires_grad=True),
    ]

    def f(x, r, weight):
        y, s = add_rms_norm(x, r if residual else None, weight, offset=1.0, cast="gemma")
        used = {"both": y.square() * r + s, "y": y.square() * r, "s": s * r}[uses]
        return used.mul(x).sum()

    eager = torch.autograd.grad(f(*leaves), leaves, allow_unused=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(
            torch.autograd.grad(compiled(*leaves), leaves, allow_unused=True), eager, strict=True
        ):
            if expected is None:
                assert got is None or not got.any()  # a compiled graph gives zeros where eager gives nothing
            else:
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 4).double()}, TypeError, "x: got torch.float64"),
        ({"weight": torch.rand(5)}, ValueError, r"weight: got \(5,\)"),
        ({"residual": torch.randn(4)}, ValueError, r"residual: got torch.float32 \(4,\)"),
        ({"residual": torch.randn(3, 4).bfloat16()}, ValueError, "residual: got torch.bfloat16"),
        ({"residual": torch.randn(3, 4, device="meta")}, ValueError, "on meta"),
        ({"offset": 1.0}, ValueError, "offset: got 1.0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_are_checked(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        add_rms_norm(
            **({"x": torch.randn(3, 4), "residual": torch.randn(3, 4), "weight": torch.rand(4)} | change)
        )
