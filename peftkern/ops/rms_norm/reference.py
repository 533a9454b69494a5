"""RMSNorm in plain PyTorch: the definition, in the words of transformers' LlamaRMSNorm and Gemma2RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_backward", "add_forward", "backward", "forward"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """x [..., N], weight [N] -> y [..., N], rstd [M]."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * rstd
    y = weight * normal.to(x.dtype) if cast == "llama" else (normal * (offset + _wide(weight))).to(x.dtype)
    return y.contiguous(), rstd.reshape(-1)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """With g = dy * weight (offset added) and x^ = x * rstd: dx = rstd (g - x^ mean(g x^)), d_weight = sum
    over rows of dy * x^."""
    rstd = rstd.reshape(*x.shape[:-1], 1)
    normal, dy = _wide(x) * rstd, _wide(dy)
    g = dy * (offset + _wide(weight))
    dx = (rstd * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype).contiguous()
    met = _wide(normal.to(x.dtype)) if cast == "llama" else normal
    d_weight = (dy * met).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx if needs[0] else None, d_weight if needs[1] else None


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder layer's next two steps: s = residual + x, y = norm(s) -> y, s [..., N], rstd [M]."""
    s = (residual + x).contiguous()
    y, rstd = forward(s, weight, eps, offset, cast)
    return y, s, rstd


def add_backward(
    dy: Tensor,
    ds: Tensor,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    cast: str,
    with_d_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """s goes two ways, into the norm and on: d_sum = the norm's gradient + ds, rounded once; it is x's and
    residual's."""
    wide = s if s.dtype == torch.float64 else s.float()
    normal_grad, _ = backward(dy, wide, weight, rstd, offset, cast, (True, False))  # not rounded to s's dtype
    d_weight = backward(dy, s, weight, rstd, offset, cast, (False, True))[1] if with_d_weight else None
    return (normal_grad + ds).to(s.dtype).contiguous(), d_weight
