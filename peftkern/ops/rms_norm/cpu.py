"""Launchers of the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import DTYPES, address, dtype_of, empty, native, scratch
from ..rows import rows_of
from . import CASTS, result_dtype

__all__ = ["add_backward", "add_forward", "backward", "forward"]


def _norm(rows: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> object:
    """The C descriptor; it holds addresses only."""
    dtypes = (dtype_of(rows), dtype_of(weight), DTYPES[result_dtype(rows, weight, cast)])
    return native().RmsNorm(
        address(rows), address(weight), *rows.shape, rows.stride(0), *dtypes, CASTS.index(cast), eps, offset
    )


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, weight = rows_of(x), weight.contiguous()
    y, rstd = empty(x.shape, dtype=result_dtype(x, weight, cast)), empty(rows.shape[0])
    buffer = scratch(native().rms_norm_scratch_bytes(*rows.shape, False))
    native().rms_norm_fwd(
        _norm(rows, weight, eps, offset, cast), address(y), address(rstd), address(buffer), buffer.numel()
    )
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As the reference."""
    dy, rows, weight, rstd = dy.contiguous(), rows_of(x), weight.contiguous(), rstd.contiguous()
    dx = empty(x.shape, dtype=x.dtype) if needs[0] else None
    if rows.shape[0] == 0:
        return dx, torch.zeros_like(weight) if needs[1] else None
    d_weight = empty(weight.shape) if needs[1] else None
    buffer = scratch(native().rms_norm_scratch_bytes(*rows.shape, needs[1]))
    norm = _norm(rows, weight, 0.0, offset, cast)
    native().rms_norm_bwd(
        norm, address(dy), address(rstd), address(dx), address(d_weight), address(buffer), buffer.numel()
    )
    return dx, None if d_weight is None else d_weight.to(weight.dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    rows, residual, weight = rows_of(x), residual.contiguous(), weight.contiguous()
    y, s = empty(x.shape, dtype=result_dtype(x, weight, cast)), empty(x.shape, dtype=x.dtype)
    rstd = empty(rows.shape[0])
    buffer = scratch(native().rms_norm_scratch_bytes(*rows.shape, False))
    outs = (address(s), address(y), address(rstd))
    native().add_rms_norm_fwd(
        _norm(rows, weight, eps, offset, cast), address(residual), *outs, address(buffer), buffer.numel()
    )
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
    """As the reference."""
    dy, ds, rows, weight, rstd = (
        dy.contiguous(),
        ds.contiguous(),
        rows_of(s),
        weight.contiguous(),
        rstd.contiguous(),
    )
    d_sum = empty(s.shape, dtype=s.dtype)
    if rows.shape[0] == 0:
        return d_sum, torch.zeros_like(weight) if with_d_weight else None
    d_weight = empty(weight.shape) if with_d_weight else None
    buffer = scratch(native().rms_norm_scratch_bytes(*rows.shape, with_d_weight))
    addresses = map(address, (dy, ds, rstd, d_sum, d_weight, buffer))
    native().add_rms_norm_bwd(_norm(rows, weight, 0.0, offset, cast), *addresses, buffer.numel())
    return d_sum, None if d_weight is None else d_weight.to(weight.dtype)
