"""RMSNorm: the native kernels against fp64, bounded by plain PyTorch's own error, on every ISA level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from peftkern import use_backend
from peftkern.functional import rms_norm
from peftkern.ops.rms_norm import reference

from ..cases import each_pair
from .bounds import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0)]
SHAPES = [(1, 13), (3, 11), (1, 64), (2, 3, 100), (9, 257), (600, 33), (40, 576)]
OPS = torch.ops.peftkern


def stock(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> Tensor:
    """What the models' own modules do, differentiable."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "llama":
        return weight * normal.to(x.dtype)
    return (normal * (offset + weight.to(wide.dtype))).to(x.dtype)


def run(f, x: Tensor, weight: Tensor, dy: Tensor, *mode) -> dict[str, Tensor]:
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = f(x, weight, 1e-5, *mode)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "d_weight": weight.grad}


def ours(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> Tensor:
    return rms_norm(x, weight, eps=eps, offset=offset, cast=cast)


def case(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    """Rows of various size, within a factor of two: errors of dx go with 1 / size, and the worst is to be one
    of many."""
    x = torch.randn(shape) * (1 + torch.rand(*shape[:-1], 1))
    return [x.to(dtype), (torch.rand(shape[-1]) + 0.5).to(weight_dtype), torch.randn(shape).to(dtype)]


def check(shape, dtype, weight_dtype, cast, offset, draws) -> None:
    runs = []
    for _ in range(draws):
        args = case(shape, dtype, weight_dtype)
        double = [t.double() for t in args]
        runs.append([run(f, *a, offset, cast) for f, a in ((ours, args), (stock, args), (stock, double))])
    for name in runs[0][0]:
        got, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == plain.dtype, name
        assert_as_accurate(name, got, plain, exact)


@pytest.mark.parametrize("shape, mode, dtype", each_pair(SHAPES, MODES, DTYPES))
def test_every_output_and_gradient(isa: str, shape, mode: tuple[str, float], dtype: torch.dtype) -> None:
    check(shape, dtype, dtype, *mode, draws=max(2, min(200, 1024 // torch.Size(shape).numel())))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_weights_of_another_dtype_promote_as_in_pytorch(isa: str, dtypes, cast: str, offset: float) -> None:
    check((7, 96), *dtypes, cast, offset, draws=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_reference_is_what_autograd_says(dtype: torch.dtype, cast: str, offset: float) -> None:
    x, weight, dy = case((4, 30), dtype, dtype)
    with use_backend("reference"):
        assert torch.equal(ours(x, weight, 1e-5, offset, cast), stock(x, weight, 1e-5, offset, cast))
    x, weight, dy = x.double(), weight.double(), dy.double()
    exact = run(stock, x, weight, dy, offset, cast)
    y, rstd = reference.forward(x, weight, 1e-5, offset, cast)
    dx, d_weight = reference.backward(dy, x, weight, rstd, offset, cast, (True, True))
    for got, name in ((y, "y"), (dx, "dx"), (d_weight, "d_weight")):
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


def test_the_casts_differ_in_16_bits_and_ours_follow(isa: str) -> None:
    """Rounding before the weight is another function than rounding after it; each is met nearly everywhere,
    bit for bit."""
    x, weight, _ = case((50, 64), torch.bfloat16, torch.bfloat16)
    results = {}
    for cast, offset in MODES[:2]:
        results[cast] = stock(x, weight, 1e-5, offset, cast)
        assert (ours(x, weight, 1e-5, offset, cast) == results[cast]).double().mean() > 0.99
    assert (results["llama"] == results["gemma"]).double().mean() < 0.9


def test_rows_of_one_element(isa: str) -> None:
    """dx is all cancellation, so that its error is measured by what cancels, dy * weight / |x|."""
    x, weight, dy = torch.randn(500, 1), torch.rand(1) + 0.5, torch.randn(500, 1)
    got, exact = (
        run(ours, x, weight, dy, 0.0, "llama"),
        run(stock, x.double(), weight.double(), dy.double(), 0.0, "llama"),
    )
    torch.testing.assert_close(got["y"].double(), exact["y"], rtol=4e-7, atol=0)
    assert ((got["dx"].double() - exact["dx"]).abs() <= 4e-7 * (dy * weight / x).abs()).all()


def test_extreme_rows(isa: str) -> None:
    """Zeros, one NaN, one inf, tiny and large values: as in the models' own modules."""
    x = torch.randn(6, 40)
    x[0], x[1, 3], x[2, 39], x[3], x[4] = 0.0, torch.nan, torch.inf, 1e-22, 1e18
    weight = torch.rand(40)
    for cast, offset in MODES:
        for eps in (1e-6, 0.0):
            torch.testing.assert_close(
                ours(x, weight, eps, offset, cast),
                stock(x, weight, eps, offset, cast),
                equal_nan=True,
                rtol=1e-6,
                atol=1e-30,
            )


def test_strides_of_every_kind(isa: str) -> None:
    """Slices of a wider matrix are read where they lie; transposed, expanded and gapped ones give the bits of
    contiguous ones."""
    wide, weight, dy = torch.randn(12, 90), torch.rand(80)[::2], torch.randn(40, 12).t()
    for x in (
        wide[:, 5:45],
        torch.randn(40, 12).t(),
        torch.randn(40).expand(12, 40),
        torch.randn(12, 80)[:, ::2],
    ):
        expected = run(ours, x.contiguous(), weight.contiguous(), dy.contiguous(), 0.0, "llama")
        y, rstd = OPS.rms_norm_fwd(x, weight, 1e-5, 0.0, "llama")
        dx, d_weight = OPS.rms_norm_bwd(dy, x, weight, rstd, 0.0, "llama", [True, True])
        for got, name in ((y, "y"), (dx, "dx"), (d_weight, "d_weight")):
            assert torch.equal(got, expected[name]) and got.is_contiguous(), name


def test_no_rows() -> None:
    x, weight = torch.randn(0, 30, requires_grad=True), torch.rand(30, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 30) and not weight.grad.any()


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


def test_saves_x_weight_and_one_number_a_row() -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(4, 6, 8, requires_grad=True), torch.rand(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((24,), torch.float32)]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_needs_a_gradient_gets_one(isa: str, needs) -> None:
    x, weight, dy = case((9, 40), torch.float32, torch.float32)
    both = run(ours, x, weight, dy, 1.0, "gemma")
    x.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    ours(x, weight, 1e-5, 1.0, "gemma").backward(dy)
    for tensor, need, name in ((x, needs[0], "dx"), (weight, needs[1], "d_weight")):
        assert (tensor.grad is not None) is need and (not need or torch.equal(tensor.grad, both[name]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    x, weight, dy = torch.randn(3, 5, 20).bfloat16(), torch.rand(20), torch.randn(3, 5, 20)
    with use_backend(backend):
        for cast, offset in MODES:
            library.opcheck(OPS.rms_norm_fwd.default, (x, weight, 1e-6, offset, cast))
            for needs in ([True, True], [True, False], [False, True]):
                d = dy if cast == "llama" else dy.bfloat16()
                library.opcheck(OPS.rms_norm_bwd.default, (d, x, weight, torch.rand(15), offset, cast, needs))


def test_compile_fullgraph_forward_and_backward() -> None:
    x, weight = torch.randn(6, 40, requires_grad=True), torch.rand(40, requires_grad=True)

    def f(x, weight):
        return rms_norm(x, weight, offset=1.0, cast="gemma").square().mul(x).sum()

    eager = torch.autograd.grad(f(x, weight), (x, weight))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), eager, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 4).double()}, TypeError, "x: got torch.float64"),
        ({"weight": torch.rand(4).double()}, TypeError, "weight: got torch.float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got shape"),
        ({"weight": torch.rand(5)}, ValueError, r"weight: got \(5,\)"),
        ({"weight": torch.rand(4, device="meta")}, ValueError, "on meta"),
        ({"cast": "bert"}, ValueError, "cast: got 'bert'"),
        ({"offset": 1.0}, ValueError, "offset: got 1.0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_are_checked(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(**({"x": torch.randn(3, 4), "weight": torch.rand(4)} | change))
