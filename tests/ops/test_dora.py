"""DoRA's norm, its scaled columns and the whole linear against fp64 and plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import library
from torch.nn.functional import linear

from peftkern import NF4Weight, use_backend
from peftkern.functional import Adapter, Member, dora_linear, dora_norm, row_squares
from peftkern.ops.scale_columns import scale_columns

from .bounds import assert_as_accurate, relative_norm

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
        u, dy, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
        scale = 1 + 0.1 * torch.randn(shape[1])
        case = u, scale, bias, dy
        plain = lambda u, s, b: u * s.to(u.dtype) + b  # noqa: E731
        runs.append((_columns(*case, dtype, scale_columns), _columns(*case, dtype, plain), _columns(*case, torch.float64)))
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert_as_accurate(name, ours, plain, exact)


def test_scaled_columns_by_the_reference_and_in_fp64() -> None:
    u, scale = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64, requires_grad=True)
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


def test_the_norm_of_an_update_that_undoes_the_weight_is_not_nan() -> None:
    a, b = torch.randn(4, 32), torch.randn(9, 4)
    norm = dora_norm(b @ a, a, b, -1.0)
    assert torch.isfinite(norm).all() and (norm < 0.05).all()


def _dora(x, dense, bias, a, b, magnitude, dy, dtype, dropped=None):
    """Plain PyTorch, PEFT's formula, everything in `dtype` but the norm, which is exact."""
    x, bias, a, b, magnitude = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, bias, a, b, magnitude))
    norm = (dense + 0.5 * b.detach().double() @ a.detach().double()).norm(dim=1).to(dtype)
    g, w = magnitude / norm, dense.to(dtype)
    inner = x if dropped is None else x * dropped.to(dtype)
    y = linear(x, w, bias) + (g - 1) * linear(inner, w) + g * (0.5 * inner @ a.t() @ b.t())
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "d_bias": bias.grad, "d_lora_a": a.grad, "d_lora_b": b.grad, "d_magnitude": magnitude.grad}


def _ours(x, weight, bias, a, b, magnitude, dy, dropped=None):
    x, bias, a, b, magnitude = (t.detach().clone().requires_grad_() for t in (x, bias, a, b, magnitude))
    member = Member(weight, bias, [Adapter(a, b, 0.5)])
    y = dora_linear(x, member, magnitude, dropped=None if dropped is None else x * dropped.to(x.dtype))
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "d_bias": bias.grad, "d_lora_a": a.grad, "d_lora_b": b.grad, "d_magnitude": magnitude.grad}


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
        plain, exact = (_dora(x, dense, bias, a, b, magnitude, dy, d, dropped) for d in (dtype, torch.float64))
        runs.append((_ours(x, weight, bias, a, b, magnitude, dy, dropped), plain, exact))
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


def test_errors() -> None:
    weight, a, b = torch.randn(9, 32), torch.randn(4, 32), torch.randn(9, 4)
    member = Member(weight, None, [Adapter(a, b)])
    with pytest.raises(ValueError, match=r"magnitude: got torch.float32 \(8,\)"):
        dora_linear(torch.randn(2, 32), member, torch.randn(8))
    with pytest.raises(ValueError, match="member: got 0 adapters, expected one"):
        dora_linear(torch.randn(2, 32), Member(weight), torch.randn(9))
    with pytest.raises(ValueError, match="pass `dropped`"):
        dora_linear(torch.randn(2, 32), replace(member, adapters=[Adapter(a, b, dropout_p=0.1)]), torch.randn(9))
