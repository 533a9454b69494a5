"""The QLoRA linear's native kernels against fp64, bounded by plain PyTorch's own error, on every ISA
level."""

from __future__ import annotations

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.formats.nf4 import operands
from peftkern.functional import linear_4bit, qlora_linear
from peftkern.ops.linear import config, cpu_rows
from peftkern.ops.philox import dropout_scale

from .bounds import assert_as_accurate, products_of_many_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, K, R): one row, both GEMV limits, ragged everything, K that straddles blocks, several row blocks,
# ranks of every class.
SHAPES = [
    (1, 96, 64, 8),
    (2, 33, 128, 1),
    (4, 50, 192, 3),
    (5, 64, 64, 16),
    (17, 63, 100, 3),
    (33, 130, 257, 5),
    (64, 200, 320, 64),
    (70, 97, 576, 16),
    (600, 60, 96, 4),
    (20, 70, 40, 256),
]


def _case(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    lora_dtype: torch.dtype | None = None,
    bias: bool = True,
    dense=None,
    **quant,
):
    lora_dtype = lora_dtype or dtype
    weight = torch.randn(n, k) * 0.05
    weight = weight.to(dense) if dense else NF4Weight.from_dense(weight, **quant)
    x = torch.randn(m, k).to(dtype)
    a, b = (torch.randn(r, k) / k**0.5).to(lora_dtype), (torch.randn(n, r) * 0.1).to(lora_dtype)
    return weight, x, a, b, torch.randn(n).to(dtype) if bias else None, torch.randn(m, n).to(dtype)


@products_of_many_rows
def _plain(weight, x, a, b, bias, dy, scaling, keep, dtype, low_dtype):
    """Plain PyTorch, activations in `dtype`, adapters in `low_dtype`: the outputs and every gradient, by
    name."""
    w = weight.to(dtype)
    x, a, b = (
        t.detach().to(d, copy=True).requires_grad_() for t, d in ((x, dtype), (a, low_dtype), (b, low_dtype))
    )
    bias = None if bias is None else bias.detach().to(dtype, copy=True).requires_grad_()
    dropped = x.to(low_dtype) * keep.to(low_dtype) if keep is not None else x.to(low_dtype)
    y = torch.nn.functional.linear(x, w, bias) + (scaling * (dropped @ a.t() @ b.t())).to(dtype)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "d_lora_a": a.grad, "d_lora_b": b.grad} | (
        {} if bias is None else {"d_bias": bias.grad}
    )


def _ours(weight, x, a, b, bias, dy, scaling, dropout_p, seed):
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    bias = None if bias is None else bias.clone().requires_grad_()
    y = qlora_linear(x, weight, bias, a, b, scaling=scaling, dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "d_lora_a": a.grad, "d_lora_b": b.grad} | (
        {} if bias is None else {"d_bias": bias.grad}
    )


def _check(*shape_and_dtype, draws: int = 8, scaling: float = 0.7, dropout_p: float = 0.0, **options) -> None:
    """Every output and gradient of several random draws together: errors of a handful of numbers would
    compare noise."""
    runs = [_run(_case(*shape_and_dtype, **options), scaling, dropout_p) for _ in range(draws)]
    for name in runs[0][0]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


def _run(case, scaling: float, dropout_p: float):
    weight, x, a, b, bias, dy = case
    seed = torch.tensor([1234567890123]) if dropout_p else None
    keep = dropout_scale(*x.shape, dropout_p, seed) if dropout_p else None
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    ours = _ours(weight, x, a, b, bias, dy, scaling, dropout_p, seed)
    plain = _plain(dense, x, a, b, bias, dy, scaling, keep, x.dtype, a.dtype)
    exact = _plain(dense, x, a, b, bias, dy, scaling, keep, torch.float64, torch.float64)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in exact.items()}
    return ours, plain, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_and_gradient(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    _check(*shape, dtype, draws=8 if shape[0] < 64 else 2)


@pytest.mark.parametrize("shape", [(3, 50, 192, 3), (17, 63, 100, 3), (600, 60, 96, 4)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout(isa: str, shape: tuple[int, int, int, int], dropout_p: float) -> None:
    _check(*shape, torch.float32, dropout_p=dropout_p, draws=3)


@pytest.mark.parametrize("size", [(600, 100), pytest.param((2650, 4096), marks=pytest.mark.slow)], ids=str)
def test_backward_draws_the_mask_of_forward_with_and_without_room_to_keep_it(
    isa: str, size: tuple[int, int]
) -> None:
    _backward_draws_the_mask_of_forward(*size)


def test_backward_draws_a_mask_again_that_is_too_large_to_be_kept() -> None:
    """On the level that this CPU takes; the nightly run has the others."""
    _backward_draws_the_mask_of_forward(2650, 4096)


def _backward_draws_the_mask_of_forward(m: int, k: int) -> None:
    """dx draws a mask and keeps its bits for dA, up to 1.25 MiB of them, 10.5 million elements; above, and
    without dx, dA draws again."""
    _check(m, 8, k, 2, torch.float32, dropout_p=0.25, draws=1)
    x, w, seed = torch.randn(m, k), NF4Weight.from_dense(torch.randn(8, k)), torch.tensor([77])
    a, b, dy = torch.randn(2, k, requires_grad=True), torch.randn(8, 2), torch.randn(m, 8)

    def d_lora_a(x: torch.Tensor) -> torch.Tensor:
        y = qlora_linear(x, w, None, a, b, scaling=0.5, dropout_p=0.25, seed=seed)
        return torch.autograd.grad(y, [t for t in (a, x) if t.requires_grad], dy)[0]

    assert torch.equal(d_lora_a(x), d_lora_a(x.clone().requires_grad_()))


@pytest.mark.parametrize(
    "quant",
    [
        {"nested": False},
        {"quant_type": "fp4"},
        {"blocksize": 32},
        {"blocksize": 4096},
        {"blocksize": 128, "nested": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [2, 40])
def test_formats(isa: str, quant: dict, m: int) -> None:
    _check(m, 70, 384, 4, torch.float32, **quant)


@pytest.mark.parametrize(
    "quant", [{"blocksize": 32}, {"blocksize": 64}, {"blocksize": 128, "nested": False}], ids=str
)
@pytest.mark.parametrize("k", [128, 384, 576, 640, 1152])
def test_few_rows_of_blocks_that_end_within_a_step(
    isa: str, k: int, quant: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level that takes several blocks and rows of W at once meets rows that are not a multiple of
    either."""
    monkeypatch.setattr(cpu_rows, "choose", lambda **_: config.Choice("gemv", "forced by the test"))
    weight = NF4Weight.from_dense(torch.randn(37, k), **quant)
    dense, xs = weight.dequantize(torch.float32), [torch.randn(m, k) for m in range(1, 10)]
    ours = torch.cat([qlora_linear(x, weight) for x in xs])
    plain = products_of_many_rows(lambda: torch.cat([x @ dense.t() for x in xs]))()
    assert_as_accurate("y", ours, plain, torch.cat([x.double() @ dense.double().t() for x in xs]))


@pytest.mark.parametrize("m", [1, 40])
def test_adapters_in_fp32_beside_bf16_activations(isa: str, m: int) -> None:
    """PEFT's default (autocast_adapter_dtype): gradients come in the adapters' dtype."""
    _check(m, 70, 128, 8, torch.bfloat16, lora_dtype=torch.float32)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 40])
def test_dense_base(isa: str, weight_dtype: torch.dtype, m: int) -> None:
    _check(m, 70, 128, 8, torch.float32, dense=weight_dtype)


@pytest.mark.parametrize("regime", ["gemv", "gemm", "vendor"])
def test_every_regime_serves_the_same_call(isa: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits between regimes are a matter of speed alone; forward and backward of all three pass the same
    bounds."""
    monkeypatch.setattr(cpu_rows, "choose", lambda **_: config.Choice(regime, "forced by the test"))
    _check(4, 600, 192, 8, torch.float32, dropout_p=0.25)
    _check(4, 600, 192, 8, torch.bfloat16, bias=False)


def test_two_runs_give_the_same_bits(isa: str) -> None:
    case = _case(130, 200, 320, 16, torch.bfloat16)
    first, second = (_ours(*case, 0.5, 0.1, torch.tensor([7])) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_rows() -> None:
    weight, x, a, b, _, _ = _case(3, 20, 64, 4, torch.float32)
    ours = _ours(weight, x[:0], a, b, None, torch.empty(0, 20), 1.0, 0.0, None)
    assert ours["y"].shape == (0, 20) and ours["dx"].shape == (0, 64)
    assert not ours["d_lora_a"].any() and not ours["d_lora_b"].any()


def test_only_what_needs_a_gradient_gets_one() -> None:
    weight, x, a, b, bias, dy = _case(8, 20, 64, 4, torch.float32)
    b.requires_grad_()
    qlora_linear(x, weight, bias, a, b).backward(dy)
    assert b.grad is not None and x.grad is None and a.grad is None and bias.grad is None


def test_non_contiguous_inputs(isa: str) -> None:
    weight, x, a, b, _, dy = _case(40, 32, 64, 4, torch.float32)
    strided, wide = torch.empty(64, 40).t(), torch.empty(4, 128)[:, ::2]
    strided.copy_(x)
    wide.copy_(a)
    assert not strided.is_contiguous() and not wide.is_contiguous()
    y = qlora_linear(strided.requires_grad_(), weight, lora_a=wide.requires_grad_(), lora_b=b)
    y.backward(dy.t().contiguous().t())
    plain = _ours(weight, x, a, b, None, dy, 1.0, 0.0, None)
    assert (
        torch.equal(y.detach(), plain["y"])
        and torch.equal(strided.grad, plain["dx"])
        and torch.equal(wide.grad, plain["d_lora_a"])
    )


def test_saved_for_backward() -> None:
    """x, packed, the absmax parts, A, B, xa and nothing else: in particular no dense weight and no mask."""
    weight, x, a, b, _, _ = _case(64, 96, 128, 8, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qlora_linear(
            x.requires_grad_(), weight, lora_a=a.requires_grad_(), lora_b=b.requires_grad_(), dropout_p=0.1
        )
    small = sum(t.numel() * t.element_size() for t in saved)
    parts = sum(t.numel() * t.element_size() for t in (x, a, b)) + weight.nbytes + 64 * 8 * 4 + 8
    assert small == parts


def test_bare_frozen_linear_saves_no_activation() -> None:
    weight, x, *_ = _case(64, 96, 128, 8, torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_4bit(x.requires_grad_(), weight)
    assert sum(t.numel() * t.element_size() for t in saved) == weight.nbytes


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference(dropout_p: float) -> None:
    from peftkern.ops.linear import apply

    w = torch.randn(6, 10, dtype=torch.float64)
    x, bias, a, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 10), (6,), (3, 10), (6, 3))
    )
    seed = torch.tensor([5]) if dropout_p else None
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, bias, a, b: apply(x, *operands(w), 6, bias, a, b, 0.7, dropout_p, seed), (x, bias, a, b)
        )
