"""Launchers of the native low-rank passes, which add onto what they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from ....runtime.native import address, dtype_of, empty, native, zeros

__all__ = ["backward", "forward"]


def _lora(lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float, seed: Tensor | None) -> object:
    threshold = 0 if seed is None else round(dropout_p * 65536)
    return native().Lora(
        address(lora_a), address(lora_b), lora_a.shape[0], dtype_of(lora_a), scaling, threshold, address(seed)
    )


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
    (m, k), n, rank = x.shape, y.shape[1], lora_a.shape[0]
    out, xa = y.clone(memory_format=torch.contiguous_format), empty((m, rank))
    if m and n:
        lora = _lora(lora_a, lora_b, scaling, dropout_p, seed)
        made = address(bias), dtype_of(bias), address(out), address(xa)
        native().lora_fwd(lora, address(x), dtype_of(x), m, n, k, *made)
    return out, xa


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
    (m, n), (rank, k) = dy.shape, lora_a.shape
    make = torch.empty if m and n else torch.zeros
    dx = zeros((m, k), dtype=dy.dtype) if needs[0] else None  # the pass adds
    d_bias = make(n, dtype=torch.float32) if needs[1] else None
    d_a = make(lora_a.shape, dtype=lora_a.dtype) if needs[2] else None
    d_b = make(lora_b.shape, dtype=lora_b.dtype) if needs[3] else None
    if m and n:
        lora, dyb = _lora(lora_a, lora_b, scaling, dropout_p, seed), empty((m, rank))
        outs = address(xa), address(dyb), address(dx), address(d_a), address(d_b), address(d_bias)
        native().lora_bwd(lora, address(dy), address(x), dtype_of(dy), m, n, k, *outs)
    return dx, d_bias, d_a, d_b
