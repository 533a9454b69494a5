"""The loss of a bf16 head by the C ABI of a library, and by its definition in fp64."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern import NF4Weight

from .compiled import c_weight, i64, pointer

__all__ = ["GUARD", "exact_loss", "head", "loss"]

GUARD = -777.0


def head(
    m: int, n: int, k: int, *, certain: int = 3, **four_bit
) -> tuple[Tensor, NF4Weight | Tensor, Tensor]:
    """x, a weight (4-bit with options for it) and labels; of every `certain`th row the label is almost sure,
    so that what is left of its gradient is small (1e-10)."""
    dense, labels = torch.randn(n, k) / k**0.5, torch.randint(0, n, (m,))
    x = torch.randn(m, k)
    for i in range(0, m, certain):
        x[i] = dense[labels[i]] * (4 + 3 * (i % 7))
    weight = NF4Weight.from_dense(dense, **four_bit) if four_bit else dense.bfloat16()
    return x.bfloat16(), weight, labels


def loss(
    lib: ctypes.CDLL,
    level: str,
    case: tuple[Tensor, NF4Weight | Tensor, Tensor],
    *,
    row_scale: Tensor | None = None,
    z_loss: float = 0.0,
    gradient: bool = True,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """(losses, dx); behind both stands a guard."""
    assert lib.pk_set_isa(level.encode()) == 0
    lib.pk_linear_cross_entropy_scratch_bytes.restype = ctypes.c_int64
    (x, weight, labels), (m, k) = case, case[0].shape
    size = lib.pk_linear_cross_entropy_scratch_bytes(i64(m), i64(weight.shape[0]), i64(k), gradient, threads)
    scratch = torch.full((size + 64,), 255, dtype=torch.uint8)  # as floats: NaN
    losses, dx = torch.full((m + 8,), GUARD), torch.full((m + 1, k), GUARD, dtype=torch.bfloat16)
    made = pointer(losses), pointer(dx) if gradient else None, pointer(scratch), i64(size), threads
    given = pointer(x), i64(m), pointer(labels), pointer(row_scale), ctypes.c_float(z_loss)
    described = c_weight(weight)
    assert lib.pk_linear_cross_entropy_cpu(ctypes.byref(described), *given, *made) == 0
    assert (losses[m:] == GUARD).all() and (dx[m:] == GUARD).all() and (scratch[size:] == 255).all()
    assert gradient or (dx == GUARD).all()
    return losses[:m], dx[:m]


def exact_loss(
    case: tuple[Tensor, NF4Weight | Tensor, Tensor], row_scale: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """In fp64, of the weight that the kernel multiplies by: a 4-bit one is rounded to bf16."""
    x, weight, labels = case
    weight = weight if isinstance(weight, Tensor) else weight.dequantize(torch.bfloat16)
    x = x.double().requires_grad_()
    logits = x @ weight.double().t()
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * torch.logsumexp(logits, 1).square()
    losses.backward(torch.ones_like(losses) if row_scale is None else row_scale.double())
    return losses.detach(), x.grad
