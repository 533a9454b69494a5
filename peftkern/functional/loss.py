"""Losses that never hold the logits; `functional` carries the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from ..ops.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from . import checks

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor,
    weight: NF4Weight | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_losses: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a linear head's logits, which exist for one block of rows at a time only.

    u = x W^T + scaling * x A^T B^T + bias; l = u, or softcap * tanh(u / softcap); lse = logsumexp(l); of a
    row with label t loss = lse - (1 - label_smoothing) * l[t] - label_smoothing * mean(l) + z_loss * lse^2.

    The gradients are made in the same pass as the loss (two matrix products with a frozen weight, three with
    a trained one) and scaled by
    the incoming one in backward: kept till then are dx [M, K] in x's dtype and the parameters' gradients in
    fp32. With reduction "none" and a parameter that requires grad, that pass is made again in backward.
    Nothing of it is done where no gradient is wanted.

    Sums, softmax and loss are fp32. The logits of 16-bit x are rounded to its dtype where a vendor's 16-bit
    product makes them (GPUs, AVX-512), as in stock models; elsewhere they stay fp32. Scratch: a block's
    logits, 48 MiB or 16 rows on a CPU, 128 MiB or 16 rows on a GPU, whichever is more, whatever M is. On a
    CPU rows without a label cost nothing; on a GPU they are multiplied along, as leaving them out would make
    the host wait.

    Args:
        x: [..., K], fp32, bf16 or fp16; in this dtype, whatever autocast says.
        weight: NF4Weight of shape [V, K], frozen, or dense [V, K] (fp32, bf16, fp16), which may require grad.
        labels: int64, x's shape without K; ignore_index, or from 0 to V - 1.
        bias: [V] or None; may require grad.
        lora_a: [R, K]; lora_b: [V, R]; both or none, one dtype, R from 1 to 256.
        scaling: of the low-rank branch.
        ignore_index: rows with this label have loss 0 and no gradient.
        label_smoothing: in [0, 1], as in torch's cross_entropy.
        z_loss: weight of lse^2, >= 0.
        softcap: positive, or None.
        reduction: "mean" over the labels that are not ignored (nan where there is none, the gradients then 0:
            as torch), "sum", "none".
        num_items_in_batch: with "mean", divide by this number (int, or a tensor of one element on x's device)
            instead, as transformers does over gradient accumulation.
        row_losses: fp32 of labels' shape, contiguous, on x's device: filled with each row's loss, 0 where the
            label is ignored, at no cost but the copy. No gradient goes through it.
    Returns: fp32 scalar; with "none" fp32 of labels' shape.
    Raises: TypeError, ValueError naming the argument; IndexError for a label out of range (on a GPU: that
    row's loss is nan).
    Source: Cut Your Losses (Wijmans et al., 2024), section 2; z-loss: PaLM (Chowdhery et al., 2022), section
    5; softcap: Gemma 2 (2024).

    >>> x, w = torch.randn(6, 64, requires_grad=True), torch.randn(1000, 64)
    >>> loss = linear_cross_entropy(x, w, torch.tensor([5, 999, -100, 0, 1, 2]))
    >>> loss.backward(); tuple(x.grad.shape)
    (6, 64)
    """
    n, k = _weight_shape(weight)
    checks.activation(x, (n, k), weight.device)
    _check_labels(labels, x)
    checks.vector("bias", bias, n, weight.device)
    checks.adapter(lora_a, lora_b, n, k, weight.device)
    _check_options(label_smoothing, z_loss, softcap, reduction, num_items_in_batch)
    _check_row_losses(row_losses, labels)
    flat, by_row = labels.reshape(-1), reduction == "none"
    options = (
        int(ignore_index),
        float(label_smoothing),
        float(z_loss),
        None if softcap is None else float(softcap),
    )
    divisor = _divisor(flat, ignore_index, num_items_in_batch, x.device) if reduction == "mean" else None
    filled = None if row_losses is None else row_losses.view(-1)
    loss = _linear_cross_entropy(
        checks.flat(x), weight, flat, bias, lora_a, lora_b, float(scaling), options, divisor, by_row, filled
    )
    return loss.reshape(labels.shape) if by_row else loss


def _divisor(labels: Tensor, ignore_index: int, items: int | Tensor | None, device: torch.device) -> Tensor:
    if items is None:
        return (labels != ignore_index).sum().float()
    if isinstance(items, Tensor):
        return items.detach().reshape(()).to(device=device, dtype=torch.float32)
    return torch.full((), float(items), dtype=torch.float32, device=device)


def _weight_shape(weight: NF4Weight | Tensor) -> tuple[int, int]:
    shape = tuple(weight.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"weight: got shape {shape}, expected [V, K] with V of 1 or more")
    if isinstance(weight, Tensor) and weight.dtype not in checks.FLOATS:
        raise TypeError(
            f"weight: got a {weight.dtype} tensor, expected float32, bfloat16, float16 or an NF4Weight "
            "(NF4Weight.from_bnb)"
        )
    return shape


def _check_labels(labels: Tensor, x: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, expected int64")
    if labels.shape != x.shape[:-1] or labels.device != x.device:
        got, expected = (tuple(labels.shape), labels.device), (tuple(x.shape[:-1]), x.device)
        raise ValueError(f"labels: got shape {got[0]} on {got[1]}, expected {expected[0]} on {expected[1]}")


def _check_row_losses(row_losses: Tensor | None, labels: Tensor) -> None:
    if row_losses is None:
        return
    got = (tuple(row_losses.shape), row_losses.dtype, row_losses.device)
    if (
        got != (tuple(labels.shape), torch.float32, labels.device)
        or not row_losses.is_contiguous()
        or row_losses.requires_grad
    ):
        raise ValueError(
            f"row_losses: got {got}, expected contiguous "
            f"{(tuple(labels.shape), torch.float32, labels.device)} that requires no grad"
        )


def _check_options(
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, items: int | Tensor | None
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number from 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: got {z_loss}, expected 0 or more")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap: got {softcap}, expected a positive number or None")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    if items is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch: goes with reduction 'mean', got {reduction!r}")
    if isinstance(items, Tensor) and items.numel() != 1:
        raise ValueError(
            f"num_items_in_batch: got a tensor of shape {tuple(items.shape)}, expected one number"
        )
