"""RMSNorm in one launch forward and one for dx; a trainable weight's gradient takes two more, in a fixed
order of sums.

A residual stream's addition before the norm, and in backward of the stream's gradient, are in the same
launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import UNSPECIALIZED, Call, run
from ...runtime.plan import Launch, nbytes, work
from ...runtime.replay import replayed
from ..rows import rows_of
from ..sizes import next_power_of_2
from ..triton_numerics import round_to, to_fp32
from . import result_dtype

__all__ = [
    "add_backward",
    "add_forward",
    "backward",
    "backward_call",
    "d_weight_call",
    "forward",
    "forward_call",
]

# A program holds whole rows of up to MAX_BLOCK elements in registers, and reads longer ones twice, in pieces.
# Not measured.
MAX_BLOCK, PIECE, VALUES = 8192, 2048, 1024
COLUMNS, ROWS = 128, 32  # tile of d_weight
MAX_CHUNKS = 256  # partial sums of d_weight


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_fwd_kernel(
    x_ptr,  # [M, n], rows ld_x apart
    residual_ptr,  # [M, n], or None: the norm of x alone
    weight_ptr,  # [n]
    s_ptr,  # [M, n] = x + residual, or None
    y_ptr,  # [M, n]
    rstd_ptr,  # fp32 [M]
    eps,
    offset,
    M,
    n,
    ld_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    LLAMA: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = (row < M)[:, None]
    at = row.to(tl.int64)[:, None] * n  # [ROWS, 1]
    from_ptr, to_ptr = x_ptr + row.to(tl.int64)[:, None] * ld_x, y_ptr + at  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    x = _summed(from_ptr, residual_ptr, s_ptr, at, cols, inside, n)  # [ROWS, BLOCK]
    squares = x * x
    if not WHOLE:
        for start in range(BLOCK, n, BLOCK):
            more = _summed(from_ptr, residual_ptr, s_ptr, at, start + cols, inside, n)
            squares += more * more
    # Of fp32 the sum's own rounding would show in the result; its bytes take the kernel longer than the
    # additions in fp64.
    wide = squares.to(tl.float64) if x_ptr.dtype.element_ty == tl.float32 else squares
    total = tl.sum(wide, axis=1).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(total / n + eps))  # [ROWS]
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    if WHOLE:
        _scale(x, rstd, weight_ptr, to_ptr, cols, inside, offset, n, x_ptr.dtype.element_ty, LLAMA)
    else:
        for start in range(0, n, BLOCK):
            # formed again: another thread may have stored it
            x = _summed(from_ptr, residual_ptr, None, at, start + cols, inside, n)
            _scale(
                x, rstd, weight_ptr, to_ptr, start + cols, inside, offset, n, x_ptr.dtype.element_ty, LLAMA
            )


@triton.jit
def _summed(from_ptr, residual_ptr, s_ptr, at, cols, inside, n):
    """x, or x + residual as rounded to their dtype, which is stored where s_ptr is; fp32."""
    mask = inside & (cols < n)
    x = to_fp32(tl.load(from_ptr + cols, mask=mask, other=0.0))
    if residual_ptr is not None:
        s = round_to(
            x + to_fp32(tl.load(residual_ptr + at + cols, mask=mask, other=0.0)),
            residual_ptr.dtype.element_ty,
        )
        if s_ptr is not None:
            tl.store(s_ptr + at + cols, s, mask=mask)
        x = to_fp32(s)
    return x


@triton.jit
def _scale(x, rstd, weight_ptr, to_ptr, cols, inside, offset, n, DTYPE: tl.constexpr, LLAMA: tl.constexpr):
    normal = x * rstd[:, None]
    weight = to_fp32(tl.load(weight_ptr + cols, mask=cols < n, other=0.0))  # [1, BLOCK]
    y = to_fp32(round_to(normal, DTYPE)) * weight if LLAMA else normal * (offset + weight)
    tl.store(to_ptr + cols, round_to(y, to_ptr.dtype.element_ty), mask=inside & (cols < n))


@triton.jit
def _terms(dy_ptr, x_ptr, weight_ptr, cols, inside, offset, n):
    """g = dy * weight (offset added) and x."""
    dy = to_fp32(tl.load(dy_ptr + cols, mask=inside & (cols < n), other=0.0))
    x = to_fp32(tl.load(x_ptr + cols, mask=inside & (cols < n), other=0.0))
    weight = to_fp32(tl.load(weight_ptr + cols, mask=cols < n, other=0.0))
    return dy * (offset + weight), x


@work(_rms_norm_fwd_kernel)
def _forward_work(a: Mapping[str, Any]) -> Launch:
    name = "rms_norm" if a["residual_ptr"] is None else "add_rms_norm"
    reads = nbytes(a["x_ptr"], a["residual_ptr"], a["weight_ptr"])
    return Launch(name, reads, nbytes(a["s_ptr"], a["y_ptr"], a["rstd_ptr"]))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_bwd_kernel(
    dy_ptr,  # [M, n]
    ds_ptr,  # [M, n], or None: what else x gets
    x_ptr,  # [M, n], rows ld_x apart
    weight_ptr,  # [n]
    rstd_ptr,  # fp32 [M]
    dx_ptr,  # [M, n]
    offset,
    M,
    n,
    ld_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dx = g rstd - x rstd^2 mean(g x^) + ds, with g = dy * weight and x^ = x * rstd."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = (row < M)[:, None]
    wide = row.to(tl.int64)[:, None]
    dy_row, x_row, dx_row = dy_ptr + wide * n, x_ptr + wide * ld_x, dx_ptr + wide * n  # [ROWS, 1]
    ds_row = None if ds_ptr is None else ds_ptr + wide * n
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]
    g, x = _terms(dy_row, x_row, weight_ptr, cols, inside, offset, n)
    products = g * (x * rstd)
    if not WHOLE:
        for start in range(BLOCK, n, BLOCK):
            more_g, more_x = _terms(dy_row, x_row, weight_ptr, start + cols, inside, offset, n)
            products += more_g * (more_x * rstd)
    share = rstd * rstd * (tl.sum(products, axis=1) / n)[:, None]
    if WHOLE:
        dx = g * rstd - x * share
        if ds_ptr is not None:
            dx += to_fp32(tl.load(ds_row + cols, mask=inside & (cols < n), other=0.0))
        tl.store(dx_row + cols, round_to(dx, dx_ptr.dtype.element_ty), mask=inside & (cols < n))
    else:
        for start in range(0, n, BLOCK):
            g, x = _terms(dy_row, x_row, weight_ptr, start + cols, inside, offset, n)
            dx = g * rstd - x * share
            if ds_ptr is not None:
                dx += to_fp32(tl.load(ds_row + start + cols, mask=inside & (start + cols < n), other=0.0))
            tl.store(
                dx_row + start + cols, round_to(dx, dx_ptr.dtype.element_ty), mask=inside & (start + cols < n)
            )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_d_weight_kernel(
    dy_ptr,  # [M, n]
    x_ptr,  # [M, n], rows ld_x apart
    rstd_ptr,  # fp32 [M]
    partial_ptr,  # fp32 [chunks, n]
    M,
    n,
    ld_x,
    strips,
    chunk_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LLAMA: tl.constexpr,
):
    """One chunk of rows, one strip of columns: the sum of dy * x^, as x^ met the weight."""
    chunk = tl.program_id(0) // strips
    cols = ((tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS))[None, :]  # [1, COLUMNS]
    first = chunk * chunk_rows
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + chunk_rows, M), ROWS):
        row = start + tl.arange(0, ROWS)  # [ROWS]
        inside = ((row < M) & (row < first + chunk_rows))[:, None] & (cols < n)
        wide = row.to(tl.int64)[:, None]
        dy = to_fp32(tl.load(dy_ptr + wide * n + cols, mask=inside, other=0.0))  # [ROWS, COLUMNS]
        x = to_fp32(tl.load(x_ptr + wide * ld_x + cols, mask=inside, other=0.0))
        normal = x * tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        total += dy * (to_fp32(round_to(normal, x_ptr.dtype.element_ty)) if LLAMA else normal)
    tl.store(partial_ptr + chunk.to(tl.int64) * n + cols, tl.sum(total, axis=0)[None, :], mask=cols < n)


@work(_rms_norm_bwd_kernel)
def _backward_work(a: Mapping[str, Any]) -> Launch:
    name = "d_rms_norm" if a["ds_ptr"] is None else "d_add_rms_norm"
    reads = nbytes(a["dy_ptr"], a["ds_ptr"], a["x_ptr"], a["weight_ptr"], a["rstd_ptr"])
    return Launch(name, reads, nbytes(a["dx_ptr"]))


@work(_rms_norm_d_weight_kernel)
def _d_weight_work(a: Mapping[str, Any]) -> Launch:
    return Launch("d_weight", nbytes(a["dy_ptr"], a["x_ptr"], a["rstd_ptr"]), nbytes(a["partial_ptr"]))


def _blocking(m: int, n: int) -> tuple[int, int, dict[str, object]]:
    """Programs, warps and tile sizes."""
    whole = n <= MAX_BLOCK
    block = next_power_of_2(n) if whole else PIECE
    rows = max(1, VALUES // block)
    warps = 4 if block <= 1024 else min(16, block // 512)  # 16 elements a thread
    return -(-m // rows), warps, {"ROWS": rows, "BLOCK": block, "WHOLE": whole}


def forward_call(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    rstd: Tensor,
    eps: float,
    offset: float,
    cast: str,
    residual: Tensor | None = None,
    s: Tensor | None = None,
) -> Call:
    """x [M, n] with contiguous rows -> y [M, n], rstd fp32 [M]; with residual [M, n] of x + residual, which s
    [M, n] gets."""
    m, n = x.shape
    programs, warps, tile = _blocking(m, n)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "s_ptr": s,
        "y_ptr": y,
        "rstd_ptr": rstd,
    }
    arguments |= {
        "eps": float(eps),
        "offset": float(offset),
        "M": m,
        "n": n,
        "ld_x": x.stride(0),
        **tile,
        "LLAMA": cast == "llama",
    }
    return Call(_rms_norm_fwd_kernel, programs, arguments, warps, 1)


def backward_call(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, offset: float, ds: Tensor | None = None
) -> Call:
    """dy [M, n] contiguous, x [M, n] with contiguous rows -> dx [M, n], to which ds [M, n] is added."""
    m, n = x.shape
    programs, warps, tile = _blocking(m, n)
    arguments = {
        "dy_ptr": dy,
        "ds_ptr": ds,
        "x_ptr": x,
        "weight_ptr": weight,
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "offset": float(offset),
    }
    return Call(
        _rms_norm_bwd_kernel, programs, arguments | {"M": m, "n": n, "ld_x": x.stride(0), **tile}, warps, 1
    )


def _chunk_rows(m: int) -> int:
    """A function of M alone, whole tiles."""
    return -(-max(1, -(-m // MAX_CHUNKS)) // ROWS) * ROWS


def d_weight_call(dy: Tensor, x: Tensor, rstd: Tensor, partial: Tensor, cast: str) -> Call:
    """As above -> partial sums fp32 [chunks, n]."""
    (m, n), strips = x.shape, -(-x.shape[1] // COLUMNS)
    arguments = {
        "dy_ptr": dy,
        "x_ptr": x,
        "rstd_ptr": rstd,
        "partial_ptr": partial,
        "M": m,
        "n": n,
        "ld_x": x.stride(0),
        "strips": strips,
    }
    arguments |= {"chunk_rows": _chunk_rows(m), "ROWS": ROWS, "COLUMNS": COLUMNS, "LLAMA": cast == "llama"}
    return Call(_rms_norm_d_weight_kernel, strips * partial.shape[0], arguments, 4, 1)


@replayed()
def forward(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, weight = rows_of(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=result_dtype(x, weight, cast), device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if y.numel():
        run(forward_call(rows, weight, y, rstd, eps, offset, cast))
    return y, rstd


@replayed()
def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    rows, residual, weight = rows_of(x), residual.contiguous(), weight.contiguous()
    y = torch.empty(x.shape, dtype=result_dtype(x, weight, cast), device=x.device)
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if rows.numel():
        run(forward_call(rows, weight, y, rstd, eps, offset, cast, residual, s))
    return y, s, rstd


@replayed()
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As the reference."""
    dy, rows, weight = dy.contiguous(), rows_of(x), weight.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if dx is not None and rows.numel():
        run(backward_call(dy, rows, weight, rstd, dx, offset))
    return dx, _d_weight(dy, rows, weight, rstd, cast) if needs[1] else None


@replayed()
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
    dy, ds, rows, weight = dy.contiguous(), ds.contiguous(), rows_of(s), weight.contiguous()
    d_sum = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if rows.numel():
        run(backward_call(dy, rows, weight, rstd, d_sum, offset, ds))
    return d_sum, _d_weight(dy, rows, weight, rstd, cast) if with_d_weight else None


def _d_weight(dy: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor, cast: str) -> Tensor:
    m, n = rows.shape
    if m == 0:
        return torch.zeros_like(weight)
    partial = torch.empty(-(-m // _chunk_rows(m)), n, dtype=torch.float32, device=rows.device)
    run(d_weight_call(dy, rows, rstd, partial, cast))
    return partial.sum(0).to(weight.dtype)
