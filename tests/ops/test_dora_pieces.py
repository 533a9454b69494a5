"""What DoRA is made of: scaled columns, squares of rows and the norm in closed form, against fp64 and plain
PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import library

from peftkern import NF4Weight, use_backend
from peftkern.formats.nf4 import operands
from peftkern.functional import (
    dora_norm,
    quantize_4bit,
    row_squares,
)
from peftkern.ops.scale_columns import scale_columns
from peftkern.runtime.native import native, weight_view

from .bounds import FACTOR, assert_as_accurate, relative_norm

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


def frozen_weight(n: int, k: int, four_bit: bool, dtype=torch.float32):
    weight = torch.randn(n, k) * 0.05
    weight = NF4Weight.from_dense(weight) if four_bit else weight.to(dtype)
    dense = weight if not four_bit else weight.dequantize(torch.float32)
    return weight, dense.double()


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("size", [0.0, 0.1, 3.0], ids=["no update", "small update", "large update"])
def test_the_norm_in_closed_form(four_bit: bool, size: float) -> None:
    """Within a few roundings of fp32: the terms do not cancel unless the update undoes the weight."""
    weight, dense = frozen_weight(70, 192, four_bit)
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
    weight = frozen_weight(70, 96, four_bit)[0]
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
