"""The whole QLoRA linear as a GPU runs it: every regime against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.functional import qlora_linear
from peftkern.ops.linear import tuned
from peftkern.ops.linear.config import GPU_TABLE
from peftkern.ops.philox import dropout_scale

from ..cases import each_choice, nightly
from ..ops.bounds import assert_as_accurate, products_of_many_rows

FUSED = replace(GPU_TABLE[89], gemv_max_m=0, fused_max_m=1 << 30)
SLAB = {gemm: replace(FUSED, fused_max_m=0, gemm=gemm) for gemm in ("cublas", "triton")}
ROWS = {
    "fused": FUSED,
    **SLAB,
    "cublas, slices": replace(SLAB["cublas"], slab_bytes=1 << 15),
    "triton, slices": replace(SLAB["triton"], slab_bytes=1 << 15),
}
NAMES = ("y", "dx", "d_lora_a", "d_lora_b", "d_bias")


def _case(
    device: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dense: bool
):
    weight = torch.randn(n, k) * 0.05
    with use_backend("reference"):  # on the CPU, whatever backend the caller forces for the device
        weight = weight.to(dtype) if dense else NF4Weight.from_dense(weight)
    x, dy, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n).to(dtype)
    a, b = (torch.randn(r, k) / k**0.5).to(lora_dtype), (torch.randn(n, r) * 0.1).to(lora_dtype)
    return weight.to(device), *(t.to(device) for t in (x, a, b, bias, dy))


def _ours(weight, x, a, b, bias, dy, dropout_p, seed, row) -> dict[str, torch.Tensor]:
    x, a, b, bias = (t.clone().requires_grad_() for t in (x, a, b, bias))
    with use_backend("triton"), tuned.use_row(row):
        y = qlora_linear(x, weight, bias, a, b, scaling=0.7, dropout_p=dropout_p, seed=seed)
        y.backward(dy)
    return dict(zip(NAMES, (y.detach(), x.grad, a.grad, b.grad, bias.grad), strict=True))


@products_of_many_rows
def _plain(dense, x, a, b, bias, dy, keep, dtype, low) -> dict[str, torch.Tensor]:
    w = dense.to(dtype)
    x, bias = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, bias))
    a, b = (t.detach().to(low, copy=True).requires_grad_() for t in (a, b))
    dropped = x.to(low) if keep is None else x.to(low) * keep.to(low)
    y = torch.nn.functional.linear(x, w, bias) + (0.7 * (dropped @ a.t() @ b.t())).to(dtype)
    y.backward(dy.to(dtype))
    return dict(zip(NAMES, (y.detach(), x.grad, a.grad, b.grad, bias.grad), strict=True))


def _check(
    device, row, m=70, n=200, k=256, r=5, dtype=torch.bfloat16, lora_dtype=None, dropout_p=0.0, dense=False
) -> None:
    lora_dtype = lora_dtype or dtype
    case = _case(device, m, n, k, r, dtype, lora_dtype, dense)
    weight, x = case[:2]
    seed = torch.tensor([1234567890123], device=device) if dropout_p else None
    keep = dropout_scale(m, k, dropout_p, seed) if dropout_p else None
    with use_backend("reference"):
        values = weight if dense else weight.dequantize(torch.float32)
    ours = _ours(*case, dropout_p, seed, row)
    plain = _plain(values, *case[1:], keep, dtype, lora_dtype)
    exact = _plain(values.double(), *case[1:], keep, torch.float64, torch.float64)
    for name in NAMES:
        assert ours[name].dtype == plain[name].dtype, name
        assert_as_accurate(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize(("row", "dropout_p"), each_choice(ROWS, [0.25, 0.0]))
def test_every_regime(device: str, row: str, dropout_p: float) -> None:
    _check(device, ROWS[row], dropout_p=dropout_p)


OPTIONS = [
    {"dtype": torch.float16},
    {"dtype": torch.float32},
    {"lora_dtype": torch.float32},
    {"r": 64},
    {"m": 1, "n": 33},
    {"dense": True, "dropout_p": 0.5},
]


@pytest.mark.parametrize(("options", "row"), each_choice(OPTIONS, SLAB))
def test_slabs(device: str, options: dict, row: str) -> None:
    _check(device, SLAB[row], **options)


def test_blocks_that_straddle_rows(device: str) -> None:
    _check(device, SLAB["cublas"], n=40, k=100, dropout_p=0.1)


@pytest.mark.parametrize("row", nightly(ROWS, quick=["fused", "triton", "cublas, slices"]))
def test_two_runs_give_the_same_bits(device: str, row: str) -> None:
    case, seed = (
        _case(device, 40, 96, 128, 4, torch.bfloat16, torch.bfloat16, False),
        torch.tensor([7], device=device),
    )
    first, second = (_ours(*case, 0.1, seed, ROWS[row]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
