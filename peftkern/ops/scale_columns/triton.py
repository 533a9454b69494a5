"""Columns scaled on a GPU, one launch each way. A program owns some columns over all rows, so that its sums
need no second pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import Launch, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import ceil_div
from ..triton_numerics import round_to, to_fp32

__all__ = ["backward", "backward_call", "forward", "forward_call", "specializations"]

# Not measured. Forward: 16 bytes a thread in 16 bits, the columns' scales kept for some rows. Backward: 64
# columns are 128 bytes of a row.
ROWS, COLS, GRAD_ROWS, GRAD_COLS, WARPS = 8, 1024, 64, 64, 4


@triton.jit
def _scale_columns_fwd_kernel(
    u_ptr, scale_ptr, bias_ptr, y_ptr, M, N, pieces, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """u [M, N], scale, bias [N] -> y [M, N]; a program has ROWS rows of BLOCK_N columns."""
    first = (tl.program_id(0) // pieces).to(tl.int64) * ROWS
    col = (tl.program_id(0) % pieces) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    scale = tl.load(scale_ptr + col, mask=col < N, other=0.0)
    for i in range(ROWS):
        inside = (col < N) & (first + i + tl.zeros((BLOCK_N,), tl.int64) < M)
        y = to_fp32(tl.load(u_ptr + (first + i) * N + col, mask=inside, other=0.0)) * scale
        if bias_ptr is not None:
            y += to_fp32(tl.load(bias_ptr + col, mask=col < N, other=0.0))
        tl.store(y_ptr + (first + i) * N + col, round_to(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_columns_bwd_kernel(
    dy_ptr,
    u_ptr,
    scale_ptr,
    du_ptr,
    d_scale_ptr,
    d_bias_ptr,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dy, u [M, N] -> du [M, N]; d_scale, d_bias fp32 [N]; any of the three may be None."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    scale = tl.load(scale_ptr + col, mask=col < N, other=0.0)
    by_scale = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    by_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, M, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
        inside = (row < M) & (col < N)
        dy = to_fp32(tl.load(dy_ptr + row * N + col, mask=inside, other=0.0))
        by_bias += dy
        if d_scale_ptr is not None:
            by_scale += dy * to_fp32(tl.load(u_ptr + row * N + col, mask=inside, other=0.0))
        if du_ptr is not None:
            tl.store(du_ptr + row * N + col, round_to(dy * scale, du_ptr.dtype.element_ty), mask=inside)
    if d_scale_ptr is not None:
        tl.store(d_scale_ptr + col, tl.sum(by_scale, 0)[None, :], mask=col < N)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + col, tl.sum(by_bias, 0)[None, :], mask=col < N)


@work(_scale_columns_fwd_kernel)
def _forward_work(a: Mapping[str, Any]) -> Launch:
    return Launch("scale_columns", nbytes(a["u_ptr"], a["scale_ptr"], a["bias_ptr"]), nbytes(a["y_ptr"]))


@work(_scale_columns_bwd_kernel)
def _backward_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["dy_ptr"], a["scale_ptr"], a["u_ptr"] if a["d_scale_ptr"] is not None else None)
    return Launch("d_scale_columns", reads, nbytes(a["du_ptr"], a["d_scale_ptr"], a["d_bias_ptr"]))


def forward_call(u: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> Call:
    """u, y [M, N] contiguous; scale fp32 [N]."""
    m, n = u.shape
    arguments: dict[str, Any] = {"u_ptr": u, "scale_ptr": scale, "bias_ptr": bias, "y_ptr": y, "M": m, "N": n}
    pieces = ceil_div(n, COLS)
    arguments |= {"pieces": pieces, "ROWS": ROWS, "BLOCK_N": COLS}
    return Call(_scale_columns_fwd_kernel, ceil_div(m, ROWS) * pieces, arguments, WARPS, 1)


def backward_call(
    dy: Tensor, u: Tensor, scale: Tensor, du: Tensor | None, d_scale: Tensor | None, d_bias: Tensor | None
) -> Call:
    """dy, u, du [M, N] contiguous; the sums fp32 [N]."""
    m, n = dy.shape
    arguments: dict[str, Any] = {
        "dy_ptr": dy,
        "u_ptr": u,
        "scale_ptr": scale,
        "du_ptr": du,
        "d_scale_ptr": d_scale,
        "d_bias_ptr": d_bias,
    }
    arguments |= {"M": m, "N": n, "BLOCK_M": GRAD_ROWS, "BLOCK_N": GRAD_COLS}
    return Call(_scale_columns_bwd_kernel, ceil_div(n, GRAD_COLS), arguments, WARPS, 1)


def forward(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference."""
    u, y = u.contiguous(), u.new_empty(u.shape)
    if y.numel():
        run(forward_call(u, scale.float().contiguous(), None if bias is None else bias.contiguous(), y))
    return y


def backward(
    dy: Tensor, u: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    dy, u = dy.contiguous(), u.contiguous()
    du = u.new_empty(u.shape) if needs[0] else None
    d_scale, d_bias = (u.new_empty(u.shape[1], dtype=torch.float32) if need else None for need in needs[1:])
    if u.shape[1] and any(needs):
        run(backward_call(dy, u, scale.float().contiguous(), du, d_scale, d_bias))
    return du, d_scale, d_bias


def specializations(arch: int) -> Iterator[Specialization]:
    """Both directions in every dtype."""
    dtypes = (
        (torch.float16, torch.bfloat16, torch.float32)
        if arch < 80
        else (torch.bfloat16, torch.float16, torch.float32)
    )
    scale = torch.empty(4096, dtype=torch.float32, device="meta")
    for dtype in dtypes:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        u = torch.empty(512, 4096, dtype=dtype, device="meta")
        yield specialization(
            f"scale-columns-{short}-fwd", forward_call(u, scale, scale, u), wide_loads=("u_ptr",)
        )
        yield specialization(f"scale-columns-{short}-bwd", backward_call(u, u, scale, u, scale, scale))
