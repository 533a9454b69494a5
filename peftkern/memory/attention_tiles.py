"""Attention whose scores are in memory a tile at a time, forward and backward, in plain torch on any device.

For attention that no fused kernel of torch computes: a soft cap on the scores, say. Heads of a group of
key/value heads, and tiles of queries; a tile has the keys that its queries read. Backward computes a tile's
scores again from two numbers a row that forward kept, its greatest score and its sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import autocast_off
from ..patching.weights import autocast_dtype
from .attention_masks import CausalMask, DenseMask, TileMask
from .tiles import Tiling, fitted_tiling

__all__ = ["against_shapes", "capped_attention", "tiled"]


@dataclass(frozen=True)
class _Task:
    """What attention does beside its operands."""

    mask: TileMask
    scale: float
    softcap: float | None
    tiling: Tiling


class _ByTiles(torch.autograd.Function):
    """q [B, nH, S, d], k [B, nKV, S', d], v [B, nKV, S', e] -> [B, nH, S, e]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: _Task) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        rows = q.new_empty(2, *q.shape[:3], dtype=_wide(q))  # each row's greatest score, and its sum
        for at, of_q, of_k in _groups(q, k, task.tiling):
            for tile, keys in task.mask.spans(task.tiling.rows):
                where = at, of_q, tile
                mask = task.mask.tile(tile, keys)
                operands = q[where], k[at, of_k, keys], v[at, of_k, keys]
                places = [t[where] for t in (out, *rows[..., None])]
                _put(places, _tile_forward(*operands, mask, at, of_q, task))
        ctx.save_for_backward(q, k, v, rows)
        ctx.task = task
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        with autocast_off(d_out):
            grads = _backward(*ctx.saved_tensors, d_out, ctx.task)
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, d_out: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    for at, of_q, of_k in _groups(q, k, task.tiling):
        sums = [t[at, of_k].new_zeros(t[at, of_k].shape, dtype=_wide(q)) for t in (k, v)]
        for tile, keys in task.mask.spans(task.tiling.rows):
            where = at, of_q, tile
            operands = q[where], k[at, of_k, keys], v[at, of_k, keys], d_out[where]
            mask = task.mask.tile(tile, keys)
            places = dq[where], *(t[:, :, keys] for t in sums)
            _add(*places, *_tile_backward(operands, rows[:, at, of_q, tile], mask, at, of_q, task))
        dk[at, of_k], dv[at, of_k] = sums
    return dq, dk, dv


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: slice, of_q: slice, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [units, g * T, e] of a tile; its rows' greatest scores and sums, [units, g * T, 1]."""
    bent = _bent(_flat(q, k.shape[1]), _keys(k), task)
    scores = bent if task.softcap is None else bent.mul_(task.softcap)
    _add_mask(scores, mask, q.shape, at, of_q)
    greatest = scores.amax(-1, keepdim=True)
    sums = scores.sub_(greatest).exp_().sum(-1, keepdim=True)
    return torch.bmm(scores.div_(sums).to(v.dtype), _keys(v)), greatest, sums


def _tile_backward(
    operands: tuple[Tensor, ...], rows: Tensor, mask: Tensor | None, at: slice, of_q: slice, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [units, g * T, d] of a tile, and its share of dk and dv [units, keys, ...]."""
    heads = operands[1].shape[1]
    q, d_out = (_flat(operands[i], heads) for i in (0, 3))
    k, v = (_keys(operands[i]) for i in (1, 2))
    greatest, sums = (t.reshape(len(q), -1, 1) for t in rows)
    bent = _bent(q, k, task)
    p = bent if task.softcap is None else bent * task.softcap
    _add_mask(p, mask, operands[0].shape, at, of_q)
    p.sub_(greatest).exp_().div_(sums)
    dv = torch.bmm(p.to(d_out.dtype).mT, d_out)
    ds = torch.bmm(d_out, v.mT).to(p.dtype).mul_(p)
    ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
    del p
    if task.softcap is not None:
        ds.mul_(bent.square_().neg_().add_(1))
    del bent
    ds = ds.mul_(task.scale).to(q.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), dv


def _put(places: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """A tile's results; whoever called has none of them left when the next tile begins."""
    for place, result in zip(places, results, strict=True):
        place.copy_(result.view(place.shape))


def _add(dq: Tensor, dk_sum: Tensor, dv_sum: Tensor, *results: Tensor) -> None:
    _put([dq], results[:1])
    for place, result in zip((dk_sum, dv_sum), results[1:], strict=True):
        place.add_(result.view(place.shape))


def _groups(q: Tensor, k: Tensor, tiling: Tiling) -> Iterator[tuple[slice, slice, slice]]:
    """Samples, query heads and key/value heads that are computed together."""
    sharing = q.shape[1] // k.shape[1]
    for sample in range(0, q.shape[0], tiling.samples):
        for head in range(0, k.shape[1], tiling.heads):
            of_q = slice(head * sharing, (head + tiling.heads) * sharing)
            yield slice(sample, sample + tiling.samples), of_q, slice(head, head + tiling.heads)


def _flat(t: Tensor, heads: int) -> Tensor:
    """[b, heads * g, T, d] -> [b * heads, g * T, d]."""
    return t.reshape(t.shape[0] * heads, -1, t.shape[-1])


def _keys(t: Tensor) -> Tensor:
    """[b, heads, keys, d] -> [b * heads, keys, d]."""
    return t.reshape(-1, *t.shape[2:])


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _bent(q: Tensor, k: Tensor, task: _Task) -> Tensor:
    """[units, g * T, keys], at least in fp32: scores over the cap behind tanh; the scores where none is."""
    scores = torch.bmm(q, k.mT).to(_wide(q))
    return scores.mul_(task.scale) if task.softcap is None else scores.mul_(task.scale / task.softcap).tanh_()


def _add_mask(scores: Tensor, mask: Tensor | None, shape: torch.Size, at: slice, of_q: slice) -> None:
    """shape: [b, heads, T, d] of the queries."""
    if mask is None:
        return
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[at if mask.shape[0] > 1 else slice(None), of_q if mask.shape[1] > 1 else slice(None)]
    scores.view(*shape[:3], -1).add_(mask)


# ---- the functions


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    groups: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """`capped_attention` under any mask that gives its tiles; the operands have been looked at."""
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    sizes = q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    tiling, _ = fitted_tiling(lambda rows: _most_keys(mask, rows), *sizes, groups=groups)
    if rows is not None:
        tiling = replace(tiling, rows=rows)
    task = _Task(mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap, tiling)
    with autocast_off(q):
        return _ByTiles.apply(q, k, v, task)


def _most_keys(mask: TileMask, rows: int) -> int:
    """The keys that a tile of so many queries reads at the most."""
    return max(keys.stop - keys.start for _, keys in mask.spans(rows))


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    groups: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Attention with a soft cap on its scores, of which a tile is in memory at a time.

    s = scale * q k^T, c = softcap * tanh(s / softcap), out = softmax(c + mask) v, each key/value head serving
    nH / nKV query heads. The softmax is in fp32, of products in the operands' dtype; memory grows with S, not
    with S * S'. Plain torch, on any device, for what torch has no fused kernel for.

    Args:
        q: [B, nH, S, d]. k: [B, nKV, S', d]. v: [B, nKV, S', e]; of one dtype and device; nKV divides nH.
        mask: added to the capped scores, [B or 1, nH or 1, S, S']; it has no gradient.
        softcap: None for no cap. is_causal: row i reads the keys up to i. window: and of these the last
            `window`; other keys are not read. scale: None for 1 / sqrt(d).
        groups: how many groups the key/value heads make; divides nKV. rows: queries of a tile. None: by a
            budget of 64 MiB.
    Returns: [B, nH, S, e]. Saved for backward: q, k, v and two numbers a row.
    Raises: ValueError for operands that do not go together.
    Source: FlashAttention-2 (Dao, 2023), section 3, whose tiles these are; the soft cap is Gemma 2's (2024).

    >>> q, k = torch.randn(1, 4, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16)
    >>> capped_attention(q, k, k, softcap=50.0, is_causal=True).shape
    torch.Size([1, 4, 8, 16])
    """
    _check(q, k, v, mask, softcap, is_causal, window, groups, rows)
    if mask is None:
        form = CausalMask(q.shape[2], k.shape[2], is_causal, window, q.device)
    else:
        form = DenseMask(mask)
    return tiled(q, k, v, form, softcap=softcap, scale=scale, groups=groups, rows=rows)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    is_causal: bool,
    window: int | None,
    groups: int | None,
    rows: int | None,
) -> None:
    reason = against_shapes(q, k, v)
    if reason is not None:
        raise ValueError(f"capped_attention: {reason}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: got {softcap}, expected a positive number, or None for no cap")
    if window is not None and (window < 1 or not is_causal or q.shape[2] > k.shape[2]):
        raise ValueError(
            f"window: got {window}, expected at least 1, with is_causal and no more queries than keys"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    if groups is not None and (groups < 1 or k.shape[1] % groups):
        raise ValueError(f"groups: got {groups}, expected a divisor of the {k.shape[1]} key/value heads")
    if mask is None:
        return
    if is_causal or mask.requires_grad or not mask.is_floating_point():
        raise ValueError("mask: expected a floating-point tensor without gradient, and no is_causal with it")
    whole = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    fits = mask.dim() == 4 and mask.shape[2:] == whole[2:]
    if not fits or any(have not in (1, want) for have, want in zip(mask.shape, whole, strict=True)):
        raise ValueError(f"mask: got {tuple(mask.shape)}, expected {whole}, of which the first two may be 1")


def against_shapes(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these are no operands of attention; None where they are."""
    fits = (
        q.dim() == k.dim() == v.dim() == 4
        and q.numel()
        and k.numel()
        and q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
        and (q.shape[0], q.shape[-1]) == (k.shape[0], k.shape[-1])
        and q.dtype == k.dtype == v.dtype
    )
    if fits:
        return None
    shapes = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (q, k, v))
    return f"its operands are {shapes}, expected [B, heads, S, d] of one dtype"
