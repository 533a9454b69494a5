"""The GPU's linear + cross-entropy: cuBLAS for the products of a block of rows, one Triton launch for its
losses and gradients in between.

Two GEMMs and one launch a block with a frozen weight. No host synchronization and no shape that depends on
data: rows without a label are multiplied along, with a gradient of zero.
"""

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
from ..dequantize.triton import dequantize_slice
from ..linear import config
from ..sizes import next_power_of_2
from ..triton_numerics import round_to, to_fp32
from .budget import given

__all__ = ["block_rows", "linear_cross_entropy", "specializations"]

# Logits at a time, and a 4-bit weight's decoded rows at a time: not measured. Fewer bytes would stay in an
# L2, but make small products.
_LOGITS_BYTES = _SLAB_BYTES = 128 << 20
_MIN_ROWS = 16
_BLOCK, _WARPS = 4096, 8  # of a program; not measured


@triton.jit
def _tanh(x):
    """tanh and its slope: a polynomial below 0.625 (coefficients: Cephes, tanhf), 1 - 2e / (1 + e) with e =
    exp(-2|x|) above; there the slope is 4e / (1 + e)^2, which keeps its digits where tanh has become 1.
    """
    z, size = x * x, tl.abs(x)
    p = (
        ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    ) * z - 3.33332819422e-1
    near = p * z * x + x
    e = tl.exp(-2.0 * size)
    q = 2.0 / (1.0 + e)
    far = 1.0 - q * e
    value = tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
    return value, tl.where(size < 0.625, 1.0 - near * near, q * q * e)


@triton.jit
def _logits(row_ptr, bias_ptr, columns, V, softcap, SOFTCAP: tl.constexpr):
    """fp32 [BLOCK] of a row, -inf behind its end; and d logit / d u, 1 without a softcap."""
    inside = columns < V
    value = to_fp32(tl.load(row_ptr + columns, mask=inside, other=0.0))
    if bias_ptr is not None:
        value += to_fp32(tl.load(bias_ptr + columns, mask=inside, other=0.0))
    slope = 1.0
    if SOFTCAP:
        capped, slope = _tanh(value / softcap)
        value = softcap * capped
    return tl.where(inside, value, -float("inf")), slope


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [M, V], u without the bias; becomes d loss / d u
    labels_ptr,  # int64 [M]
    bias_ptr,  # [V] or None
    row_scale_ptr,  # fp32 [M] or None
    loss_ptr,  # fp32 [M]
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its maximum and sum of exponentials in one pass, its gradient in a second."""
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * V
    label = tl.load(labels_ptr + row)
    valid = label != ignore_index
    top, total, all_logits, at_label = -float("inf"), 0.0, 0.0, 0.0
    if valid:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value, _ = _logits(logits_row_ptr, bias_ptr, columns, V, softcap, SOFTCAP)
            higher = tl.maximum(top, tl.max(value, axis=0))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # no finite logit yet
            total = total * tl.exp(top - base) + tl.sum(tl.exp(value - base), axis=0)
            top = higher
            at_label += tl.sum(tl.where(columns == label, value, 0.0), axis=0)
            if SMOOTHING:
                all_logits += tl.sum(tl.where(columns < V, value, 0.0), axis=0)
        lse = tl.log(total) + top
        loss = lse - (1.0 - label_smoothing) * at_label + z_loss * lse * lse
        if SMOOTHING:
            loss -= label_smoothing * (all_logits / V)
        known = (label >= 0) & (label < V)
        tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
        if GRADIENT:
            scale = 1.0
            if row_scale_ptr is not None:
                scale = tl.load(row_scale_ptr + row)
            weight, even = (1.0 + 2.0 * z_loss * lse) / total, label_smoothing / V
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                value, slope = _logits(logits_row_ptr, bias_ptr, columns, V, softcap, SOFTCAP)
                target = tl.where(columns == label, 1.0 - label_smoothing + even, even)
                d_u = scale * (weight * tl.exp(value - top) - target) * slope
                tl.store(
                    logits_row_ptr + columns, round_to(d_u, logits_ptr.dtype.element_ty), mask=columns < V
                )
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                nothing = tl.zeros([BLOCK], dtype=tl.float32)
                tl.store(
                    logits_row_ptr + columns, round_to(nothing, logits_ptr.dtype.element_ty), mask=columns < V
                )


@work(_cross_entropy_kernel)
def _cross_entropy_work(a: Mapping[str, Any]) -> Launch:
    """The second pass, for the gradient, finds its row in L2."""
    reads = nbytes(a["logits_ptr"], a["labels_ptr"], a["bias_ptr"], a["row_scale_ptr"])
    return Launch("cross_entropy", reads, nbytes(a["loss_ptr"], a["logits_ptr"] if a["GRADIENT"] else None))


def _call(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    loss: Tensor,
    options: tuple,
    gradient: bool,
) -> Call:
    ignore_index, label_smoothing, z_loss, softcap = options
    m, v = logits.shape
    arguments = {
        "logits_ptr": logits,
        "labels_ptr": labels,
        "bias_ptr": bias,
        "row_scale_ptr": row_scale,
        "loss_ptr": loss,
        "V": v,
        "ignore_index": ignore_index,
        "label_smoothing": float(label_smoothing),
        "z_loss": float(z_loss),
        "softcap": float(softcap or 1.0),
        "SMOOTHING": label_smoothing != 0.0,
        "SOFTCAP": softcap is not None,
        "GRADIENT": gradient,
        "BLOCK": min(_BLOCK, max(256, next_power_of_2(v))),
    }
    return Call(_cross_entropy_kernel, m, arguments, num_warps=_WARPS, num_stages=1)


def block_rows(n: int, itemsize: int) -> int:
    """Rows whose logits are there at a time: what 128 MiB or the caller's budget hold, in whole tiles of 128
    where that many fit; 16 at least."""
    rows = (given() or _LOGITS_BYTES) // (n * itemsize)
    return max(rows // 128 * 128 if rows >= 128 else rows, _MIN_ROWS)


class _Weight:
    """The head's weight as dense slabs of rows, (rows, [size, K]); a 4-bit one that is one slab is decoded
    once."""

    def __init__(self, x: Tensor, weight: Tensor, quant: tuple, n: int) -> None:
        self.weight, self.quant, self.shape = weight, quant, (n, x.shape[1])
        self.parts = (
            [slice(0, n)] if quant[0] is None else config.slices(n, x.shape[1], x.element_size(), _SLAB_BYTES)
        )
        self.dense = weight.to(x.dtype) if quant[0] is None else None
        if quant[0] is not None:
            self.buffer = x.new_empty(max(part.stop - part.start for part in self.parts) * x.shape[1])
            if len(self.parts) == 1:
                self.dense = self._decode(self.parts[0])

    def _decode(self, rows: slice) -> Tensor:
        n, k = self.shape
        size = rows.stop - rows.start
        return dequantize_slice(
            self.weight, self.quant, n, k, rows, slice(0, k), self.buffer[: size * k].view(size, k)
        )

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.parts:
            yield rows, self._decode(rows) if self.dense is None else self.dense


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    labels: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    row_scale: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """As the reference."""
    x, weight, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
    bias, row_scale = (None if t is None else t.contiguous() for t in (bias, row_scale))
    (m, k), rank, wide = (
        x.shape,
        0 if lora_a is None else lora_a.shape[0],
        {"dtype": torch.float32, "device": x.device},
    )
    a, b = (None, None) if lora_a is None else (lora_a.to(x.dtype), (scaling * lora_b.float()).to(x.dtype))
    shapes = ((n,), (rank, k), (n, rank), (n, k))
    grads = [x.new_empty((m, k)) if needs[0] else None]
    grads += [
        torch.zeros(shape, **wide) if need else None for shape, need in zip(shapes, needs[1:], strict=True)
    ]
    loss, head, rows = torch.empty(m, **wide), _Weight(x, weight, quant, n), block_rows(n, x.element_size())
    buffer = x.new_empty(min(rows, m) * n)
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        block, logits = x[part], buffer[: (part.stop - start) * n].view(-1, n)
        xa = None if a is None else block @ a.t()
        for columns, slab in head.slabs():
            _multiply(block, slab.t(), logits[:, columns], xa, None if b is None else b[columns].t())
        scale = None if row_scale is None else row_scale[part]
        run(
            _call(
                logits,
                labels[part],
                bias,
                scale,
                loss[part],
                (ignore_index, label_smoothing, z_loss, softcap),
                any(needs),
            )
        )
        _add_gradients(grads, part, logits, block, head, a, b, xa, scaling)
    return loss, *grads


def _multiply(x: Tensor, w: Tensor, out: Tensor, low: Tensor | None, adapter: Tensor | None) -> None:
    """out = x w + low adapter: the low-rank product first, so that the large one adds to it in fp32."""
    if low is None:
        torch.mm(x, w, out=out)
        return
    torch.mm(low, adapter, out=out)
    out.addmm_(x, w)


def _add_gradients(
    grads: list[Tensor | None],
    part: slice,
    d_u: Tensor,
    x: Tensor,
    head: _Weight,
    a: Tensor | None,
    b: Tensor | None,
    xa: Tensor | None,
    scaling: float,
) -> None:
    """dx[part], and the block's share of the parameters' gradients added to theirs in fp32. `b` carries the
    scaling."""
    dx, d_bias, d_a, d_b, d_w = grads
    dyb = None if a is None or (dx is None and d_a is None) else d_u @ b
    if dx is not None:
        total = None if len(head.parts) == 1 else torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for columns, slab in head.slabs():
            if total is None:
                _multiply(d_u, slab, dx[part], dyb, a)
            else:  # a vocabulary of several slabs: their shares are summed in fp32
                total += d_u[:, columns] @ slab
        if total is not None:
            dx[part] = total if dyb is None else total + dyb @ a
    if d_bias is not None:
        d_bias += d_u.sum(0, dtype=torch.float32)
    if d_a is not None:
        d_a += dyb.t() @ x
    if d_b is not None:
        d_b.add_(d_u.t() @ xa, alpha=scaling)
    if d_w is not None:
        d_w += d_u.t() @ x


def specializations(arch: int) -> Iterator[Specialization]:
    """Training by dtype; every option at once; a vocabulary that is no multiple of 16; evaluation."""
    first = torch.float16 if arch < 80 else torch.bfloat16
    options = (-100, 0.0, 0.0, None)
    for dtype in dict.fromkeys((first, torch.bfloat16, torch.float16, torch.float32)):
        yield _specialization(f"train-{str(dtype)[6:]}", dtype, 128_256, options, wide=True)
    yield _specialization(
        "all-options", first, 256_000, (-100, 0.1, 1e-4, 30.0), wide=True, bias=True, scaled=True
    )
    yield _specialization("ragged", first, 50_257, options)
    yield _specialization("small", first, 200, options)
    yield _specialization("evaluation", first, 128_256, options, wide=True, gradient=False)


def _specialization(
    name: str,
    dtype: torch.dtype,
    v: int,
    options: tuple,
    *,
    wide: bool = False,
    bias: bool = False,
    scaled: bool = False,
    gradient: bool = True,
) -> Specialization:
    logits, labels, row = (
        torch.empty(s, dtype=d, device="meta")
        for s, d in (((8, v), dtype), (8, torch.int64), (8, torch.float32))
    )
    call = _call(logits, labels, logits[0] if bias else None, row if scaled else None, row, options, gradient)
    return specialization(name, call, wide_loads=("row_ptr",) if wide else ())
