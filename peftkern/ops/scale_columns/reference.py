"""Columns scaled, in plain PyTorch, fp32: y = u * scale + bias; du = dy * scale, d_scale = sum of dy * u,
d_bias = sum of dy."""

from __future__ import annotations

from torch import Tensor

from .. import accumulation

__all__ = ["backward", "forward"]


def forward(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """u [M, N], scale [N], bias [N] or None -> [M, N] in u's dtype, rounded once."""
    acc = accumulation(u)
    y = u.to(acc) * scale.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(u.dtype)


def backward(
    dy: Tensor, u: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy [M, N] -> du in u's dtype, d_scale fp32 [N], d_bias fp32 [N]; None unless `needs` names it."""
    acc = accumulation(u)
    g = dy.to(acc)
    return (
        (g * scale.to(acc)).to(u.dtype) if needs[0] else None,
        (g * u.to(acc)).sum(0) if needs[1] else None,
        g.sum(0) if needs[2] else None,
    )
