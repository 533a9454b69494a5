"""RMSNorm by the Triton kernels, against fp64 and bounded by plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern.ops.rms_norm import triton as kernels  # noqa: E402

from ..ops import test_add_rms_norm as added  # noqa: E402
from ..ops.bounds import assert_as_accurate  # noqa: E402
from ..ops.test_rms_norm import DTYPES, MODES, case, run, stock  # noqa: E402


def _check(
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    cast: str,
    offset: float,
) -> None:
    args = case(shape, dtype, weight_dtype)
    plain = run(stock, *(t.to(device) for t in args), offset, cast)
    exact = run(stock, *(t.double() for t in args), offset, cast)
    plain = {name: t.cpu() for name, t in plain.items()}  # on the device: the yardstick of a kernel on it
    x, weight, dy = (t.to(device) for t in args)
    y, rstd = kernels.forward(x, weight, 1e-5, offset, cast)
    dx, d_weight = kernels.backward(dy.to(y.dtype), x, weight, rstd, offset, cast, (True, True))
    for name, got in (("y", y), ("dx", dx), ("d_weight", d_weight)):
        assert got.dtype == plain[name].dtype
        assert_as_accurate(name, got.cpu(), plain[name], exact[name])


# Many rows of a program, the last ones missing; one row of it; two chunks of d_weight.
@pytest.mark.parametrize("shape", [(35, 40), (3, 1300), (9, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_every_output_and_gradient(device: str, shape, dtype: torch.dtype, cast: str, offset: float) -> None:
    _check(device, shape, dtype, dtype, cast, offset)


@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_rows_longer_than_a_block(
    device: str, cast: str, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 64)
    monkeypatch.setattr(kernels, "PIECE", 64)
    _check(device, (5, 150), torch.bfloat16, torch.bfloat16, cast, offset)


def test_a_weight_of_another_dtype(device: str) -> None:
    for cast, offset in MODES:
        _check(device, (6, 96), torch.bfloat16, torch.float32, cast, offset)


def test_chunks_of_d_weight_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 3)
    _check(device, (200, 24), torch.float32, torch.float32, "llama", 0.0)


def test_rows_that_lie_apart_and_none(device: str) -> None:
    wide, weight = torch.randn(7, 90, device=device), torch.rand(40, device=device)
    x, dy = wide[:, 9:49], torch.randn(7, 40, device=device)
    results = []
    for each in (x, x.contiguous()):
        y, rstd = kernels.forward(each, weight, 1e-5, 0.0, "llama")
        results.append((y, rstd, *kernels.backward(dy, each, weight, rstd, 0.0, "llama", (True, True))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kernels.forward(x[:0], weight, 1e-5, 0.0, "llama")[0].shape == (0, 40)
    assert not kernels.backward(dy[:0], x[:0], weight, rstd[:0], 0.0, "llama", (True, True))[1].any()


def _check_added(
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    cast: str,
    offset: float,
) -> None:
    args = added.case(shape, dtype, weight_dtype)
    exact = added.run(added.stock, *(t.double() for t in args), offset, cast)
    plain = added.run(added.stock, *(t.to(device) for t in args), offset, cast)
    plain = {name: t.cpu() for name, t in plain.items()}
    x, residual, weight, dy, ds = (t.to(device) for t in args)
    y, s, rstd = kernels.add_forward(x, residual, weight, 1e-5, offset, cast)
    d_sum, d_weight = kernels.add_backward(dy.to(y.dtype), ds, s, weight, rstd, offset, cast, True)
    assert torch.equal(s.cpu(), plain["s"]), "the stream has torch's bits"
    for name, got in (("y", y), ("dx", d_sum), ("d_residual", d_sum), ("d_weight", d_weight)):
        assert got.dtype == plain[name].dtype
        assert_as_accurate(name, got.cpu(), plain[name], exact[name])


@pytest.mark.parametrize("shape", [(35, 40), (3, 1300), (9, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_a_stream_is_added_in_both_directions(
    device: str, shape, dtype: torch.dtype, cast: str, offset: float
) -> None:
    _check_added(device, shape, dtype, dtype, cast, offset)


@pytest.mark.parametrize(("cast", "offset"), MODES)
def test_a_stream_of_rows_longer_than_a_block(
    device: str, cast: str, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 64)
    monkeypatch.setattr(kernels, "PIECE", 64)
    for weight_dtype in (torch.bfloat16, torch.float32):
        _check_added(device, (5, 150), torch.bfloat16, weight_dtype, cast, offset)


def test_streams_that_lie_apart_and_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element is written: what a launcher allocates holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    wide, weight = torch.randn(7, 90, device=device), torch.rand(40, device=device)
    x, residual, dy = wide[:, 9:49], wide[:, 50:90], torch.randn(40, 7, device=device).t()
    results = []
    for f in (lambda t: t, lambda t: t.contiguous()):
        y, s, rstd = kernels.add_forward(f(x), f(residual), weight, 1e-5, 0.0, "llama")
        results.append(
            (y, s, rstd, *kernels.add_backward(f(dy), f(residual), f(x), weight, rstd, 0.0, "llama", True))
        )
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))
    y, s, rstd = kernels.add_forward(x[:0], residual[:0], weight, 1e-5, 0.0, "llama")
    assert y.shape == s.shape == (0, 40)
    assert not kernels.add_backward(y, s, s, weight, rstd, 0.0, "llama", True)[1].any()
    assert kernels.add_backward(dy, residual, x, weight, results[0][2], 0.0, "llama", False)[1] is None


def test_a_stream_costs_no_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(kernels, "run", lambda call: launched.append(call.kernel.fn.__name__))
    x, weight = torch.randn(4, 40, device=device), torch.rand(40, device=device)
    _, s, rstd = kernels.add_forward(x, x, weight, 1e-5, 0.0, "llama")
    kernels.add_backward(x, x, s, weight, rstd, 0.0, "llama", False)
    assert launched == ["_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"]
