"""Launcher of the native CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import address, empty, native, on_huge_pages, scratch
from ..rope import empty_heads, seq_first

__all__ = ["backward", "forward"]

_KEPT = 64 << 20  # bytes of scratch that stay allocated for the next call


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    q, k, v, call, held = _described(q, k, v, mask, causal, scale)
    b, h, s, d = q.shape
    y, lse = q.new_empty(b, s, h, d).transpose(1, 2), empty((b, h, s))
    size = native().attention_scratch_bytes(call, False)
    native().attention_fwd(call, _heads(y), address(lse), address(buffer := _scratch(size)), buffer.numel())
    del held
    return y, lse


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; the gradients lie in memory as q, k and v do."""
    like = [seq_first(x) for x in (q, k, v)]
    q, k, v, call, held = _described(q, k, v, mask, causal, scale)
    dy, y, lse = _rows(dy), _rows(y), lse.contiguous()
    grads = [empty_heads(x, by_seq) for x, by_seq in zip((q, k, v), like, strict=True)]
    size = native().attention_scratch_bytes(call, True)
    native().attention_bwd(
        call,
        native().AttentionGrad(*map(_heads, (y, dy, *grads))),
        address(lse),
        address(buffer := _scratch(size)),
        buffer.numel(),
    )
    del held
    return grads[0], grads[1], grads[2]


def _described(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, object, Tensor | None]:
    """The operands as the kernel reads them, its description of the call, and the mask it holds the address
    of."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    by_batch = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    by_row = 0 if mask is None else mask.stride(2)
    sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]
    call = native().Attention(*map(_heads, (q, k, v)), *sizes, scale, causal, address(mask), by_batch, by_row)
    return q, k, v, call, mask


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> object:
    return native().Heads(address(x), *x.stride()[:3])


def _scratch(size: int) -> Tensor:
    return scratch(size, "attention") if size <= _KEPT else on_huge_pages(empty(size, dtype=torch.uint8))
