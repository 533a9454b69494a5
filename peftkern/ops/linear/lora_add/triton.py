"""The low-rank branch on a GPU: the same passes as the QLoRA linear's, composed without a base product.
Forward: a copy of y, xa, the sum onto the copy. Backward: one pass over dy, one for dA and dx, the partial
sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import low_rank

__all__ = ["backward", "forward"]


@torch.no_grad()
def forward(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    x, lora_a, lora_b = x.contiguous(), lora_a.contiguous(), lora_b.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = y.clone(memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out, x.new_empty((x.shape[0], lora_a.shape[0]), dtype=torch.float32)
    xa = low_rank.xa_forward(x, lora_a, dropout_p, seed)
    low_rank.y_epilogue(out, xa, lora_b, scaling, bias)
    return out, xa


@torch.no_grad()
def backward(
    dy: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    dy, lora_a, lora_b = dy.contiguous(), lora_a.contiguous(), lora_b.contiguous()
    x = None if x is None else x.contiguous()
    (m, n), k = dy.shape, lora_a.shape[1]
    need_x, need_bias, need_a, need_b = needs
    if m == 0 or n == 0:
        zeros = (
            dy.new_zeros((m, k)),
            dy.new_zeros(n, dtype=torch.float32),
            torch.zeros_like(lora_a),
            torch.zeros_like(lora_b),
        )
        return tuple(zero if need else None for zero, need in zip(zeros, needs, strict=True))
    partials = low_rank.dy_pass(dy, xa, lora_b, scaling, needs)
    dx, d_a = dy.new_empty((m, k)) if need_x else None, None
    if need_x or need_a:
        d_a = low_rank.x_pass(
            x, partials.dyb, lora_a, dropout_p, seed, dx=dx, need_a=need_a, accumulate=False
        )
    d_a, d_b, d_bias = low_rank.reduce_partials(d_a, partials.d_lora_b, partials.d_bias, lora_b.dtype)
    return dx, d_bias, d_a, d_b
