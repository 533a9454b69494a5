"""The CPU's linear + cross-entropy: in tiles, without logits, or a block of rows' logits fill a reused
scratch and become their own gradient there."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import address, dtype_of, empty, native, scratch, zeros
from . import tiles
from .budget import given
from .heads import EngineHead, Grads, Head, VendorHead, served_by_vendor

__all__ = ["block_rows", "linear_cross_entropy"]

# Logits at a time: 256 rows of 49,152 in fp32, 512 in 16 bits. Every block reads the weight twice: the two
# GEMMs of 512 rows x 49,152 x 576 take as long as in one piece with 256 rows a block, 1.09 times that with
# 128, 1.27 with 64 (fp32, Zen 3, one thread, least CPU time of five on a busy machine). In bf16 the loss
# takes 81 ms with 512 rows, 94 with 256; of 256 rows x 256,000 x 2304 1.08 s with 96, 1.46 with 48 (Zen 5,
# two threads, the least of four).
_LOGITS_BYTES = 48 << 20
_MIN_ROWS, _MAX_ROWS = 16, 512


def block_rows(n: int, itemsize: int) -> int:
    """Rows whose logits are there at a time: whole panels of 16, what 48 MiB hold, 16 at least and 512 at
    most; or what the caller's budget holds, 16 at least."""
    budget = given()
    rows = max((_LOGITS_BYTES if budget is None else budget) // (n * itemsize) // 16 * 16, _MIN_ROWS)
    return min(rows, _MAX_ROWS) if budget is None else rows


def _equal_blocks(count: int, most: int) -> int:
    """Rows a block, such that the last one is not a small rest."""
    return -(-count // max(-(-count // most), 1))


def _logits_buffer(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may be in training
        return scratch(size * dtype.itemsize, "logits")[: size * dtype.itemsize].view(dtype)


def _labelled(labels: Tensor, ignore_index: int, n: int) -> Tensor | None:
    """The rows that have a label, None where all have one."""
    kept = labels != ignore_index
    rows = None if bool(kept.all()) else kept.nonzero().view(-1)
    used = labels if rows is None else labels[rows]
    if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < n):
        raise IndexError(
            f"labels: from {int(used.min())} to {int(used.max())}, expected 0 to {n - 1}, or "
            f"ignore_index {ignore_index}"
        )
    return rows


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
    x, weight, rows = x.contiguous(), weight.contiguous(), _labelled(labels, ignore_index, n)
    if tiles.serves(x, weight, quant, (bias, lora_a, lora_b), label_smoothing, softcap, needs):
        made = tiles.linear_cross_entropy(x, weight, quant, n, labels, rows, z_loss, row_scale, needs[0])
        return *made, None, None, None, None
    count = len(x) if rows is None else len(rows)
    size = _equal_blocks(count, block_rows(n, x.element_size()))
    vendor = served_by_vendor(x, weight, quant, n, min(count, size), needs[4])
    if not vendor:  # the engine's logits are fp32
        size = _equal_blocks(count, block_rows(n, 4))
    head: Head = (VendorHead if vendor else EngineHead)(x, weight, quant, n, lora_a, lora_b, scaling)
    loss, grads = zeros(len(x)), Grads.of(x, n, lora_a, needs, count > 0)
    buffer = _logits_buffer(min(size, count) * n, head.dtype)
    options = (softcap or 0.0, label_smoothing, z_loss)
    added = None if bias is None else bias.float().contiguous()
    for start in range(0, count, max(size, 1)):
        part = slice(start, min(start + size, count)) if rows is None else rows[start : start + size]
        block, targets = x[part].to(head.dtype), labels[part].contiguous()
        scale = None if row_scale is None else row_scale[part].float().contiguous()
        logits, result = buffer[: len(block) * n], empty(len(block))
        head.logits(block, logits)
        shape = (len(block), n, head.width)
        pointers = (address(added), address(targets), address(scale))
        native().cross_entropy(
            address(logits), dtype_of(logits), *shape, *pointers, *options, address(result), any(needs)
        )
        loss[part] = result
        if any(needs):
            head.gradients(block, logits, part, grads, start == 0)
    return loss, *grads
