"""The CPU's loss of a bf16 head in tiles: what its logits weigh of the weight is summed a few words at a
time, so that there are no logits at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.native import address, empty, native, scratch, weight_view
from ..linear import cpu_rows
from .budget import given

__all__ = ["MOST_ROWS", "linear_cross_entropy", "serves"]

MOST_ROWS, _LEAST_ROWS = 512, 32  # of a call, whose sums are its scratch


def serves(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    others: tuple[Tensor | None, ...],
    label_smoothing: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> bool:
    """Whether the kernel takes a call: bf16 rows and a frozen weight, bf16 (where the level's row says that
    it is faster so) or 4-bit; none of `others`, bias and adapter; a loss of labels alone."""
    if x.dtype != torch.bfloat16 or any(t is not None for t in others) or any(needs[1:]):
        return False
    if label_smoothing or softcap is not None or not native().attention_served():
        return False
    if quant[0] is None:
        return weight.dtype == torch.bfloat16 and cpu_rows.row(native().isa()).loss
    return quant[6] >= 64 and x.shape[1] % 64 == 0


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    labels: Tensor,
    rows: Tensor | None,
    z_loss: float,
    row_scale: Tensor | None,
    need_x: bool,
) -> tuple[Tensor, Tensor | None]:
    """Each row's loss [M] and dx [M, K] of what the reference defines, of the rows that have a label; x and
    weight lie contiguous."""
    count, k = len(x) if rows is None else len(rows), x.shape[1]
    losses = torch.zeros(len(x), dtype=torch.float32, device="cpu")
    dx = torch.zeros_like(x) if need_x else None
    view, most = weight_view(weight, quant, n, k), _rows(count, n, k, need_x)
    size = -(-count // max(-(-count // most), 1))  # such that the last block is not a small rest
    for start in range(0, count, max(size, 1)):
        part = slice(start, min(start + size, count)) if rows is None else rows[start : start + size]
        block, targets, loss = x[part], labels[part].contiguous(), empty(min(size, count - start))
        scale = None if row_scale is None else row_scale[part].float().contiguous()
        out = None if dx is None else dx[part] if rows is None else torch.empty_like(block)
        room = scratch(native().linear_cross_entropy_scratch_bytes(len(block), n, k, need_x), "loss")
        given_rows = address(block), len(block), address(targets), address(scale), z_loss
        native().linear_cross_entropy(
            view, *given_rows, address(loss), address(out), room.data_ptr(), room.numel()
        )
        losses[part] = loss
        if rows is not None and dx is not None:
            dx[part] = out
    return losses, dx


def _rows(count: int, n: int, k: int, need_x: bool) -> int:
    """Rows of a call: as many as a budget's bytes of scratch are enough for, but 32."""
    rows, budget = min(max(count, 1), MOST_ROWS), given()
    while budget is not None and rows > _LEAST_ROWS:
        if native().linear_cross_entropy_scratch_bytes(rows, n, k, need_x) <= budget:
            break
        rows = max(rows // 2, _LEAST_ROWS)
    return rows
