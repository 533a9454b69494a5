"""Launchers of the native CPU kernels."""

from __future__ import annotations

from torch import Tensor

from ...runtime.native import address, dtype_of, empty, native
from ..rows import out_rows, rows_of
from . import ACTIVATIONS

__all__ = ["backward", "forward"]


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As the reference."""
    h, g, u = empty(gate.shape, dtype=gate.dtype), rows_of(gate), rows_of(up)
    operands = (
        address(g),
        g.stride(0),
        address(u),
        u.stride(0),
        dtype_of(g),
        *g.shape,
        ACTIVATIONS.index(activation),
    )
    native().glu_fwd(*operands, address(h))
    return h


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, h: Tensor | None
) -> None:
    """As the reference."""
    dy, g, u, dg, du = dy.contiguous(), rows_of(gate), rows_of(up), out_rows(d_gate), out_rows(d_up)
    operands = (
        address(g),
        g.stride(0),
        address(u),
        u.stride(0),
        dtype_of(g),
        *g.shape,
        ACTIVATIONS.index(activation),
    )
    native().glu_bwd(*operands, address(dy), address(dg), dg.stride(0), address(du), du.stride(0), address(h))
