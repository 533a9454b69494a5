"""Gated linear units in one launch each way, memory-bound: every operand is read once, every result written
once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import Launch, nbytes, work
from ...runtime.replay import replayed
from ...runtime.specialization import Specialization
from ..rows import out_rows, rows_of
from ..triton_numerics import round_to, to_fp32
from . import ACTIVATIONS

__all__ = ["backward", "backward_call", "forward", "forward_call", "specializations"]

BLOCK, WARPS = 1024, 4  # 8 elements a thread: one 16-byte load of each operand in 16 bits. Not measured.


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g), fp32. 1 + tanh(z) = 2 sigmoid(2 z), and a sigmoid by e^-|z| neither overflows nor
    cancels."""
    if ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        value = g * below
        slope = below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        if ACTIVATION == "silu":
            inner = g
            d_inner = 1.0
        else:
            bounded = tl.minimum(tl.maximum(g, -15.0), 15.0)  # beyond, the sigmoid is 0 or 1
            inner = bounded * (1.5957691216057308 + 0.07135481627260025 * bounded * bounded)
            inner = tl.where(g == g, inner, g)
            d_inner = 1.5957691216057308 + 0.21406444881780074 * bounded * bounded
        e = tl.exp(-tl.abs(inner))
        larger = 1.0 / (1.0 + e)
        s = tl.where(inner >= 0, larger, e * larger)
        value = g * s
        slope = s + value * tl.where(inner >= 0, e * larger, larger) * d_inner
    return value, slope


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # [M, n], rows ld_gate apart
    up_ptr,  # [M, n], rows ld_up apart
    h_ptr,  # [M, n]
    ld_gate,
    ld_up,
    n,
    pieces,  # programs of a row
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // pieces
    col = (tl.program_id(0).to(tl.int64) % pieces) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = col < n
    gate = tl.load(gate_ptr + row * ld_gate + col, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * ld_up + col, mask=inside, other=0.0)
    value, _ = _activate(to_fp32(gate), ACTIVATION)
    tl.store(h_ptr + row * n + col, round_to(value * to_fp32(up), h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [M, n]
    gate_ptr,  # as above
    up_ptr,
    d_gate_ptr,  # [M, n], rows ld_d_gate apart
    d_up_ptr,
    h_ptr,  # [M, n], or None
    ld_gate,
    ld_up,
    ld_d_gate,
    ld_d_up,
    n,
    pieces,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // pieces
    col = (tl.program_id(0).to(tl.int64) % pieces) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = col < n
    gate = tl.load(gate_ptr + row * ld_gate + col, mask=inside, other=0.0)
    up = to_fp32(tl.load(up_ptr + row * ld_up + col, mask=inside, other=0.0))
    dy = to_fp32(tl.load(dy_ptr + row * n + col, mask=inside, other=0.0))
    value, slope = _activate(to_fp32(gate), ACTIVATION)
    DTYPE: tl.constexpr = d_gate_ptr.dtype.element_ty
    tl.store(d_gate_ptr + row * ld_d_gate + col, round_to(dy * up * slope, DTYPE), mask=inside)
    tl.store(d_up_ptr + row * ld_d_up + col, round_to(dy * value, DTYPE), mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + row * n + col, round_to(value * up, DTYPE), mask=inside)


@work(_glu_fwd_kernel)
def _glu_fwd_work(a: Mapping[str, Any]) -> Launch:
    return Launch("glu", nbytes(a["gate_ptr"], a["up_ptr"]), nbytes(a["h_ptr"]))


@work(_glu_bwd_kernel)
def _glu_bwd_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["dy_ptr"], a["gate_ptr"], a["up_ptr"])
    return Launch("d_glu", reads, nbytes(a["d_gate_ptr"], a["d_up_ptr"], a["h_ptr"]))


def _grid(*tensors: Tensor) -> tuple[int, int, int]:
    """Rows, their length and the programs of one; matrices without gaps are one long row."""
    m, n = tensors[0].shape
    if m < 2 or all(t.stride(0) == n for t in tensors):
        m, n = min(m, 1), m * n
    return m, n, -(-n // BLOCK)


def forward_call(gate: Tensor, up: Tensor, h: Tensor, activation: str) -> Call:
    """gate, up [M, n] with contiguous rows -> h [M, n], contiguous."""
    m, n, pieces = _grid(gate, up)
    arguments: dict[str, Any] = {
        "gate_ptr": gate,
        "up_ptr": up,
        "h_ptr": h,
        "ld_gate": gate.stride(0),
        "ld_up": up.stride(0),
    }
    arguments |= {"n": n, "pieces": pieces, "BLOCK": BLOCK, "ACTIVATION": activation}
    return Call(_glu_fwd_kernel, m * pieces, arguments, WARPS, 1)


def backward_call(
    dy: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, h: Tensor | None, activation: str
) -> Call:
    """dy [M, n] contiguous; gate, up, d_gate, d_up [M, n] with contiguous rows; h [M, n] contiguous, or
    None."""
    m, n, pieces = _grid(gate, up, d_gate, d_up)
    arguments: dict[str, Any] = {
        "dy_ptr": dy,
        "gate_ptr": gate,
        "up_ptr": up,
        "d_gate_ptr": d_gate,
        "d_up_ptr": d_up,
        "h_ptr": h,
    }
    arguments |= {
        "ld_gate": gate.stride(0),
        "ld_up": up.stride(0),
        "ld_d_gate": d_gate.stride(0),
        "ld_d_up": d_up.stride(0),
    }
    arguments |= {"n": n, "pieces": pieces, "BLOCK": BLOCK, "ACTIVATION": activation}
    return Call(_glu_bwd_kernel, m * pieces, arguments, WARPS, 1)


@replayed()
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As the reference."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        run(forward_call(rows_of(gate), rows_of(up), h, activation))
    return h


@replayed()
def backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, h: Tensor | None
) -> None:
    """As the reference."""
    if dy.numel():
        run(
            backward_call(
                dy.contiguous(), rows_of(gate), rows_of(up), out_rows(d_gate), out_rows(d_up), h, activation
            )
        )


def specializations(arch: int) -> Iterator[Specialization]:
    """Both directions, every activation and dtype, apart and as halves of one matrix."""
    dtypes = (
        (torch.float16, torch.bfloat16, torch.float32)
        if arch < 80
        else (torch.bfloat16, torch.float16, torch.float32)
    )
    for dtype in dtypes:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for activation in ACTIVATIONS:
            both = torch.empty(64, 2 * 4096, dtype=dtype, device="meta")
            apart, halves = both.view(128, 4096)[:64], (both[:, :4096], both[:, 4096:])
            wide = {"wide_loads": ("gate_ptr", "up_ptr")}
            name = f"glu-{activation.replace('_', '-')}-{short}"
            yield specialization(f"{name}-fwd", forward_call(apart, apart, apart, activation), **wide)
            yield specialization(f"{name}-fwd-halves", forward_call(*halves, apart, activation), **wide)
            yield specialization(
                f"{name}-bwd", backward_call(apart, apart, apart, apart, apart, None, activation), **wide
            )
            yield specialization(
                f"{name}-bwd-halves", backward_call(apart, *halves, *halves, apart, activation), **wide
            )
