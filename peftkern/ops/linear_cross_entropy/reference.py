"""Linear + cross-entropy in plain PyTorch, fp32 accumulation (fp64 for fp64 inputs): the op's definition, and
its fallback on any device.

u = x W^T + scaling * x A^T B^T + bias, l = u or softcap * tanh(u / softcap), lse = logsumexp(l), and for a
row with label t loss = lse - (1 - eps) * l[t] - eps * mean(l) + z_loss * lse^2;   0 where t is ignore_index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import dense_weight

__all__ = ["linear_cross_entropy", "losses"]

_ROWS = 128  # a block of rows at a time: here, too, the logits of all rows never exist


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
) -> tuple[Tensor, ...]:
    """Each row's loss [M], and the gradients of sum(row_scale * loss) for x [M, K], bias [N], lora_a, lora_b
    and weight [N, K]; None where not needed. All but dx (in x's dtype) come in fp32, fp64 for fp64.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    w = dense_weight(weight, quant, n, x.shape[1]).to(wide)
    bias, a, b = (None if t is None else t.to(wide) for t in (bias, lora_a, lora_b))
    grads = [
        torch.zeros_like(t) if t is not None and need else None
        for t, need in zip((x_wide, bias, a, b, w), needs, strict=True)
    ]
    losses = x_wide.new_zeros(len(x))
    options = (ignore_index, label_smoothing, z_loss, softcap)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        part, u = x_wide[rows], x_wide[rows] @ w.t()
        if a is not None:
            u = u + scaling * (part @ a.t() @ b.t())
        if bias is not None:
            u = u + bias
        losses[rows], d_u = _loss_and_gradient(u, labels[rows], *options)
        if row_scale is not None:
            d_u = d_u * row_scale[rows, None].to(wide)
        _add_gradients(grads, rows, d_u, part, w, a, b, scaling)
    return losses, None if grads[0] is None else grads[0].to(x.dtype), *grads[1:]


def losses(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    labels: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    options: tuple[int, float, float, float | None],
) -> Tensor:
    """Each row's loss [M] from the logits of all rows, for torch to differentiate and transform; options as
    in the op's schema."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(wide) @ dense_weight(weight, quant, n, x.shape[1]).to(wide).t()
    if lora_a is not None:
        u = u + scaling * (x.to(wide) @ lora_a.to(wide).t() @ lora_b.to(wide).t())
    return _loss_and_gradient(u if bias is None else u + bias.to(wide), labels, *options)[0]


def _loss_and_gradient(
    u: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [rows] and d loss / d u [rows, N]."""
    n = u.shape[1]
    valid = labels != ignore_index
    index = torch.where(valid, labels, 0)[:, None]
    logits = u if softcap is None else softcap * torch.tanh(u / softcap)
    lse = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = lse - (1 - label_smoothing) * logits.gather(1, index) + z_loss * lse.square()
    target = torch.zeros_like(u).scatter_(1, index, 1 - label_smoothing)
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(dim=1, keepdim=True)
        target = target + label_smoothing / n
    d_logits = (1 + 2 * z_loss * lse) * torch.softmax(logits, dim=1) - target
    d_u = d_logits if softcap is None else d_logits * (1 - (logits / softcap).square())
    return torch.where(valid, loss[:, 0], 0), torch.where(valid[:, None], d_u, 0)


def _add_gradients(
    grads: list[Tensor | None],
    rows: slice,
    d_u: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
) -> None:
    dx, d_bias, d_a, d_b, d_w = grads
    if dx is not None:
        dx[rows] = d_u @ w if a is None else d_u @ w + scaling * (d_u @ b @ a)
    if d_bias is not None:
        d_bias += d_u.sum(0)
    if d_a is not None:
        d_a += scaling * (d_u @ b).t() @ x
    if d_b is not None:
        d_b += scaling * d_u.t() @ (x @ a.t())
    if d_w is not None:
        d_w += d_u.t() @ x
