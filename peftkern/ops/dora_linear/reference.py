"""A linear with a DoRA adapter in plain PyTorch, fp32 accumulation (fp64 for fp64 inputs): the op's definition, and its fallback.

norm = ||W + s B A|| by rows, a constant to autograd; g = magnitude / norm; u = x W^T + s x A^T B^T; y = g u + bias.
du = g dy, dx = du W + s du B A, dA = s (du B)^T x, dB = s du^T xa, xa = x A^T; d_magnitude = sum of dy u / norm; d_bias = sum of dy.
"""

from __future__ import annotations

from torch import Tensor

from .. import accumulation
from ..qlora_linear.reference import _dense

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    quant: tuple,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    magnitude: Tensor,
    squares: Tensor,
    with_u: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y, u [M, N] in x's dtype (u None unless asked for), xa [M, R], norm [N]; `squares` is not needed here."""
    wide = accumulation(x)
    w, a, b, x_wide = (t.to(wide) for t in (_dense(weight, quant, lora_b.shape[0], x.shape[1]), lora_a, lora_b, x))
    norm, xa = (w + scaling * (b @ a)).norm(dim=1), x_wide @ a.t()
    u = x_wide @ w.t() + scaling * (xa @ b.t())
    y = u * (magnitude.to(wide) / norm)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype), u.to(x.dtype) if with_u else None, xa, norm


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: tuple,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    magnitude: Tensor,
    norm: Tensor,
    u: Tensor | None,
    xa: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dx in dy's dtype, d_bias fp32, d_lora_a, d_lora_b in the adapters' dtype, d_magnitude fp32; None unless `needs` names it."""
    wide = accumulation(dy)
    g = dy.to(wide)
    w, a, b = (t.to(wide) for t in (_dense(weight, quant, lora_b.shape[0], lora_a.shape[1]), lora_a, lora_b))
    du = g * (magnitude.to(wide) / norm)
    dyb = scaling * (du @ b)
    return (
        (du @ w + dyb @ a).to(dy.dtype) if needs[0] else None,
        g.sum(0) if needs[1] else None,
        (dyb.t() @ x.to(wide)).to(lora_a.dtype) if needs[2] else None,
        (scaling * (du.t() @ xa)).to(lora_b.dtype) if needs[3] else None,
        (g * u.to(wide)).sum(0) / norm if needs[4] else None,
    )
