"""The QLoRA linear on a GPU: which kernels run in which order. `plan.py` runs the same functions on tensors
without storage, which gives their launches as data.

Large M, cuBLAS. Forward: 1 slab || xa, 2 y = s xa B^T + bias, 3 y += x W^T. Backward: 1 slab || dyb, dB, 2 dx
= drop(dyb A) and dA, 3 dx += dy W, 4 the partial sums. Seven launches, to which a further slab adds a decode
and a GEMM each way. With our own GEMM the low-rank
product starts its accumulator, which spares the passes that write y and dx first: six.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...runtime.abi import addresses
from ...runtime.backends import use_cuda_kernels
from ...runtime.launch import Call, run
from ...runtime.plan import device_of
from ...runtime.replay import Held, replayed
from .. import autocast_off
from ..dequantize.triton import dequantize_slice, rectangle
from . import config, cuda, low_rank, tuned
from . import matmul_calls as matmul
from .config import Choice
from .low_rank_calls import DyPartials, Low, beside_decoding, config_for, dy_call, xa_call
from .low_rank_config import LowRankConfig, beside_a_slab
from .problem import Linear, Needs

__all__ = ["Described", "LateInput", "backward", "choose", "forward", "held"]

_unsafe_view = torch.ops.aten._unsafe_view.default


def choose(x: Tensor, quant: tuple, n: int, k: int, *, forward: bool) -> Choice:
    """The regime of one direction for x (or dy) [M, ...] on its device."""
    device = device_of(x)
    row = tuned.forced() or (tuned.load(device.name) if device.name else None)
    shape = (n, k) if tuned.forced() is None else None  # a forced row's limits are meant as they stand
    built = device.cuda if x.is_meta else use_cuda_kernels(x)
    mma = built and forward and cuda.mma_supported(x, quant, n, k)
    dtype, dense = str(x.dtype).removeprefix("torch."), quant[0] is None
    settings = {"dtype": dtype, "m": x.shape[0], "forward": forward, "row": row, "shape": shape}
    return config.choose_gpu(arch=device.arch, **settings, cuda=built, mma=mma, dense=dense)


def low_rank_config_of(
    x: Tensor, adapter: Tensor | None, n: int, k: int, rank: int, slab: bool
) -> LowRankConfig:
    """Beside a slab's decoding the device is full already: no split contraction; and with a large L2 dyb
    needs no partial sums."""
    found = config_for(x, adapter, x.shape[0], n, k, max(rank, 1))
    if not slab:
        return found
    return beside_a_slab(found, n, x.element_size(), device_of(x).l2)


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = a b, or out += a b, by cuBLAS; `out` may be columns of a wider tensor."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


class _Slabs:
    """The weight as dense slabs of rows or columns, decoded one after the other into one buffer; `beside`
    shares the first one's launch."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        quant: tuple,
        shape: tuple[int, int],
        choice: Choice,
        *,
        by_rows: bool,
    ) -> None:
        self.weight, self.quant, self.shape, self.by_rows = weight, quant, shape, by_rows
        n, k = shape
        total, width = (n, k) if by_rows else (k, n)
        if quant[0] is None:
            self.parts, self.dense = [slice(0, total)], weight.to(x.dtype)
            return
        self.parts, self.dense = config.slices(total, width, x.element_size(), choice.slab_bytes), None
        self.buffer = x.new_empty(max(part.stop - part.start for part in self.parts) * width)

    def slab(self, index: int, beside: Call | None) -> Tensor:
        """The part's [rows, K] or [N, columns] of W; what `beside` does is launched too."""
        if self.dense is not None:
            if beside is not None:
                run(beside)
            return self.dense
        n, k = self.shape
        part = self.parts[index]
        rows, cols = (part, slice(0, k)) if self.by_rows else (slice(0, n), part)
        height, width = rows.stop - rows.start, cols.stop - cols.start
        out = self.buffer[: height * width].view(height, width)
        if beside is None:
            return dequantize_slice(self.weight, self.quant, n, k, rows, cols, out)
        run(beside_decoding(beside, [rectangle(self.weight, self.quant, k, rows, cols, out)]))
        return out


def _contiguous(one: Linear) -> Linear:
    return Linear(*(t.contiguous() if isinstance(t, Tensor) else t for t in one))


@replayed(tuned.settings)
def forward(x: Tensor, one: Linear) -> tuple[Tensor, Tensor]:
    """As the reference."""
    one = _contiguous(one)
    weight, quant, n, k, bias, lora_a, lora_b, scaling, dropout_p, seed = one
    x, m, rank = x.contiguous(), x.shape[0], 0 if lora_a is None else lora_a.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n)), x.new_empty((m, rank), dtype=torch.float32)
    choice = choose(x, quant, n, k, forward=True)
    if choice.regime == "slab":
        return _slab_forward(x, one, choice)
    kernels = low_rank if choice.regime == "fused" else cuda
    xa = kernels.xa_forward(x, lora_a, dropout_p, seed) if rank else None
    product = (
        matmul.matmul_forward if choice.regime == "fused" else getattr(kernels, f"{choice.regime}_forward")
    )
    y = product(x, weight, quant, n, bias, lora_b, xa, scaling)
    return y, x.new_empty((m, 0), dtype=torch.float32) if xa is None else xa


def _slab_forward(x: Tensor, one: Linear, choice: Choice) -> tuple[Tensor, Tensor]:
    weight, quant, n, k, bias, lora_a, lora_b, scaling, dropout_p, seed = one
    m, rank = x.shape[0], 0 if lora_a is None else lora_a.shape[0]
    y, xa, beside = x.new_empty((m, n)), x.new_empty((m, 0), dtype=torch.float32), None
    if rank:
        passes = low_rank_config_of(x, lora_a, n, k, rank, slab=True)
        low = Low(lora_a, dropout_p=dropout_p, seed=seed)
        beside, (parts,) = xa_call(x, [low], passes, arch=device_of(x).arch)
        xa = parts[0]
    slabs = _Slabs(x, weight, quant, (n, k), choice, by_rows=True)
    for index, rows in enumerate(slabs.parts):
        slab = slabs.slab(index, beside if index == 0 else None)
        out, part_bias = y[:, rows], None if bias is None else bias[rows]
        if choice.gemm == "triton":
            matmul.matmul_forward(
                x,
                slab,
                matmul.DENSE,
                slab.shape[0],
                part_bias,
                lora_b[rows] if rank else None,
                xa if rank else None,
                scaling,
                out,
            )
        elif rank:
            if index == 0:
                low_rank.y_epilogue(y, xa, lora_b, scaling, bias, accumulate=False, config=passes)
            multiply(x, slab.t(), out, accumulate=True)
        elif bias is not None:
            torch.addmm(part_bias.to(x.dtype), x, slab.t(), out=out)
        else:
            multiply(x, slab.t(), out, accumulate=False)
    return y, xa


class LateInput(Protocol):
    """An x that was not kept: formed when it is asked for, which is once and for dA alone."""

    def before(self) -> Tensor:
        """Before dx is there."""

    def after(self, dx: Tensor) -> Tensor:
        """Once dx is; it may take dx's memory."""


@replayed(tuned.settings)
def backward(
    dy: Tensor, x: Tensor | LateInput | None, one: Linear, xa: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    dy, x, one = dy.contiguous(), x.contiguous() if isinstance(x, Tensor) else x, _contiguous(one)
    weight, quant, n, k, _, lora_a, lora_b, scaling, dropout_p, seed = one
    m, rank = dy.shape[0], 0 if lora_a is None else lora_a.shape[0]
    need_x, need_bias, need_a, need_b = needs
    if m == 0 or n == 0:
        return (
            dy.new_zeros((m, k)) if need_x else None,
            dy.new_zeros(n, dtype=torch.float32) if need_bias else None,
            torch.zeros_like(lora_a) if need_a else None,
            torch.zeros_like(lora_b) if need_b else None,
        )
    choice = choose(dy, quant, n, k, forward=False)
    passes = low_rank_config_of(dy, lora_b, n, k, rank, slab=choice.regime == "slab")
    first, partials = None, DyPartials(None, None, None)
    if (rank and (need_x or need_a or need_b)) or need_bias:
        member = low_rank.dy_member(dy, xa, lora_b, scaling, needs)
        first, (partials,) = dy_call([member], passes, arch=device_of(dy).arch)
    dx, d_a = dy.new_empty((m, k)) if need_x else None, None
    if choice.regime == "slab" and need_x:
        d_a = _slab_backward(dy, x, one, choice, passes, first, partials, dx, need_a)
    else:
        if first is not None:
            run(first)
        dyb = low_rank.summed(partials.dyb, passes)
        if need_x:
            matmul.matmul_dx(dy, weight, quant, k, lora_a if rank else None, dyb, dropout_p, seed, dx)
        if need_a:
            d_a = low_rank.x_pass(_formed(x, dx), dyb, lora_a, dropout_p, seed, config=passes)
    adapters = lora_b.dtype if rank else torch.float32
    d_a, d_b, d_bias = low_rank.reduce_partials(d_a, partials.d_lora_b, partials.d_bias, adapters)
    return dx, d_bias, d_a, d_b


def _slab_backward(dy, x, one: Linear, choice: Choice, passes, first, partials, dx, need_a) -> Tensor | None:
    """Fills dx; partial sums of dA where needed."""
    lora_a, dropout_p, seed = one.lora_a, one.dropout_p, one.seed
    rank, d_a, dyb = 0 if lora_a is None else lora_a.shape[0], None, None
    slabs = _Slabs(dy, one.weight, one.quant, (one.n, one.k), choice, by_rows=False)
    for index, cols in enumerate(slabs.parts):
        slab, out = slabs.slab(index, first if index == 0 else None), dx[:, cols]
        if index == 0 and rank:
            dyb = low_rank.summed(partials.dyb, passes)
        if choice.gemm == "triton":
            adapter = lora_a[:, cols] if rank else None
            matmul.matmul_dx(
                dy,
                slab,
                matmul.DENSE,
                slab.shape[1],
                adapter,
                dyb,
                dropout_p,
                seed,
                out,
                first_col=cols.start,
            )
            continue
        if index == 0 and rank:
            x = _formed(x, None) if need_a else None
            d_a = low_rank.x_pass(
                x, dyb, lora_a, dropout_p, seed, dx=dx, need_a=need_a, accumulate=False, config=passes
            )
        multiply(dy, slab, out, accumulate=rank > 0)
    if choice.gemm == "triton" and need_a:
        d_a = low_rank.x_pass(_formed(x, dx), dyb, lora_a, dropout_p, seed, config=passes)
    return d_a


def _formed(x: Tensor | LateInput, dx: Tensor | None) -> Tensor:
    return x if isinstance(x, Tensor) else x.before() if dx is None else x.after(dx)


class Described:
    """One linear for calls to come, which are replayed without a look at its own tensors; it holds them. A
    seed belongs to a call."""

    __slots__ = ("_backward", "_forward", "_one", "at")

    def __init__(self, one: Linear) -> None:
        self._one, base, low = one, (one.weight, *one.quant[:6]), (one.lora_a, one.lora_b)
        self.at = addresses((*base, *low))
        # In the order of `Linear`. The backends have descriptors each: of settings a row alone may change.
        self._forward = Held(forward, (*base, one.bias, *low), tuned.forced)
        self._backward = Held(backward, (*base, *low), tuned.forced)

    def forward(self, x: Tensor, lead: Sequence[int], seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [M, K] -> y [*lead, N], xa [M, R], as the reference."""
        one, after = self._one, [] if seed is None else [seed]
        y, xa = self._forward([x], after, (), lambda: (x, one._replace(seed=seed)))
        # a result that is nobody's yet: no view, which must not be written in place
        return _unsafe_view(y, (*lead, one.n)), xa

    def backward(
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, needs: Needs, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """dy [..., N], x [M, K] -> dx [M, K] and the other gradients, as the reference."""
        dy, needs = dy.reshape(-1, self._one.n), Needs(*needs)
        before, after = [dy] if x is None else [dy, x], [] if seed is None else [seed]
        rest = needs, x is None, seed is None
        with autocast_off(dy):
            return self._backward(
                before,
                after if xa is None else [*after, xa],
                rest,
                lambda: (dy, x, self._one._replace(bias=None, seed=seed), xa, needs),
            )


def held(one: Linear) -> Described | None:
    """As the CPU's."""
    tensors = one.weight, one.bias, one.lora_a, one.lora_b
    if not one.weight.numel() or not all(t is None or t.is_contiguous() for t in tensors):
        return None
    return Described(one)
