"""Rotary position embedding: the native kernel against fp64, bounded by plain PyTorch's own error, on every
ISA level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from peftkern import use_backend
from peftkern.functional import rope

from .bounds import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, q heads, k heads, seq, dim, rotary): one token, ragged halves, partial rotation, none at all, heads
# of every usual size.
SHAPES = [
    (1, 4, 2, 1, 64, 64),
    (2, 3, 1, 5, 22, 22),
    (2, 4, 4, 7, 96, 72),
    (1, 2, 2, 9, 80, 20),
    (3, 9, 3, 33, 128, 128),
    (1, 2, 1, 4, 8, 0),
]
OPS = torch.ops.peftkern


def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What the models' own functions do."""

    def turn(x: Tensor) -> Tensor:
        part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        half = part.shape[-1] // 2
        rotated = torch.cat([-part[..., half:], part[..., :half]], -1)
        return torch.cat([part * cos.unsqueeze(1) + rotated * sin.unsqueeze(1), rest], -1)

    return turn(q), turn(k)


def case(shape, dtype: torch.dtype, *, angle_batch: int = 1) -> list[Tensor]:
    """q, k, cos, sin, dq, dk; q and k transposed views of [B, S, H * D], the gradients contiguous."""
    b, hq, hk, s, d, rotary = shape
    q, k = (torch.randn(b, s, h, d).to(dtype).transpose(1, 2) for h in (hq, hk))
    angle = torch.randn(angle_batch, s, rotary // 2).repeat(1, 1, 2) * 3
    return [
        q,
        k,
        angle.cos().to(dtype),
        angle.sin().to(dtype),
        torch.randn(b, hq, s, d).to(dtype),
        torch.randn(b, hk, s, d).to(dtype),
    ]


def run(f, q, k, cos, sin, dq, dk) -> dict[str, Tensor]:
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    out = f(q, k, cos, sin)
    torch.autograd.backward(out, (dq, dk))
    return {"q": out[0].detach(), "k": out[1].detach(), "dq": q.grad, "dk": k.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("own_angles", [True, False])
def test_every_output_and_gradient(isa: str, shape, dtype: torch.dtype, own_angles: bool) -> None:
    draws = [case(shape, dtype, angle_batch=shape[0] if own_angles else 1) for _ in range(4)]
    runs = [
        [run(f, *a) for f, a in ((rope, args), (stock, args), (stock, [t.double() for t in args]))]
        for args in draws
    ]
    for name in runs[0][0]:
        got, plain, exact = (torch.cat([r[i][name].flatten() for r in runs]) for i in range(3))
        assert got.dtype == dtype
        assert_as_accurate(name, got, plain, exact)


@pytest.mark.parametrize("angle_dtype", DTYPES, ids=str)
def test_angles_of_another_dtype(isa: str, angle_dtype: torch.dtype) -> None:
    """The result keeps q's dtype, rounded once from fp32."""
    q, k, cos, sin, *_ = case(SHAPES[1], torch.bfloat16)
    cos, sin = cos.to(angle_dtype), sin.to(angle_dtype)
    for got, exact in zip(
        rope(q, k, cos, sin), stock(q.double(), k.double(), cos.double(), sin.double()), strict=True
    ):
        assert got.dtype == torch.bfloat16
        assert_as_accurate("rotated", got, exact.bfloat16(), exact)


def test_reference_is_the_stock_function_and_its_gradient() -> None:
    args = [t.double() for t in case(SHAPES[2], torch.float32, angle_batch=2)]
    args[2], args[3] = (
        torch.rand_like(args[2]),
        torch.rand_like(args[3]),
    )  # halves that differ, which a mere inverse rotation would miss
    with use_backend("reference"):
        got = OPS.rope(*args[:4], False, [True, True])
        grads = OPS.rope(args[4], args[5], args[2], args[3], True, [True, True])
    exact = run(stock, *args)
    for ours, name in zip((*got, *grads), ("q", "k", "dq", "dk"), strict=True):
        torch.testing.assert_close(ours, exact[name], rtol=1e-13, atol=1e-13)


def test_gradient_where_the_halves_of_the_angles_differ(isa: str) -> None:
    args = case(SHAPES[2], torch.float32)
    args[2], args[3] = torch.rand_like(args[2]), torch.rand_like(args[3])
    ours, plain, exact = run(rope, *args), run(stock, *args), run(stock, *(t.double() for t in args))
    for name in ours:
        assert_as_accurate(name, ours[name], plain[name], exact[name])


def test_results_lie_in_memory_as_the_inputs_do(isa: str) -> None:
    """And the gradients as the inputs, whatever attention's backward returns: both reshapes are free."""
    q, k, cos, sin, dq, dk = case(SHAPES[4], torch.float32)
    for by_seq in (True, False):
        ins = [x if by_seq else x.contiguous() for x in (q, k)]
        results = [*rope(*ins, cos, sin), *OPS.rope(dq, dk, cos, sin, True, [by_seq] * 2)]
        for x in results:
            assert (x.transpose(1, 2) if by_seq else x).is_contiguous()
    leaf = torch.randn(3, 33, 9 * 128, requires_grad=True)
    rotated, _ = rope(leaf.view(3, 33, 9, 128).transpose(1, 2), k, cos, sin)
    (grad,) = torch.autograd.grad(rotated, leaf, dq)
    assert grad.is_contiguous()


def test_strides_of_every_kind(isa: str) -> None:
    """Slices of one fused projection, contiguous heads and gapped elements: the same bits."""
    b, s, d = 2, 6, 24
    fused = torch.randn(b, s, (4 + 2 + 2) * d)
    q, k = (
        fused[..., : 4 * d].view(b, s, 4, d).transpose(1, 2),
        fused[..., 4 * d : 6 * d].view(b, s, 2, d).transpose(1, 2),
    )
    angle = torch.rand(s, 1, d).transpose(0, 1)
    expected = rope(q.contiguous(), k.contiguous(), angle.cos().contiguous(), angle.sin().contiguous())
    gapped = torch.empty(b, 4, s, 2 * d)[..., ::2].copy_(q)
    for each in ((q, k), (gapped, k)):
        for got, want in zip(rope(*each, angle.cos(), angle.sin()), expected, strict=True):
            assert torch.equal(got, want)
    assert rope(q, k, angle.cos(), angle.sin())[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 8, 8), (2, 2, 1, 0, 8, 8), (2, 0, 0, 3, 8, 8)], ids=str)
def test_nothing(shape) -> None:
    out = run(rope, *case(shape, torch.float32))
    assert out["q"].shape == out["dq"].shape == (shape[0], shape[1], shape[3], shape[4])


def test_two_runs_give_the_same_bits(isa: str) -> None:
    args = case(SHAPES[4], torch.bfloat16)
    first, second = run(rope, *args), run(rope, *args)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saves_the_angles_alone() -> None:
    saved: list[Tensor] = []
    q, k, cos, sin, *_ = case(SHAPES[0], torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()]


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, cos, sin, dq, dk = case(SHAPES[0], torch.float32)
    rotated, _ = rope(q.requires_grad_(), k, cos, sin)
    rotated.backward(dq)
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    q, k, cos, sin, dq, dk = case(SHAPES[2], torch.float32, angle_batch=2)
    with use_backend(backend):
        library.opcheck(OPS.rope.default, (q, k, cos, sin, False, [True, False]))
        library.opcheck(OPS.rope.default, (dq, dk, cos, sin, True, [False, True]))


def test_compile_fullgraph_forward_and_backward() -> None:
    q, k, cos, sin, *_ = case(SHAPES[2], torch.float32)
    q.requires_grad_(), k.requires_grad_()

    def f(q, k):
        a, b = rope(q, k, cos, sin)
        return (a.square() * 0.5).sum() + b.sin().sum()

    eager = torch.autograd.grad(f(q, k), (q, k))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(torch.autograd.grad(compiled(q, k), (q, k)), eager, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(1, 2, 3, 8).double()}, TypeError, "q: got torch.float64"),
        ({"q": torch.randn(2, 3, 8)}, ValueError, "q: got shape"),
        ({"k": torch.randn(1, 2, 4, 8)}, ValueError, "k: got shape"),
        ({"k": torch.randn(1, 2, 3, 8).bfloat16()}, ValueError, "k: got torch.bfloat16"),
        ({"cos": torch.randn(2, 3, 8)}, ValueError, "cos: got shape"),
        ({"cos": torch.randn(1, 3, 7)}, ValueError, "an even number up to 8"),
        ({"cos": torch.randn(1, 3, 10)}, ValueError, "an even number up to 8"),
        ({"sin": torch.randn(1, 3, 6)}, ValueError, "sin: got"),
        ({"sin": torch.randn(1, 3, 8, device="meta")}, ValueError, "sin: is on meta"),
        ({"cos": torch.randn(1, 3, 8, requires_grad=True)}, ValueError, "detach"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_are_checked(change: dict, error: type, message: str) -> None:
    good = {
        "q": torch.randn(1, 2, 3, 8),
        "k": torch.randn(1, 1, 3, 8),
        "cos": torch.randn(1, 3, 8),
        "sin": torch.randn(1, 3, 8),
    }
    with pytest.raises(error, match=message):
        rope(**(good | change))
