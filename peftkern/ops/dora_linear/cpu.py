"""Launchers of the native CPU kernels: the engine scales what it stores and what it packs; other regimes are composed of single ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import address, dtype_of, empty, native, scratch, weight_view
from ..qlora_linear import config
from ..qlora_linear import cpu as single
from ..scale_columns import cpu as columns

__all__ = ["backward", "forward"]


def _regime(dtype: torch.dtype, quant: tuple, m: int, n: int, k: int) -> str:
    return config.choose(dtype=str(dtype)[6:], isa=native().isa(), m=m, n=n, k=k, dense=quant[0] is None).regime


def _norm(
    view: object, quant: tuple, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """norm and magnitude / norm, fp32 [N]. A W^T is the linear itself on R rows."""
    (r, k), n, a = lora_a.shape, lora_b.shape[0], lora_a.float()
    cross, none = empty((r, n)), single.lora_view(None, None, 1.0, 0.0, None)
    buffer, gemv = scratch(native().scratch_bytes(r, n, k, 0)), _regime(torch.float32, quant, r, n, k) == "gemv"
    native().qlora_linear_fwd(view, none, address(a), 0, r, 0, 0, address(cross), 0, gemv, address(buffer), buffer.numel())
    gram, norm, scale, magnitude = a @ a.t(), empty(n), empty(n), magnitude.float().contiguous()
    args = (address(squares), address(magnitude), address(norm), address(scale))
    native().dora_norm(address(cross), address(gram), address(lora_b), dtype_of(lora_b), n, r, scaling, *args)
    return norm, scale


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
    """As the reference."""
    x, weight, lora_a, lora_b, squares = (t.contiguous() for t in (x, weight, lora_a, lora_b, squares))
    (m, k), n, bias = x.shape, lora_b.shape[0], None if bias is None else bias.contiguous()
    view = weight_view(weight, quant, n, k)
    norm, scale = _norm(view, quant, lora_a, lora_b, scaling, magnitude, squares)
    if m == 0 or _regime(x.dtype, quant, m, n, k) != "gemm":
        if quant[0] is None and bias is not None and x.dtype == torch.float32:  # where g is 1, as at the start, y is that of the base
            whole, xa = single.forward(x, weight, quant, n, bias, lora_a, lora_b, scaling, 0.0, None)
            u = whole - bias
            return torch.addcmul(whole, u, scale - 1), u if with_u else None, xa, norm
        u, xa = single.forward(x, weight, quant, n, None, lora_a, lora_b, scaling, 0.0, None)
        return columns.forward(u, scale, bias), u if with_u else None, xa, norm
    y, u = x.new_empty((m, n)), x.new_empty((m, n)) if with_u else None
    xa = empty((m, lora_a.shape[0]))
    members = [native().Member(view, address(bias), dtype_of(bias), address(y), 0, 0, address(scale), address(u))]
    low = [native().Adapter(single.lora_view(lora_a, lora_b, scaling, 0.0, None), 0, 0, m, address(xa), 0, 0, 0)]
    buffer = scratch(native().group_scratch_bytes(members, low, m))
    native().qlora_group_fwd(members, low, address(x), dtype_of(x), m, address(buffer), buffer.numel())
    return y, u, xa, norm


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
    """As the reference."""
    dy, weight, lora_a, lora_b = (t.contiguous() for t in (dy, weight, lora_a, lora_b))
    x, (m, n), k, scale = None if x is None else x.contiguous(), dy.shape, lora_a.shape[1], magnitude.float() / norm
    if m == 0 or n == 0 or _regime(dy.dtype, quant, m, n, k) != "gemm":
        du, d_scale, d_bias = columns.backward(dy, dy if u is None else u, scale, [True, needs[4], needs[1]])
        dx, _, d_a, d_b = single.backward(du, x, weight, quant, k, lora_a, lora_b, xa, scaling, 0.0, None, [needs[0], False, *needs[2:4]])
        return dx, d_bias, d_a, d_b, d_scale / norm if needs[4] else None
    _, d_scale, d_bias = (
        columns.backward(dy, dy if u is None else u, scale, [False, needs[4], needs[1]]) if needs[1] or needs[4] else (None,) * 3
    )
    dx = empty((m, k), dtype=dy.dtype) if needs[0] else None
    d_a, d_b = (torch.empty_like(t) if need else None for t, need in zip((lora_a, lora_b), needs[2:4], strict=True))
    dyb = empty((m, lora_a.shape[0]))
    members = [native().Member(weight_view(weight, quant, n, k), 0, 0, 0, address(dy), 0, address(scale), 0)]
    lora = single.lora_view(lora_a, lora_b, scaling, 0.0, None)
    low = [native().Adapter(lora, 0, 0, m, address(xa), address(dyb), address(d_a), address(d_b))]
    buffer = scratch(native().group_scratch_bytes(members, low, m))
    native().qlora_group_bwd(members, low, address(x), dtype_of(dy), m, address(dx), address(buffer), buffer.numel())
    return dx, d_bias, d_a, d_b, d_scale / norm if needs[4] else None
