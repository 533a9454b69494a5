"""Launchers of the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import address, dtype_of, empty, native

__all__ = ["backward", "forward"]


def forward(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference."""
    u, scale = u.contiguous(), scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty_like(u)
    native().scale_columns_fwd(address(u), dtype_of(u), *u.shape, address(scale), address(bias), address(y))
    return y


def backward(
    dy: Tensor, u: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    dy, u, scale = dy.contiguous(), u.contiguous(), scale.float().contiguous()
    du = torch.empty_like(u) if needs[0] else None
    d_scale, d_bias = (empty(u.shape[1]) if need else None for need in needs[1:])
    native().scale_columns_bwd(
        address(dy),
        address(u),
        dtype_of(u),
        *u.shape,
        address(scale),
        address(du),
        address(d_scale),
        address(d_bias),
    )
    return du, d_scale, d_bias
