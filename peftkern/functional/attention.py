"""The public functions of attention, also with a learned prefix; reached as
`peftkern.functional.scaled_dot_product_attention` and so on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention as _attention
from ..ops import prefix_attention as _prefix_attention

__all__ = ["prefix_attention", "prefix_gated", "scaled_dot_product_attention"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention: y = softmax(scale q k^T + mask) v.

    On CPUs with bf16 products (AVX-512-BF16, AMX) bf16 heads are multiplied in tiles of our own
    (`ops/attention/config.py` says which calls); others, and graphs of torch.compile, take torch's function
    of this name.

    Args:
        q: [B, H, S, D]; k, v: [B, Hkv, T, D], of one floating dtype, H a multiple of Hkv.
        mask: [1 or B, 1 or H, S, T], bool (True is seen) or floating (added); or None.
        causal: query i sees the keys 0 ... i; S = T then, and no mask.
        scale: 1 / sqrt(D) by default.
    Returns: [B, H, S, D]; from our kernel in memory [B, S, H, D]. Saved for backward: q, k, v, y, and fp32
    [B, H, S].
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: Vaswani et al. (2017), equation 1; FlashAttention-2 (Dao, 2023).

    >>> q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    >>> scaled_dot_product_attention(q, k, v, causal=True).shape
    torch.Size([2, 4, 5, 16])
    """
    _check_keys(q, k, v)
    _check_mask(mask, causal, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not torch.compiler.is_compiling() and _attention.config.native(q, k, v, mask, scale):
        return _attention.attention(q, k, v, mask, causal, scale)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention in which every query also sees a prefix of P learned keys and values that all samples share.

    y = softmax([scale q prefix_k^T, scale q k^T + mask]) [prefix_v; v], in one softmax. k and v are read
    where they lie, also where they have fewer heads than q; the prefix is neither copied behind them nor for
    each sample, and its gradients are summed over the batch in fp32 (fp64 for fp64).

    Args:
        q: [B, H, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv], of one dtype (fp64, fp32, bf16, fp16), H a
            multiple of Hkv.
        prefix_k: [Hkv, P, D]; prefix_v: [Hkv, P, Dv], of any floating dtype; P >= 1.
        mask: of k alone, [1 or B, 1 or H, S, T], bool (True is seen) or floating (added). The prefix is never
            masked.
        causal: query i sees the keys 0 ... i; S = T then, and no mask.
        scale: 1 / sqrt(D) by default.
    Returns: [B, H, S, Dv], in memory [B, S, H, Dv]. Saved for backward: what attention without a prefix
    saves.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: Prefix-Tuning (Li and Liang, 2021), equation 7 of He et al. (2022) for the split of the softmax.

    >>> q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    >>> prefix_attention(q, k, v, torch.randn(2, 3, 16), torch.randn(2, 3, 16), causal=True).shape
    torch.Size([2, 4, 5, 16])
    """
    _check_keys(q, k, v)
    _check_prefix(prefix_k, prefix_v, k.shape[1], q.shape[3], v.shape[3])
    _check_mask(mask, causal, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _prefix_attention.joint(q, k, v, mask, prefix_k, prefix_v, causal, scale)


def prefix_gated(
    y: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    gate: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention's output plus what a prefix gives in a softmax of its own: y + tanh(gate) softmax(scale q
    prefix_k^T) prefix_v.

    Where the gate is 0 the result is y, bit for bit, and the gate's gradient is not 0: a start that changes
    nothing.

    Args:
        y: [B, H, S, Dv]; q: [B, H, S, D].
        prefix_k: [Hkv, P, D]; prefix_v: [Hkv, P, Dv]; gate: [H]; H a multiple of Hkv.
        scale: 1 / sqrt(D) by default.
    Returns: [B, H, S, Dv], in memory [B, S, H, Dv]. Saved for backward: q, the prefix and the gate.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: LLaMA-Adapter (Zhang et al., 2023), section 3.2, zero-initialized attention.

    >>> y, q = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)
    >>> torch.equal(prefix_gated(y, q, torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.zeros(4)), y)
    True
    """
    if y.dim() != 4 or q.dim() != 4 or y.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, expected [B, H, S, Dv] for q {tuple(q.shape)}, [B, H, S, D]"
        )
    if prefix_k.dim() != 3 or not prefix_k.shape[0] or q.shape[1] % prefix_k.shape[0]:
        raise ValueError(
            f"prefix_k: got shape {tuple(prefix_k.shape)}, expected [Hkv, P, D] with Hkv dividing q's"
            f" {q.shape[1]} heads"
        )
    _check_prefix(prefix_k, prefix_v, prefix_k.shape[0], q.shape[3], y.shape[3])
    if gate.shape != q.shape[1:2]:
        raise ValueError(
            f"gate: got shape {tuple(gate.shape)}, expected [{q.shape[1]}], one for each head of q"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _prefix_attention.gated(y, q, prefix_k, prefix_v, gate, scale)


def _check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _FLOATS or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}, expected one of float64, float32, bfloat16,"
            " float16 for all"
        )
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v: got {q.dim()}, {k.dim()} and {v.dim()} dimensions, expected 4: batch, heads, tokens,"
            " width"
        )
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        shapes = f"{tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(
            f"k, v: got shapes {shapes}, expected [B, Hkv, T, D] and [B, Hkv, T, Dv] for q {tuple(q.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads, expected a divisor of q's {q.shape[1]}")


def _check_prefix(prefix_k: Tensor, prefix_v: Tensor, heads: int, width: int, value_width: int) -> None:
    for name, value, last in (("prefix_k", prefix_k, width), ("prefix_v", prefix_v, value_width)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: got {value.dtype}, expected a floating dtype")
        if value.dim() != 3 or (value.shape[0], value.shape[2]) != (heads, last):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{heads}, P, {last}]")
    if prefix_k.shape[1] != prefix_v.shape[1] or not prefix_k.shape[1]:
        raise ValueError(
            f"prefix_v: got {prefix_v.shape[1]} virtual tokens, expected prefix_k's {prefix_k.shape[1]}, at"
            " least 1"
        )


def _check_mask(mask: Tensor | None, causal: bool, shape: tuple[int, int, int, int]) -> None:
    if causal and (mask is not None or shape[2] != shape[3]):
        raise ValueError(
            f"causal: needs as many keys as queries and no mask, got {shape[2]} queries and {shape[3]} keys;"
            " give a mask"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: got {mask.dtype}, expected bool (True is seen) or a floating dtype (added)")
    first, last = mask.shape[:2], mask.shape[2:]
    if (
        mask.dim() != 4
        or last != shape[2:]
        or any(got not in (1, want) for got, want in zip(first, shape[:2], strict=True))
    ):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected [1 or B, 1 or H, S, T] of {shape}")
