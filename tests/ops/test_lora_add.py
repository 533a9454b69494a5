"""The low-rank branch on its own against fp64, bounded by plain PyTorch's own error, on every ISA level."""

from __future__ import annotations

import pytest
import torch
from torch import library

from peftkern import functional, use_backend
from peftkern.functional import lora_add
from peftkern.ops.philox import dropout_scale

from ..cases import each_choice
from .bounds import assert_as_accurate, products_of_many_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 96, 64, 8),
    (3, 129, 128, 1),
    (5, 33, 72, 2),
    (17, 63, 100, 3),
    (64, 130, 257, 64),
    (600, 60, 96, 4),
    (20, 70, 40, 256),
]
NAMES = ("out", "d_y", "d_x", "d_lora_a", "d_lora_b", "d_bias")


def case(m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype) -> list[torch.Tensor]:
    """y, x, A, B, bias, and the gradient of the result."""
    adapters = ((torch.randn(r, k) / k**0.5).to(lora_dtype), (torch.randn(n, r) * 0.1).to(lora_dtype))
    return [
        torch.randn(m, n).to(dtype),
        torch.randn(m, k).to(dtype),
        *adapters,
        torch.randn(n).to(dtype),
        torch.randn(m, n).to(dtype),
    ]


def leaves(tensors: list[torch.Tensor], *dtypes: torch.dtype) -> list[torch.Tensor]:
    return [t.detach().to(d, copy=True).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


@products_of_many_rows
def plain(
    tensors: list[torch.Tensor], keep: torch.Tensor | None, dtype: torch.dtype, low: torch.dtype
) -> dict[str, torch.Tensor]:
    """PEFT's own expression, activations in `dtype` and adapters in `low`."""
    y, x, a, b, bias = inputs = leaves(tensors[:5], dtype, dtype, low, low, dtype)
    dropped = x.to(low) if keep is None else x.to(low) * keep.to(low)
    out = (y + bias + 0.7 * (dropped @ a.t() @ b.t())).to(dtype)
    out.backward(tensors[5].to(dtype))
    return dict(zip(NAMES, (out.detach(), *(t.grad for t in inputs)), strict=True))


def ours(tensors: list[torch.Tensor], dropout_p: float, seed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    inputs = leaves(tensors[:5], *(t.dtype for t in tensors[:5]))
    out = lora_add(*inputs, scaling=0.7, dropout_p=dropout_p, seed=seed)
    out.backward(tensors[5])
    return dict(zip(NAMES, (out.detach(), *(t.grad for t in inputs)), strict=True))


def check(
    *shape: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    draws: int = 8,
) -> None:
    runs, lora_dtype = [], lora_dtype or dtype
    seed = torch.tensor([1234567890123]) if dropout_p else None
    for _ in range(draws):
        tensors = case(*shape, dtype, lora_dtype)
        keep = dropout_scale(*tensors[1].shape, dropout_p, seed) if dropout_p else None
        results = (
            ours(tensors, dropout_p, seed),
            plain(tensors, keep, dtype, lora_dtype),
            plain(tensors, keep, *[torch.float64] * 2),
        )
        runs.append(results)
    for name in NAMES:
        got, stock, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == stock.dtype, name
        assert_as_accurate(name, got, stock, exact)


@pytest.mark.parametrize("shape, dtype", each_choice(SHAPES, DTYPES))
def test_output_and_every_gradient(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # A row of rank 1 has one error in all of its dx: many draws, or noise is compared.
    check(*shape, dtype=dtype, draws=64 if shape[0] < 8 else 8 if shape[0] < 64 else 2)


@pytest.mark.parametrize("m", [1, 40])
def test_adapters_in_fp32_beside_bf16_activations(isa: str, m: int) -> None:
    check(m, 70, 128, 8, dtype=torch.bfloat16, lora_dtype=torch.float32)


@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_is_the_qlora_linears_mask(isa: str, dropout_p: float) -> None:
    check(17, 63, 100, 3, dtype=torch.float32, dropout_p=dropout_p, draws=3)


def test_the_base_and_the_branch_are_the_fused_linear(isa: str) -> None:
    y, x, a, b, bias, _ = case(9, 40, 64, 4, torch.float32, torch.float32)
    w, seed = torch.randn(40, 64) / 8, torch.tensor([7])
    together = functional.qlora_linear(x, w, bias, a, b, scaling=0.7, dropout_p=0.3, seed=seed)
    apart = lora_add(x @ w.t(), x, a, b, bias, scaling=0.7, dropout_p=0.3, seed=seed)
    torch.testing.assert_close(apart, together)


def test_inputs_are_never_written_and_two_runs_give_the_same_bits(isa: str) -> None:
    tensors = case(130, 200, 320, 16, torch.bfloat16, torch.float32)
    before = [t.clone() for t in tensors]
    first, second = (ours(tensors, 0.1, torch.tensor([7])) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows(backend: str, dropout_p: float) -> None:
    with use_backend(backend):
        got = ours(
            case(0, 20, 64, 4, torch.float32, torch.float32),
            dropout_p,
            torch.tensor([1]) if dropout_p else None,
        )
    assert got["out"].shape == (0, 20) and got["d_x"].shape == (0, 64)
    assert not any(got[name].any() for name in ("d_x", "d_lora_a", "d_lora_b"))


def test_non_contiguous_inputs(isa: str) -> None:
    tensors = case(40, 32, 64, 4, torch.float32, torch.float32)
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    assert not any(t.is_contiguous() for t in strided if t.dim() == 2)
    got = lora_add(*strided[:5], scaling=0.7)
    assert torch.equal(got, lora_add(*tensors[:5], scaling=0.7))


def test_only_what_needs_a_gradient_gets_one_and_only_that_is_saved() -> None:
    y, x, a, b, bias, dy = case(8, 20, 64, 4, torch.float32, torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = lora_add(y, x, a, b.requires_grad_(), bias)
    out.backward(dy)
    assert b.grad is not None and all(t.grad is None for t in (y, x, a, bias))
    assert sorted(tuple(t.shape) for t in saved) == [(4, 64), (8, 4), (20, 4)]


def test_the_gradient_reaches_a_trainable_base() -> None:
    y, x, a, b, _, dy = case(8, 20, 64, 4, torch.float32, torch.float32)
    y.requires_grad_()
    lora_add(y, x, a, b).backward(dy)
    assert torch.equal(y.grad, dy)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference(dropout_p: float) -> None:
    from peftkern.ops.linear.lora_add import lora_add as op

    shapes = ((4, 6), (4, 10), (3, 10), (6, 3), (6,))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    seed = torch.tensor([5]) if dropout_p else None
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *args: op(*args, 0.7, dropout_p, seed), inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    y, x, a, b, bias, dy = case(5, 20, 64, 3, torch.float32, torch.float32)
    ops, seed, xa = torch.ops.peftkern, torch.tensor([3]), torch.randn(5, 3)
    with use_backend(backend):
        library.opcheck(ops.lora_add_fwd.default, (y, x, a, b, bias, 0.5, 0.1, seed))
        library.opcheck(ops.lora_add_fwd.default, (y, x, a, b, None, 0.5, 0.0, None))
        for needs in ([True] * 4, [True, False, False, False], [False, True, True, True]):
            library.opcheck(ops.lora_add_bwd.default, (dy, x, a, b, xa, 0.5, 0.1, seed, needs))


def test_compile_fullgraph_forward_and_backward() -> None:
    y, x, a, b, bias, _ = case(5, 20, 64, 3, torch.float32, torch.float32)
    inputs = leaves([y, x, a, b, bias], *[torch.float32] * 5)

    def f(*args):
        return lora_add(*args, scaling=0.5, dropout_p=0.2, seed=torch.tensor([3])).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(f(*inputs), inputs)
        )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(lora_a=None), ValueError, "lora_a: is missing"),
        (dict(y=torch.randn(5, 20).bfloat16()), TypeError, "y: got torch.bfloat16, x is torch.float32"),
        (dict(y=torch.randn(4, 20)), ValueError, r"y: got \(4, 20\)"),
        (
            dict(y=torch.randn(5, 20).double(), x=torch.randn(5, 64).double()),
            TypeError,
            "x: got torch.float64",
        ),
        (dict(x=torch.randn(5, 63)), ValueError, r"x: got shape \(5, 63\)"),
        (dict(lora_b=torch.randn(19, 3)), ValueError, r"lora_b: got shape \(19, 3\), expected \[20, 3\]"),
        (dict(bias=torch.randn(19)), ValueError, "bias: got"),
        (dict(dropout_p=1.5), ValueError, "dropout_p: got 1.5"),
        (dict(dropout_p=0.5, seed=torch.tensor([1.0])), ValueError, "seed: got torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_errors_name_the_argument(change: dict, error: type, message: str) -> None:
    arguments = (
        dict(
            zip(
                ("y", "x", "lora_a", "lora_b", "bias"),
                case(5, 20, 64, 3, torch.float32, torch.float32),
                strict=False,
            )
        )
        | change
    )
    with pytest.raises(error, match=message):
        lora_add(**arguments)
