"""Attention in bf16 tiles against the definition in fp64: masks, heads that share keys, sizes that fill no
tile, rows that see nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from peftkern import functional, use_backend
from peftkern.ops import attention as op
from peftkern.ops.attention import config, reference
from peftkern.runtime import backends

from .bounds import assert_as_accurate

LEVELS = [level for level in backends.native().isas() if level in ("avx512bf16", "amx")]
NAMES = ("y", "dq", "dk", "dv")
# batch, heads, heads of keys, queries, keys, dim
SHAPES = {
    "one tile": (1, 2, 1, 32, 32, 32),
    "a model's": (2, 9, 3, 256, 256, 64),
    "ragged": (1, 4, 2, 77, 77, 64),
    "narrow": (1, 2, 2, 40, 40, 20),
    "wide": (1, 2, 1, 50, 50, 256),
    "other keys": (2, 2, 2, 100, 133, 80),
    "long": (1, 1, 1, 600, 600, 64),
    "too long to keep its scores": (1, 1, 1, 2944, 2944, 16),
}


@pytest.fixture(params=[pytest.param(level, id=level) for level in LEVELS] or ["none"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each level that has the kernel, whether or not it is the faster one there."""
    if not LEVELS:
        pytest.skip("no bf16 products here; tests/native/test_bf16_emulated.py emulates the kernel")
    before = backends.native().isa()
    backends.native().set_isa(request.param)
    monkeypatch.setattr(config, "available", lambda: True)
    monkeypatch.setattr(config, "FEWEST_QUERIES", 1)
    yield request.param
    backends.native().set_isa(before)


def case(shape: tuple[int, ...], *, strided: bool = True) -> list[Tensor]:
    """q, k, v, dy in bf16; by rows of tokens, as a model has them, or by heads."""
    b, h, hk, s, t, d = shape

    def heads(count: int, rows: int) -> Tensor:
        x = torch.randn(b, rows, count, d).bfloat16().transpose(1, 2)
        return x if strided else x.contiguous()

    return [heads(h, s), heads(hk, t), heads(hk, t), heads(h, s)]


def some_mask(batch: int, s: int, t: int) -> Tensor:
    """Four keys of ten are hidden; of the first sample row 3 sees nothing and 32 keys are seen by nobody."""
    mask = torch.rand(batch, 1, s, t) > 0.4
    mask[0, :, min(3, s - 1)] = False
    mask[0, ..., 32:64] = False
    return mask


def differentiated(attention, inputs: list[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, dq, dk, dv; inputs q, k, v, dy."""
    *leaves, dy = (x if dtype is None else x.to(dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = attention(*leaves)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {name: x.detach() for name, x in zip(NAMES, (y, *grads), strict=True)}


def plainly(mask: Tensor | None, causal: bool, scale: float):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.forward(q, k, v, mask, causal, scale)[0]

    return attention


def torchs(mask: Tensor | None, causal: bool, scale: float):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)

    return attention


def ours(mask: Tensor | None, causal: bool, scale: float):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert config.native(q, k, v, mask, scale)
        return functional.scaled_dot_product_attention(q, k, v, mask=mask, causal=causal, scale=scale)

    return attention


def rounded(inputs: list[Tensor], *options) -> dict[str, Tensor]:
    """The definition in fp32 with its probabilities and gradients of scores rounded to bf16, as every product
    of 16-bit matrices has its operands."""
    mask, causal, scale = options
    *leaves, dy = (x.float().detach().requires_grad_() for x in inputs)
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    lse = reference.forward(q, k, v, *options)[1][..., None]
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ wide_k.transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = (seen.tril() if causal else seen) if mask is None else (seen.tril() if causal else seen) & mask
    p = torch.where(seen, torch.exp(scores - lse), 0.0).detach()
    y = (p.bfloat16().float() @ wide_v).bfloat16().float().detach()
    ds = (p * (dy @ wide_v.transpose(-1, -2) - (dy * y).sum(-1, keepdim=True))).bfloat16().float()
    shared = k.shape[0], k.shape[1], group, *k.shape[2:]
    dk, dv = ds.transpose(-1, -2) @ q, p.bfloat16().float().transpose(-1, -2) @ dy
    found = y, ds @ wide_k * scale, dk.reshape(shared).sum(2) * scale, dv.reshape(shared).sum(2)
    return {name: x.detach().bfloat16() for name, x in zip(NAMES, found, strict=True)}


def check(inputs: list[Tensor], mask: Tensor | None, causal: bool) -> None:
    options = mask, causal, inputs[0].shape[-1] ** -0.5
    exact = differentiated(plainly(*options), inputs, torch.float64)
    got, plain = differentiated(ours(*options), inputs), rounded(inputs, *options)
    for name in NAMES:
        assert got[name].dtype == torch.bfloat16
        assert_as_accurate(name, got[name], plain[name], exact[name])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_output_and_gradient(tiles: str, shape: tuple[int, ...], causal: bool) -> None:
    if causal and shape[3] != shape[4]:
        pytest.skip("a causal call has as many keys as queries")
    check(case(shape), None, causal)


@pytest.mark.parametrize("shape", [SHAPES["ragged"], SHAPES["other keys"], (1, 3, 1, 45, 700, 24)], ids=str)
@pytest.mark.parametrize("batches", ["each", "one"])
def test_a_mask(tiles: str, shape: tuple[int, ...], batches: str) -> None:
    """Rows that see nothing give 0 and get no gradient."""
    b, _, _, s, t, _ = shape
    inputs, mask = case(shape), some_mask(b if batches == "each" else 1, s, t)
    check(inputs, mask, False)
    got = differentiated(ours(mask, False, 0.2), inputs)
    assert not got["y"][0, :, 3].any() and not got["dq"][0, :, 3].any()
    if batches == "one" or b == 1:
        assert not got["dk"][:, :, 32:64].any() and not got["dv"][:, :, 32:64].any()


def test_no_less_accurate_than_torch(tiles: str) -> None:
    inputs, options = case(SHAPES["a model's"]), (None, True, 0.125)
    exact = differentiated(plainly(*options), inputs, torch.float64)
    got, theirs = differentiated(ours(*options), inputs), differentiated(torchs(*options), inputs)
    for name in NAMES:
        assert_as_accurate(name, got[name], theirs[name], exact[name])


def test_the_same_bits_for_any_threads_and_any_strides(tiles: str) -> None:
    inputs = case((2, 4, 2, 150, 150, 64))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(differentiated(ours(None, True, 0.1), inputs))
    finally:
        torch.set_num_threads(before)
    found.append(differentiated(ours(None, True, 0.1), [x.contiguous() for x in inputs]))
    everything = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    found.append(differentiated(ours(everything, False, 0.1), inputs))
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in NAMES)


def test_results_lie_as_their_tensors_do(tiles: str) -> None:
    inputs = case(SHAPES["ragged"])
    got = differentiated(ours(None, True, 0.1), inputs)
    assert got["y"].transpose(1, 2).is_contiguous()
    assert [got[name].stride() for name in NAMES[1:]] == [x.stride() for x in inputs[:3]]
    by_heads = differentiated(ours(None, True, 0.1), case(SHAPES["ragged"], strided=False))
    assert all(by_heads[name].is_contiguous() for name in NAMES[1:])


def test_nan_and_large_scores_are_torch_s(tiles: str) -> None:
    """A NaN reaches every row that sees it, and none of another query; scores of thousands overflow
    nothing."""
    q, k, v, dy = case((1, 1, 1, 64, 64, 32))
    q[0, 0, 7, 3], k[0, 0, 50, 1] = math.nan, math.nan
    y = ours(None, True, 1.0)(q, k, v)
    stock = torchs(None, True, 1.0)(q, k, v)
    assert torch.equal(y.isnan(), stock.isnan()) and y.isnan().any() and not y.isnan().all()
    q, k, v, dy = case((1, 1, 1, 64, 64, 32))
    v[0, 0, 40, 1] = math.nan
    y = ours(None, True, 1.0)(q, k, v)
    assert y[0, 0, 40:, 1].isnan().all() and not y[0, 0, :32].isnan().any()
    q, k, v, dy = case((1, 1, 1, 64, 64, 32))
    got = differentiated(ours(None, True, 1.0), [q * 100, k * 100, v, dy])
    exact = differentiated(plainly(None, True, 1.0), [q * 100, k * 100, v, dy], torch.float64)
    assert all(torch.isfinite(value).all() for value in got.values())
    torch.testing.assert_close(got["y"].double(), exact["y"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4, 8), (1, 2, 1, 0, 4, 8), (1, 2, 1, 4, 0, 8)], ids=str)
def test_nothing_to_do(tiles: str, shape: tuple[int, ...]) -> None:
    inputs = case(shape)
    got = differentiated(functional.scaled_dot_product_attention, inputs)
    assert [got[name].shape for name in NAMES] == [inputs[i].shape for i in (3, 0, 1, 2)]
    assert not any(value.any() for value in got.values())


def test_the_definition_s_gradients_are_autograd_s() -> None:
    inputs = [x.double() for x in case((2, 4, 2, 9, 7, 5))]
    mask = some_mask(2, 9, 7)
    for options in ((None, False, 0.3), (mask, False, 0.3)):
        exact = differentiated(plainly(*options), inputs)
        y, lse = reference.forward(*inputs[:3], *options)
        grads = reference.backward(inputs[3], *inputs[:3], y, lse, *options)
        for name, grad in zip(NAMES[1:], grads, strict=True):
            torch.testing.assert_close(grad, exact[name])


def test_backward_can_be_differentiated(tiles: str) -> None:
    q, k, v, _ = (x.requires_grad_() for x in case((1, 2, 1, 33, 33, 16)))
    options = None, True, 0.2
    (grad,) = torch.autograd.grad(ours(*options)(q, k, v).float().square().sum(), q, create_graph=True)
    second = torch.autograd.grad(grad.float().square().sum(), k)[0]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (grad,) = torch.autograd.grad(plainly(*options)(*wide).square().sum(), wide[0], create_graph=True)
    exact = torch.autograd.grad(grad.square().sum(), wide[1])[0]
    assert (second.double() - exact).norm() <= 0.05 * exact.norm()


def test_opcheck(tiles: str) -> None:
    q, k, v, dy = case((1, 2, 1, 33, 33, 16))
    library.opcheck(torch.ops.peftkern.attention_fwd, (q, k, v, None, True, 0.2))
    y, lse = torch.ops.peftkern.attention_fwd(q, k, v, None, True, 0.2)
    library.opcheck(torch.ops.peftkern.attention_bwd, (dy, q, k, v, y, lse, None, True, 0.2))


def test_in_a_graph_it_is_torch_s(tiles: str) -> None:
    torch._dynamo.reset()
    inputs = case((1, 2, 1, 40, 40, 32))
    compiled = torch.compile(
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, causal=True),
        fullgraph=True,
        backend="aot_eager",
    )
    got = differentiated(compiled, inputs)
    expected = differentiated(torchs(None, True, 32**-0.5), inputs)
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def test_its_flops_are_counted_as_torch_s(tiles: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, counted = case((1, 4, 2, 64, 64, 32)), []
    for attention in (ours, plainly):
        with FlopCounterMode(display=False) as counter:
            differentiated(attention(None, False, 0.2), inputs)
        counted.append(counter.get_total_flops())
    # The definition's backward pass does not compute the scores again.
    assert counted[0] == counted[1] // 6 * 7


def test_calls_that_it_does_not_serve_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_):
        raise AssertionError("the native kernel was called")

    monkeypatch.setattr(op, "attention", never)
    q, k, v, _ = case(SHAPES["ragged"])
    mask = some_mask(1, 77, 77)
    calls = [
        ([x.float() for x in (q, k, v)], {}),
        ([x.half() for x in (q, k, v)], {}),
        ([q[:, :, :1], k, v], {}),
        ([q, k, v], {"mask": mask.float()}),
        ([q, k, v], {"mask": mask.expand(1, 4, 77, 77)}),
        ([q, k, v], {"scale": -0.2}),
    ]
    for inputs, options in calls:
        got = functional.scaled_dot_product_attention(*inputs, **options)
        theirs = F.scaled_dot_product_attention(
            *inputs, options.get("mask"), scale=options.get("scale"), enable_gqa=True
        )
        assert torch.equal(got, theirs)
    with use_backend("reference"):
        assert not config.native(q, k, v, None, 1.0)


def test_arguments_are_checked() -> None:
    q, k, v, _ = case(SHAPES["ragged"])
    attention = functional.scaled_dot_product_attention
    for inputs, options, message in [
        ((q, k.float(), v), {}, "q, k, v: got"),
        ((q[0], k, v), {}, "q, k, v: got 3, 4 and 4 dimensions"),
        ((q, k[:, :, :5], v), {}, "k, v: got shapes"),
        ((q[:, :3], k, v), {}, "k: got 2 heads, expected a divisor of q's 3"),
        ((q, k, v), {"mask": torch.ones(77, 77, dtype=torch.bool)}, "mask: got shape"),
        ((q[:, :, :5], k, v), {"causal": True}, "causal: needs as many keys as queries"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            attention(*inputs, **options)
