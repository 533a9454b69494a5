"""Launchers of the native CPU kernels: the fused GEMV, our GEMM, or decoded slices for the vendor's GEMM, as
`config.choose` says."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...runtime.native import DTYPES, address, dtype_of, empty, native, scratch, weight_view
from . import config, cpu_rows
from .problem import Linear, Needs

__all__ = [
    "backward",
    "decode_slice",
    "few_rows",
    "forward",
    "lora_view",
    "slices",
    "vendor_backward",
    "vendor_forward",
]


def _choose(x: Tensor, one: Linear, *, forward: bool) -> config.Choice:
    """For x (or dy) [M, ...]."""
    sizes = dict(m=x.shape[0], n=one.n, k=one.k, dense=one.quant[0] is None, blocksize=one.quant[6])
    return cpu_rows.choose(dtype=str(x.dtype)[6:], isa=native().isa(), forward=forward, **sizes)


def lora_view(
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None
) -> object:
    """The C descriptor of a low-rank branch; it holds addresses only."""
    rank = 0 if lora_a is None else lora_a.shape[0]
    threshold = 0 if seed is None else round(dropout_p * 65536)
    return native().Lora(
        address(lora_a), address(lora_b), rank, dtype_of(lora_a), scaling, threshold, address(seed)
    )


def decode_slice(quant: tuple, view: object, rows: slice, cols: slice, out: Tensor) -> Tensor:
    """W[rows, cols], decoded into `out`."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    part = out[: height * width].view(height, width)
    native().dequantize_4bit(view, rows.start, height, cols.start, width, address(part), dtype_of(part))
    return part


def forward(x: Tensor, one: Linear) -> tuple[Tensor, Tensor]:
    """As the reference."""
    weight, quant, n, k, bias, lora_a, lora_b, *options = one
    x, weight = x.contiguous(), weight.contiguous()
    lora_a, lora_b, bias = (None if t is None else t.contiguous() for t in (lora_a, lora_b, bias))
    m, rank = x.shape[0], 0 if lora_a is None else lora_a.shape[0]
    y, xa = empty((m, n), dtype=x.dtype), empty((m, rank))
    lora, view, choice = (
        lora_view(lora_a, lora_b, *options),
        weight_view(weight, quant, n, k),
        _choose(x, one, forward=True),
    )
    if choice.regime != "vendor":
        size = native().scratch_bytes(m, n, k, rank)
        args = (
            view,
            lora,
            address(x),
            dtype_of(x),
            m,
            address(bias),
            dtype_of(bias),
            address(y),
            address(xa),
            choice.regime == "gemv",
        )
        native().qlora_linear_fwd(*args, address(buffer := scratch(size)), buffer.numel())
        return y, xa
    bias = vendor_forward(x, weight, quant, view, y, bias)
    if rank or bias is not None:
        size = native().lora_scratch_bytes(m, n, k, rank)
        args = (
            lora,
            address(x),
            dtype_of(x),
            m,
            n,
            k,
            address(bias),
            dtype_of(bias),
            address(y),
            address(xa),
        )
        native().lora_fwd(*args, address(buffer := scratch(size)), buffer.numel())
    return y, xa


@functools.cache
def _no_adapter() -> object:
    return native().Lora(0, 0, 0, 0, 1.0, 0, 0)


def few_rows(x: Tensor, weight: Tensor, quant: tuple, n: int, bias: Tensor | None) -> Tensor | None:
    """x [..., K] -> y [..., N] of a 4-bit weight where the fused GEMV serves x, else None.

    Nothing is checked or made contiguous: that is the caller's, as Python takes most of a token's time in a
    small layer.
    """
    k, extension = x.shape[-1], native()
    m = x.numel() // k
    limits = cpu_rows.row(extension.isa())
    if not 0 < m <= limits.few(str(x.dtype)[6:], dense=False, k=k, blocksize=quant[6]):
        return None
    y = x.new_empty((*x.shape[:-1], n))
    buffer = scratch(extension.scratch_bytes(m, n, k, 0))
    tail = (m, address(bias), dtype_of(bias), y.data_ptr(), 0, True, buffer.data_ptr(), buffer.numel())
    extension.qlora_linear_fwd(
        weight_view(weight, quant, n, k), _no_adapter(), x.data_ptr(), DTYPES[x.dtype], *tail
    )
    return y


def slices(total: int, width: int, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Slices of `total` rows (or columns) of `width` elements, the configured number or what 5 MB hold, and a
    reused buffer for one."""
    step = min(
        total, cpu_rows.row(native().isa()).slice_rows, (5 << 20) // (width * dtype.itemsize) // 32 * 32
    )
    step = max(step, min(total, 32))
    buffer = scratch(step * width * dtype.itemsize, "slice")[: step * width * dtype.itemsize]
    return [slice(start, min(start + step, total)) for start in range(0, total, step)], buffer.view(dtype)


def vendor_forward(
    x: Tensor, weight: Tensor, quant: tuple, view: object, y: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """y = x W^T; of a 4-bit weight a slice of rows at a time: disjoint columns of y. Returns the bias if it
    is still to be added: where all is fp32 and dense it is not, so that y has the bits of torch's own
    linear."""
    if quant[0] is None:
        if bias is not None and x.dtype == weight.dtype == bias.dtype == torch.float32:
            torch.addmm(bias, x, weight.t(), out=y)
            return None
        torch.mm(x, weight.to(x.dtype).t(), out=y)
        return bias
    n, k = y.shape[1], x.shape[1]
    parts, out = slices(n, k, x.dtype)
    for rows in parts:
        y[:, rows] = x @ decode_slice(quant, view, rows, slice(0, k), out).t()
    return bias


def vendor_backward(dy: Tensor, weight: Tensor, quant: tuple, view: object, dx: Tensor) -> None:
    """dx = dy W; of a 4-bit weight a slice of columns at a time: disjoint columns of dx, so that no partial
    sum is rounded."""
    if quant[0] is None:
        torch.mm(dy, weight.to(dy.dtype), out=dx)
        return
    n, k = dy.shape[1], dx.shape[1]
    parts, out = slices(k, n, dy.dtype)
    for cols in parts:
        dx[:, cols] = dy @ decode_slice(quant, view, slice(0, n), cols, out)


def backward(
    dy: Tensor, x: Tensor | None, one: Linear, xa: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    weight, quant, n, k, _, lora_a, lora_b, *options = one
    dy, weight = dy.contiguous(), weight.contiguous()
    x, lora_a, lora_b = (None if t is None else t.contiguous() for t in (x, lora_a, lora_b))
    m, rank = dy.shape[0], 0 if lora_a is None else lora_a.shape[0]
    make = torch.empty if m and n else torch.zeros
    dx = make((m, k), dtype=dy.dtype) if needs.x else None
    d_bias = make(n, dtype=torch.float32) if needs.bias else None
    d_a = make(lora_a.shape, dtype=lora_a.dtype) if needs.lora_a else None
    d_b = make(lora_b.shape, dtype=lora_b.dtype) if needs.lora_b else None
    if m == 0 or n == 0:
        return dx, d_bias, d_a, d_b
    lora, view = lora_view(lora_a, lora_b, *options), weight_view(weight, quant, n, k)
    dyb = empty((m, rank))
    vendor = _choose(dy, one, forward=False).regime == "vendor"
    buffer = scratch((native().lora_scratch_bytes if vendor else native().scratch_bytes)(m, n, k, rank))
    tail = (
        address(xa),
        address(dyb),
        address(dx),
        address(d_a),
        address(d_b),
        address(d_bias),
        address(buffer),
        buffer.numel(),
    )
    if not vendor:
        native().qlora_linear_bwd(view, lora, address(dy), address(x), dtype_of(dy), m, *tail)
        return dx, d_bias, d_a, d_b
    if needs.x:
        vendor_backward(dy, weight, quant, view, dx)
    if any(needs[1:]) or rank:
        native().lora_bwd(lora, address(dy), address(x), dtype_of(dy), m, n, k, *tail)
    return dx, d_bias, d_a, d_b
