"""Attention to the keys that a sequence has itself, with the logarithm of its softmax's denominator, and its
gradients for a denominator
and an output that hold more than these keys: torch's fused kernels where they serve, else plain products.

A fused backward computes exp(score - lse) and the sum of dy y by what it is given. With the lse and the
output of all keys it therefore gives the exact gradients of those that it knows (as in ring attention: Liu et
al., 2023).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import accumulation

__all__ = ["backward", "forward"]

_log = logging.getLogger(__name__)
_aten = torch.ops.aten

# q, k, v, additive mask, causal, scale -> y, lse; dy, q, k, v, mask, y, lse, causal, scale -> dq, dk, dv
_Forward = Callable[..., tuple[Tensor, Tensor]]
_Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B, H, S, Dv] and lse [B, H, S], this in the accumulation dtype."""
    y, lse = _kernels(q, k, v, mask)[0](q, k, v, _additive(mask, q), causal, scale)
    return y, lse[..., : q.shape[2]]  # a kernel may pad the queries


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    others: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv for the output y and the lse [B, H, S] over these keys and any others, and what is taken off
    each gradient of a weight: the sum of dy y, [B, H, S] in the accumulation dtype.

    others: that sum's part of the other keys, their weights times the weights' gradients. The fused kernels
    take it with y, which is rounded; plain products take the sum of both parts.
    """
    run = _kernels(q, k, v, mask)[1]
    arguments = (dy, q, k, v, _additive(mask, q), y, lse, causal, scale)
    if run is _plain_backward:
        return _plain_backward(*arguments, others)
    return *run(*arguments), (dy.to(lse.dtype) * y).sum(-1)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Finite, in q's dtype: of a row with nothing but -inf the CPU's kernel gives 0 for the lse (torch
    2.13)."""
    if mask is None:
        return None
    least = torch.finfo(q.dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, least)
    return mask.to(q.dtype).clamp(min=least)


def _kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[_Forward, _Backward]:
    alike = (
        q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1] and bool(q.numel()) and bool(k.numel())
    )
    if not alike or any(each.stride(-1) != 1 for each in (q, k, v)):
        return _plain, _plain_backward
    if q.is_cpu:
        return _cpu, _cpu_backward
    if q.is_cuda:
        for name, serves in (("flash", _flash_serves), ("efficient", _efficient_serves)):
            if serves(q, mask) and _trusted(
                name,
                q.device,
                q.dtype,
                mask is not None,
                q.shape[1] == k.shape[1],
            ):
                return _CUDA[name]
    return _plain, _plain_backward


# ---- the CPU's kernel, which takes fewer heads of keys than of queries


def _cpu(q, k, v, mask, causal, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        q,
        k,
        v,
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )


def _cpu_backward(dy, q, k, v, mask, y, lse, causal, scale):
    run = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # as the forward lays it out
    return run(dy, q, k, v, y, lse, 0.0, causal, attn_mask=mask, scale=scale)


# ---- CUDA's kernels


def _flash_serves(q: Tensor, mask: Tensor | None) -> bool:
    capable = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return (
        mask is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and capable
    )


def _flash(q, k, v, mask, causal, scale):
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(dy, q, k, v, mask, y, lse, causal, scale):
    random_state = (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.zeros((), dtype=torch.uint64, device=q.device),
    )
    lengths = (None, None, q.shape[2], k.shape[2])
    run = _aten._scaled_dot_product_flash_attention_backward
    return run(dy, q, k, v, y, lse, *lengths, 0.0, causal, *random_state, scale=scale)


def _efficient_serves(q: Tensor, mask: Tensor | None) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] % 8 == 0


def _efficient(q, k, v, mask, causal, scale):
    k, v = _repeated(q, k, v)
    return _aten._scaled_dot_product_efficient_attention(
        q,
        k,
        v,
        _aligned(mask, q, k),
        True,
        0.0,
        causal,
        scale=scale,
    )[:2]


def _efficient_backward(dy, q, k, v, mask, y, lse, causal, scale):
    wide_k, wide_v = _repeated(q, k, v)
    random_state = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()
    run = _aten._scaled_dot_product_efficient_attention_backward
    needs = [True, True, True, False]
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)  # as the forward pads it
    dq, dk, dv, _ = run(
        dy,
        q,
        wide_k,
        wide_v,
        _aligned(mask, q, k),
        y,
        lse,
        *random_state,
        0.0,
        needs,
        causal,
        scale=scale,
    )
    return dq, _summed(dk, k), _summed(dv, v)


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """[B, H, S, T] with rows that begin at multiples of 16 elements, as the kernel reads them."""
    if mask is None:
        return None
    length = k.shape[2]
    padded = F.pad(mask, (0, -length % 16))[..., :length]
    return padded.expand(q.shape[0], q.shape[1], q.shape[2], length)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _summed(wide: Tensor, narrow: Tensor) -> Tensor:
    """A gradient of repeated heads, summed over the repetitions."""
    if wide.shape == narrow.shape:
        return wide
    b, heads, t, d = narrow.shape
    return wide.view(b, heads, -1, t, d).sum(2, dtype=accumulation(wide)).to(wide.dtype)


_CUDA: dict[str, tuple[_Forward, _Backward]] = {
    "flash": (_flash, _flash_backward),
    "efficient": (_efficient, _efficient_backward),
}


@functools.cache
def _trusted(name: str, device: torch.device, dtype: torch.dtype, masked: bool, same_heads: bool) -> bool:
    """Whether a CUDA kernel, called as here, gives what plain products give on a small problem; asked once a
    process.

    Not measured on a GPU by us: a kernel that is not there or wants other arguments is passed over.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    heads = 4 if same_heads else 2
    q, dy = (draw(2, 4, 40, 64).to(dtype) for _ in range(2))
    k, v = (draw(2, heads, 40, 64).to(dtype) for _ in range(2))
    mask = draw(2, 1, 40, 40).to(dtype) if masked else None
    try:
        y, lse = _CUDA[name][0](q, k, v, mask, not masked, 0.1)
        lse = lse[..., :40]
        theirs = (y, lse, *_CUDA[name][1](dy, q, k, v, mask, y, lse, not masked, 0.1))
        y, lse = _plain(q, k, v, mask, not masked, 0.1)
        none = torch.zeros_like(lse)
        ours = (y, lse, *_plain_backward(dy, q, k, v, mask, y, lse, not masked, 0.1, none)[:3])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        _log.debug("%s attention on %s is not used: %s", name, device, error)
        return False
    near = 3e-2 if dtype != torch.float32 else 1e-3
    return all(
        (a.float() - b.float()).norm() <= near * b.float().norm() for a, b in zip(theirs, ours, strict=True)
    )


# ---- plain products


def _plain(q, k, v, mask, causal, scale):
    grouped, wide_v = _grouped(q, k), v.to(accumulation(v))[:, :, None]
    scores = _scores(grouped, k, mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    y = (scores - lse[..., None]).exp_() @ wide_v
    return y.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _plain_backward(dy, q, k, v, mask, y, lse, causal, scale, others):
    grouped, grads = _grouped(q, k), _grouped(dy, k)
    wide_k, wide_v = k.to(grouped.dtype)[:, :, None], v.to(grouped.dtype)[:, :, None]
    weights = (
        _scores(grouped, k, mask, causal, scale) - lse.unflatten(1, grouped.shape[1:3])[..., None]
    ).exp_()
    dv = (weights.transpose(-1, -2) @ grads).sum(2)
    d_weights = grads @ wide_v.transpose(-1, -2)
    delta = (weights * d_weights).sum(-1) + others.unflatten(1, grouped.shape[1:3])
    d_scores = weights * (d_weights - delta[..., None]) * scale
    dq, dk = (d_scores @ wide_k).flatten(1, 2), (d_scores.transpose(-1, -2) @ grouped).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), delta.flatten(1, 2)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, S, D] as [B, Hkv, H / Hkv, S, D] in the accumulation dtype."""
    return x.to(accumulation(x)).unflatten(1, (k.shape[1], -1))


def _scores(grouped: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = grouped @ k.to(grouped.dtype)[:, :, None].transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=k.device).tril(),
            -math.inf,
        )
    if mask is None:
        return scores
    mask = mask.to(scores.dtype)
    return scores + (mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, grouped.shape[1:3]))
