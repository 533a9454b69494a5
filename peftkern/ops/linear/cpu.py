"""Launchers of the native CPU kernels: the fused GEMV, our GEMM, or decoded slices for the vendor's GEMM, as
`config.choose` says."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.abi import addresses
from ...runtime.native import DTYPES, address, dtype_of, native, scratch, weight_view
from . import cpu_rows
from .problem import Linear, Needs

__all__ = [
    "Described",
    "backward",
    "decode_slice",
    "few_rows",
    "forward",
    "held",
    "lora_view",
    "no_adapter",
    "slices",
    "vendor_backward",
    "vendor_forward",
]


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


class Described:
    """One linear as the C ABI takes it, for any number of rows; holds every tensor whose address it gave
    away. A seed belongs to a call."""

    __slots__ = (
        "at",
        "bias",
        "bias_at",
        "kernels",
        "lora",
        "lora_a",
        "lora_b",
        "one",
        "regime",
        "view",
        "weight",
    )

    def __init__(self, one: Linear) -> None:
        self.one, self.kernels = one, native()
        self.weight, self.bias, self.lora_a, self.lora_b = (
            None if t is None else t.contiguous() for t in (one.weight, one.bias, one.lora_a, one.lora_b)
        )
        self.bias_at = address(self.bias), dtype_of(self.bias)
        self.view = weight_view(self.weight, one.quant, one.n, one.k)
        self.lora = lora_view(self.lora_a, self.lora_b, one.scaling, 0.0, None)
        sizes = dict(n=one.n, k=one.k, dense=one.quant[0] is None, blocksize=one.quant[6])
        self.regime = functools.partial(cpu_rows.choose, **sizes)

    def dropping(self, seed: Tensor) -> object:
        """The descriptor of the low-rank branch in a call with dropout."""
        return lora_view(self.lora_a, self.lora_b, self.one.scaling, self.one.dropout_p, seed)

    def forward(self, x: Tensor, lead: Sequence[int], seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [M, K] -> y [*lead, N], xa [M, R], as the reference."""
        x, n, k, kernels = x.contiguous(), self.one.n, self.one.k, self.kernels
        rank = 0 if self.lora_a is None else self.lora_a.shape[0]
        m, dtype, lora = x.shape[0], x.dtype, self.lora if seed is None else self.dropping(seed)
        y = torch.empty((*lead, n), dtype=dtype, device="cpu")
        xa = torch.empty((m, rank), dtype=torch.float32, device="cpu")
        given, made = (x.data_ptr(), DTYPES[dtype], m), (y.data_ptr(), xa.data_ptr())
        regime = self.regime(dtype=str(dtype)[6:], isa=kernels.isa(), m=m, forward=True).regime
        if regime != "vendor":
            kernels.qlora_linear_fwd(self.view, lora, *given, *self.bias_at, *made, regime == "gemv")
            return y, xa
        bias = vendor_forward(x, self.weight, self.one.quant, self.view, y.view(m, n), self.bias)
        if rank or bias is not None:
            kernels.lora_fwd(lora, *given, n, k, address(bias), dtype_of(bias), *made)
        return y, xa

    def backward(
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, needs: Needs, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """dy [..., N], x [M, K] -> dx [M, K] and the other gradients, as the reference."""
        n, k, lora_a, lora_b, kernels = self.one.n, self.one.k, self.lora_a, self.lora_b, self.kernels
        dy, x = dy.contiguous(), None if x is None else x.contiguous()
        m, rank = dy.shape[:-1].numel(), 0 if lora_a is None else lora_a.shape[0]
        dtype, (need_x, need_bias, need_a, need_b) = dy.dtype, needs
        make = torch.empty if m and n else torch.zeros
        dx = make((m, k), dtype=dtype, device="cpu") if need_x else None
        d_bias = make(n, dtype=torch.float32, device="cpu") if need_bias else None
        d_a = make(lora_a.shape, dtype=lora_a.dtype, device="cpu") if need_a else None
        d_b = make(lora_b.shape, dtype=lora_b.dtype, device="cpu") if need_b else None
        if m == 0 or n == 0:
            return dx, d_bias, d_a, d_b
        dyb = torch.empty((m, rank), dtype=torch.float32, device="cpu")
        lora = self.lora if seed is None else self.dropping(seed)
        given = dy.data_ptr(), address(x), DTYPES[dtype], m
        low = address(xa), dyb.data_ptr(), address(dx), address(d_a), address(d_b), address(d_bias)
        if self.regime(dtype=str(dtype)[6:], isa=kernels.isa(), m=m, forward=False).regime != "vendor":
            kernels.qlora_linear_bwd(self.view, lora, *given, *low)
            return dx, d_bias, d_a, d_b
        if need_x:
            vendor_backward(dy.view(m, n), self.weight, self.one.quant, self.view, dx)
        if rank or need_bias:
            kernels.lora_bwd(lora, *given, n, k, *low)
        return dx, d_bias, d_a, d_b


def held(one: Linear) -> Described | None:
    """A linear described for calls to come; None where it would read a copy, which later writes to the
    original do not reach, or where there is nothing to multiply with."""
    tensors = one.weight, one.bias, one.lora_a, one.lora_b
    if not one.weight.numel() or not all(t is None or t.is_contiguous() for t in tensors):
        return None
    found = Described(one)
    found.at = addresses((one.weight, *one.quant[:6], one.lora_a, one.lora_b))
    return found


def forward(x: Tensor, one: Linear) -> tuple[Tensor, Tensor]:
    """As the reference."""
    return Described(one).forward(x, x.shape[:1], one.seed)


@functools.cache
def no_adapter() -> object:
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
    view, made = weight_view(weight, quant, n, k), (address(bias), dtype_of(bias), y.data_ptr(), 0, True)
    extension.qlora_linear_fwd(view, no_adapter(), x.data_ptr(), DTYPES[x.dtype], m, *made)
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
    return Described(one).backward(dy, x, xa, needs, one.seed)
