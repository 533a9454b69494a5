"""Attention with a learned prefix: against the definition in fp64, by torch's fused kernel and by plain
products.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F

from peftkern import functional
from peftkern.ops.prefix_attention import own, reference

from .bounds import assert_as_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# (batch, heads, heads of k, queries, keys, prefix, width, width of v): one query on a cache, ragged sizes,
# one virtual token, unlike widths.
SHAPES = [
    (2, 4, 2, 7, 7, 3, 16, 16),
    (3, 9, 3, 1, 33, 5, 64, 64),
    (1, 2, 2, 5, 9, 1, 8, 8),
    (2, 6, 1, 33, 33, 20, 24, 24),
    (2, 2, 1, 6, 6, 4, 24, 16),
]
DRAWS = {torch.float64: 1, torch.float32: 40, torch.bfloat16: 8}  # the worst of few elements is noise
NAMES = ("y", "dq", "dk", "dv", "d_prefix_k", "d_prefix_v")


def case(shape, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as transposed views of [B, S, H, D], the prefix in fp32 or fp64, dy."""
    b, h, hkv, s, t, p, d, dv = shape
    q, k, v = (
        torch.randn(b, n, heads, w).to(dtype).transpose(1, 2)
        for n, heads, w in ((s, h, d), (t, hkv, d), (t, hkv, dv))
    )
    wide = torch.promote_types(dtype, torch.float32)
    return [
        q,
        k,
        v,
        torch.randn(hkv, p, d).to(wide),
        torch.randn(hkv, p, dv).to(wide),
        torch.randn(b, h, s, dv).to(dtype),
    ]


def masks(shape, kind: str) -> Tensor | None:
    """Of a batch with padding on the left, after whose tokens the first queries see no key at all."""
    b, _, _, s, t, *_ = shape
    if kind in ("none", "causal"):
        return None
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s).repeat(b, 1, 1, 1)
    seen[0, ..., : t // 3] = False
    least = {"min": torch.finfo(torch.float32).min, "inf": -torch.inf}
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, least[kind])


def run(f, args: list[Tensor]) -> dict[str, Tensor]:
    *operands, dy = args
    leaves = [each.detach().clone().requires_grad_() for each in operands]
    y = f(*leaves)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def reordered(f, args: list[Tensor]) -> dict[str, Tensor]:
    """`run` with the two widths in an order drawn anew, so that every sum over them is."""
    orders = [torch.randperm(args[0].shape[-1]), torch.randperm(args[2].shape[-1])]
    widths = (0, 0, 1, 0, 1, 1)  # of q, k, v, the prefix's two, dy: which of the orders
    results = run(f, [x[..., orders[w]] for x, w in zip(args, widths, strict=True)])
    backs = [order.argsort() for order in orders]
    return {
        name: result[..., backs[w]]
        for (name, result), w in zip(results.items(), (1, *widths[:5]), strict=True)
    }


def concatenated(q, k, v, pk, pv, mask, causal, scale) -> Tensor:
    """As it is done with torch alone: the prefix, in q's dtype and expanded over the batch, before the keys;
    one mask for both.
    """
    b, length = len(q), pk.shape[1]
    k, v = (torch.cat([each.to(q.dtype).expand(b, -1, -1, -1), own], 2) for each, own in ((pk, k), (pv, v)))
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
        mask = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def assert_close_or_as_accurate(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, others: Sequence[Tensor] = ()
) -> None:
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)
    else:
        assert_as_accurate(name, got, plain, exact, others)


def split(q, k, v, pk, pv, mask, causal, scale) -> Tensor:
    """The same split of the softmax in torch alone, in the prefix's dtype: two softmaxes, joined by their
    denominators.
    """
    dtype, (q, k, v) = q.dtype, (each.to(pk.dtype) for each in (q, k, v))
    k, v, pk, pv = (each.repeat_interleave(q.shape[1] // each.shape[-3], -3) for each in (k, v, pk, pv))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        least = torch.finfo(q.dtype).min
        scores = (
            scores.masked_fill(~mask, least)
            if mask.dtype == torch.bool
            else scores + mask.to(q.dtype).clamp(min=least)
        )
    prefix_scores = q @ pk.transpose(-1, -2) * scale
    total = torch.logaddexp(torch.logsumexp(scores, -1), torch.logsumexp(prefix_scores, -1))[..., None]
    return (torch.exp(scores - total) @ v + torch.exp(prefix_scores - total) @ pv).to(dtype)


CASES = [
    ("fused", SHAPES[0], "none"),
    ("fused", SHAPES[1], "bool"),
    ("fused", SHAPES[2], "none"),
    ("fused", SHAPES[3], "causal"),
    *(("fused", SHAPES[0], kind) for kind in ("bool", "min", "inf")),
    ("plain", SHAPES[0], "causal"),
    ("plain", SHAPES[0], "bool"),
    ("plain", SHAPES[4], "causal"),
    ("plain", SHAPES[4], "bool"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels, shape, kind", CASES, ids=str)
def test_every_output_and_gradient(
    kernels: str,
    shape,
    dtype: torch.dtype,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By torch's fused kernel and by plain products, which are all that serves widths that differ."""
    if kernels == "plain":
        monkeypatch.setattr(own, "_kernels", lambda *_: (own._plain, own._plain_backward))
    torch.manual_seed(0)
    mask, causal = masks(shape, kind), kind == "causal"
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()

    def ours(*args):
        return functional.prefix_attention(*args, mask=mask, causal=causal, scale=0.3)

    def stock(how):
        return lambda *args: how(*args, mask, causal, 0.3)

    def exactly(q, k, v, pk, pv):
        return reference.joint(q, k, v, exact_mask, pk, pv, causal, 0.3)

    runs = []
    for _ in range(DRAWS[dtype]):
        args = case(shape, dtype)
        plain = [run(stock(how), args) for how in (concatenated, split)]
        plain += [reordered(stock(how), args) for how in (concatenated, split) for _ in range(6)]
        runs.append((run(ours, args), run(exactly, [each.double() for each in args]), *plain))
    for name in NAMES:
        columns = ([r[i][name].flatten() for r in runs] for i in range(len(runs[0])))
        got, exact, *plain = map(torch.cat, columns)
        worse = max(plain[:2], key=lambda each: (each - exact).abs().max())
        assert_close_or_as_accurate(name, got, worse, exact, plain)


def test_against_the_definition_written_once_more() -> None:
    """One query and head at a time, in words of the paper: p = softmax of all scores, y = sum of p times the
    values.
    """
    q, k, v, pk, pv, _ = case((2, 4, 2, 5, 5, 3, 8, 8), torch.float64)
    y = functional.prefix_attention(q, k, v, pk, pv, causal=True)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                keys = torch.cat([pk[h // 2], k[b, h // 2, : i + 1]])
                p = torch.softmax(keys @ q[b, h, i] / 8**0.5, 0)
                torch.testing.assert_close(y[b, h, i], p @ torch.cat([pv[h // 2], v[b, h // 2, : i + 1]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    runs = []
    for _ in range(DRAWS[dtype]):
        q, _, _, pk, pv, dy = case(SHAPES[1], dtype)
        args = [torch.randn_like(dy), q, pk, pv, torch.randn(9).to(pk.dtype)]
        trio = []
        for f, convert in (
            (functional.prefix_gated, lambda t: t),
            (lambda y, q, *rest: reference.gated(y, q, *(t.to(q.dtype) for t in rest), 1 / 8), lambda t: t),
            (lambda *a: reference.gated(*a, 1 / 8), Tensor.double),
        ):
            leaves = [convert(each).detach().clone().requires_grad_() for each in args]
            y = f(*leaves)
            trio.append((y.detach(), *torch.autograd.grad(y, leaves, convert(dy))))
        runs.append(trio)
    for i, name in enumerate(("y", "dy", "dq", "d_prefix_k", "d_prefix_v", "d_gate")):
        assert_close_or_as_accurate(
            name, *(torch.cat([trio[j][i].flatten() for trio in runs]) for j in range(3))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_of_zero_changes_nothing_and_learns(dtype: torch.dtype) -> None:
    q, _, _, pk, pv, dy = case(SHAPES[0], dtype)
    y, gate = torch.randn_like(dy), torch.zeros(4, requires_grad=True)
    out = functional.prefix_gated(y, q, pk, pv, gate)
    assert torch.equal(out, y)
    assert torch.autograd.grad(out, gate, dy)[0].abs().min() > 0


def test_the_prefix_is_reduced_over_the_batch_in_fp32() -> None:
    """4,096 equal samples in bf16: their sum is 4,096 times one, which sums in bf16 do not give."""
    q, k, v, pk, pv, dy = case((1, 2, 1, 1, 4, 2, 8, 8), torch.bfloat16)

    def grads(count: int) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (pk, pv)]
        y = functional.prefix_attention(*(each.expand(count, -1, -1, -1) for each in (q, k, v)), *leaves)
        return list(torch.autograd.grad(y, leaves, dy.expand(count, -1, -1, -1)))

    for many, one in zip(grads(4096), grads(1), strict=True):
        assert many.dtype == torch.float32
        torch.testing.assert_close(many, 4096 * one, rtol=1e-4, atol=1e-3)


def test_saved_for_backward_is_what_attention_alone_saves() -> None:
    q, k, v, pk, pv, _ = case(SHAPES[3], torch.float32)
    leaves = [each.requires_grad_() for each in (q, k, v, pk, pv)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = functional.prefix_attention(*leaves, causal=True)
    fresh = [t for t in saved if all(t.data_ptr() != each.data_ptr() for each in leaves)]
    assert sorted(t.numel() for t in fresh) == sorted([y.numel(), y[..., 0].numel()])


def test_opcheck_and_compile() -> None:
    q, k, v, pk, pv, dy = case(SHAPES[0], torch.float32)
    ops, gate = torch.ops.peftkern, torch.randn(4)
    for mask, causal in ((None, True), (masks(SHAPES[0], "bool"), False)):
        y, lse = ops.prefix_attention_fwd(q, k, v, mask, pk, pv, causal, 0.3)
        library.opcheck(ops.prefix_attention_fwd.default, (q, k, v, mask, pk, pv, causal, 0.3))
        library.opcheck(ops.prefix_attention_bwd.default, (dy, q, k, v, mask, pk, pv, y, lse, causal, 0.3))
    library.opcheck(ops.prefix_gated_fwd.default, (y, q, pk, pv, gate, 0.3))
    library.opcheck(ops.prefix_gated_bwd.default, (dy, q, pk, pv, gate, 0.3))

    def f(q, k, v, pk, pv, gate):
        y = functional.prefix_attention(q, k, v, pk, pv, causal=True)
        return functional.prefix_gated(y, q, pk, pv, gate).square().sum()

    leaves = [each.clone().requires_grad_() for each in (q, k, v, pk, pv, gate)]
    expected = torch.autograd.grad(f(*leaves), leaves)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives() -> None:
    q, k, v, pk, pv, _ = (each.requires_grad_() for each in case((1, 2, 1, 2, 2, 1, 2, 2), torch.float64))
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *a: functional.prefix_attention(*a, causal=True),
        (q, k, v, pk, pv),
        fast_mode=True,
    )
    y = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(functional.prefix_gated, (y, q, pk, pv, gate), fast_mode=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"k": torch.zeros(2, 3, 7, 16), "v": torch.zeros(2, 3, 7, 16)},
            "k: got 3 heads, expected a divisor of q's 4",
        ),
        ({"v": torch.zeros(2, 2, 6, 16)}, "k, v: got shapes"),
        ({"prefix_k": torch.zeros(2, 3, 15)}, r"prefix_k: got shape \(2, 3, 15\), expected \[2, P, 16\]"),
        ({"prefix_v": torch.zeros(2, 4, 16)}, "prefix_v: got 4 virtual tokens, expected prefix_k's 3"),
        ({"mask": torch.zeros(2, 1, 7, 10)}, r"mask: got shape \(2, 1, 7, 10\)"),
        ({"mask": torch.zeros(2, 1, 7, 7, dtype=torch.long)}, "mask: got torch.int64"),
        ({"mask": torch.zeros(2, 1, 7, 7), "causal": True}, "causal: needs as many keys"),
        ({"q": torch.zeros(2, 4, 7, 16, dtype=torch.bfloat16)}, "q, k, v: got torch.bfloat16, torch.float32"),
    ],
)
def test_refusals(change, words: str) -> None:
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    arguments = dict(zip(names, case(SHAPES[0], torch.float32)[:5], strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=words):
        functional.prefix_attention(**arguments)
