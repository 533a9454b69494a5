"""Causal attention of grouped queries, forward + backward, in the forms a model can ask torch for: which of
them is fastest on this device.

`patch` leaves attention as transformers calls it, but on CPUs: with bf16 products bf16 heads are multiplied
in tiles of our own, and where torch computes 16-bit products by naive loops the same function gets fp32
operands.
FlexAttention has no backward on a CPU (torch 2.13), and is measured where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern.patching.cpu_attention import in_fp32, in_tiles
from peftkern.patching.weights import slow_products

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, close, within_bound

__all__ = ["build", "specs"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GROUP = 3  # heads of q for one of k and v


def specs(small: bool) -> list[Spec]:
    """n: heads, k: their size, m: tokens, in two sequences; the largest is SmolLM2-135M's attention over 2 x
    1,024."""
    lengths = (64,) if small else (512, 2048)
    return [
        Spec("attention", "forward + backward", dtype, 9, 64, m)
        for m in lengths
        for dtype in ("float32", "bfloat16")
    ]


def _heads(x: Tensor) -> Tensor:
    b, kv, s, d = x.shape
    return x[:, :, None].expand(b, kv, GROUP, s, d).reshape(b, kv * GROUP, s, d)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: [B, S, H, D], in q's dtype, the softmax in fp32 at least."""
    scores = q @ _heads(k).transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (torch.softmax(wide, -1).to(q.dtype) @ _heads(v)).transpose(1, 2)


def _stock(q: Tensor, k: Tensor, v: Tensor, wrap: Callable = lambda function: function) -> Tensor:
    """As a causal model of transformers calls SDPA where nothing is padded."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(num_key_value_groups=GROUP, is_causal=True, training=True)
    return wrap(sdpa_attention_forward)(module, q, k, v, None, scaling=q.shape[-1] ** -0.5)[0]


def _wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _stock(q, k, v, lambda function: partial(in_fp32, function, (q.dtype,)))


def _tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In tiles where the kernel serves the call."""
    return _stock(q, k, v, lambda function: partial(in_tiles, function))


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, _heads(k), _heads(v), is_causal=True).transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, _heads(k), _heads(v), attn_mask=mask).transpose(1, 2)


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s, device=q.device.type)
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return call


def _both_ways(attention: Attention, inputs: list[Tensor], dy: Tensor) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = attention(*leaves)
        return {"y": y.detach()} | dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(y, leaves, dy.to(y.dtype)), strict=True)
        )

    return run


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype, seq = DTYPES[spec.dtype], spec.m // 2
    q, k, v = (
        torch.randn(2, seq, heads, spec.k).to(dtype).transpose(1, 2)
        for heads in (spec.n, spec.n // GROUP, spec.n // GROUP)
    )
    dy = torch.randn(2, seq, spec.n, spec.k).to(dtype)
    exact = _both_ways(_products, [x.double() for x in (q, k, v)], dy)()
    plain = {
        name: value.to(dtype)
        for name, value in _both_ways(_products, [x.float() for x in (q, k, v)], dy)().items()
    }
    slow = slow_products(dtype)
    ways: dict[str, Attention] = {OURS: _wide if slow else _tiled, "SDPA as transformers calls it": _stock}
    ways |= {"SDPA, keys repeated": _repeated, "SDPA, a mask": _masked, "products and softmax": _products}
    if torch.cuda.is_available():
        ways["FlexAttention"] = _flex()
    checks = {OURS: within_bound(exact, plain if slow else _both_ways(_stock, [q, k, v], dy)())}
    return [
        Provider(name, _both_ways(way, [q, k, v], dy), checks.get(name, close(exact, dtype)))
        for name, way in ways.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
