"""Attention's backward pass a group of key/value heads at a time: the numbers of the whole, less workspace.

A FlashAttention backward keeps, beside the gradients, an fp32 sum of dq and (with fewer key/value heads than
queries') dk and dv of every query head: 4 of the 8 parts of the queries' size that a decoder layer has at its
peak. Group by group it keeps them for one group. Forward runs whole, and the same tensors are saved."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from ..patching.attention import around_of, release, surround, surroundable
from ..patching.masks import masked, release_masks, surround_masks
from ..patching.rewrite import excluded, patterns_of
from ..patching.weights import autocast_dtype
from .attention_eager import against_tiles, by_tiles
from .attention_masks import LazyMask

__all__ = ["AttentionReport", "GroupedAttention", "attention_by_groups", "attention_whole", "grouped_sdpa"]

_FLASH = int(SDPBackend.FLASH_ATTENTION)
_NAMES = {int(backend): backend.name.lower() for backend in SDPBackend.__members__.values()}


# ---- the function


class _ByGroups(torch.autograd.Function):
    """q [B, nH, S, d], k, v [B, nKV, S', d] -> [B, nH, S, d], by torch's flash attention."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, groups):
        kernel = _OnCPU if q.is_cpu else _OnDevice
        out, state = kernel.forward(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, *(s for s in state if isinstance(s, Tensor)))
        ctx.rest = [None if isinstance(s, Tensor) else (s,) for s in state]
        ctx.options = kernel, causal, scale, groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        kernel, causal, scale, groups = ctx.options
        q, k, v, out, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        state = [next(saved) if rest is None else rest[0] for rest in ctx.rest]
        heads, (dq, dk, dv) = k.shape[1] // groups, map(torch.empty_like, (q, k, v))
        for g in range(groups):
            of_q = slice(g * heads * (q.shape[1] // k.shape[1]), (g + 1) * heads * (q.shape[1] // k.shape[1]))
            of_k = slice(g * heads, (g + 1) * heads)
            operands = d_out[:, of_q], q[:, of_q], k[:, of_k], v[:, of_k], out[:, of_q]
            found = kernel.backward(*operands, state, of_q, causal, scale)
            for whole, part, where in zip((dq, dk, dv), found, (of_q, of_k, of_k), strict=True):
                whole[:, where] = part
        grads = zip((dq, dk, dv), ctx.needs_input_grad, strict=False)
        return (*(grad if need else None for grad, need in grads), None, None, None)


class _OnCPU:
    """torch's kernel for the CPU, whose threads each take heads of their own."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, list[Any]]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return out, [lse]

    @staticmethod
    def backward(
        d_out, q, k, v, out, state, heads: slice, causal: bool, scale: float | None
    ) -> tuple[Tensor, ...]:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(d_out, q, k, v, out, state[0][:, heads], 0.0, causal, scale=scale)


class _OnDevice:
    """torch's FlashAttention. Not run on a GPU yet: its operators' arguments are those of torch's own
    derivative."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, list[Any]]:
        forward = torch.ops.aten._scaled_dot_product_flash_attention
        out, *state, _ = forward(q, k, v, 0.0, causal, False, scale=scale)
        return out, state

    @staticmethod
    def backward(
        d_out, q, k, v, out, state, heads: slice, causal: bool, scale: float | None
    ) -> tuple[Tensor, ...]:
        lse, cum_q, cum_k, max_q, max_k, seed, offset = state
        lse = lse[:, heads].contiguous()  # which the kernel reads as [B, heads, S] without asking for strides
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        sizes = cum_q, cum_k, max_q, max_k
        return backward(d_out, q, k, v, out, lse, *sizes, 0.0, causal, seed, offset, scale=scale)


def grouped_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, groups: int, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention whose backward runs a group of key/value heads at a time.

    softmax(q k^T * scale) v, each key/value head serving nH / nKV query heads. The gradients are those of the
    whole: a head's do not depend on another's. Autocast casts the operands as torch's function does.

    Args:
        q: [B, nH, S, d]. k, v: [B, nKV, S', d], of q's dtype and device; nKV divides nH.
        groups: how many groups the key/value heads make, one after the other; divides nKV.
        is_causal: as torch's. scale: None for 1 / sqrt(d).
    Returns: [B, nH, S, d]. Saved for backward: q, k, v, the output and its log-sum-exp, as by torch's
    function.
    Raises: ValueError where torch would not run flash attention on these tensors, or `groups` does not divide
    nKV.
    Source: FlashAttention-2 (Dao, 2023), section 3.1, whose backward loops over heads independently.

    >>> q, k = torch.randn(1, 4, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16)
    >>> grouped_sdpa(q, k, k, groups=2, is_causal=True).shape
    torch.Size([1, 4, 8, 16])
    """
    reason = _against(q, k, v, None, 0.0, is_causal, scale, groups)
    if reason is not None:
        raise ValueError(f"grouped_sdpa: {reason}")
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    return _ByGroups.apply(q, k, v, is_causal, scale, groups)


def _against(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    groups: int | None,
) -> str | None:
    """Why attention on these operands has to run whole; None where it need not."""
    if mask is not None:
        return (
            "a mask is given, which flash attention takes none of (padding, packed samples, a sliding window)"
        )
    if dropout:
        return "attention has dropout, whose mask is drawn for all heads at once"
    if (
        not q.dim() == k.dim() == v.dim() == 4
        or not q.numel()
        or q.shape[1] % k.shape[1]
        or k.shape[1] != v.shape[1]
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        return f"its operands are {shapes}, expected [B, heads, S, d]"
    if groups is not None and k.shape[1] % groups:
        return f"{groups} groups do not divide its {k.shape[1]} key/value heads"
    if not q.is_cpu and (q.shape[-1] % 8 or v.shape[-1] != q.shape[-1]):
        return (
            f"its heads of {q.shape[-1]} and {v.shape[-1]} are padded by torch, expected equal multiples of 8"
        )
    dtype = autocast_dtype(q) or q.dtype
    own = [t.to(dtype) if t.dtype != dtype else t for t in (q, k, v)]
    gqa = q.shape[1] != k.shape[1]
    chosen = torch._fused_sdp_choice(*own, None, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    return None if chosen == _FLASH else f"torch runs its {_NAMES.get(chosen, chosen)} attention here"


# ---- in models


class _InGroups(TorchFunctionMode):
    """Runs scaled_dot_product_attention in groups, wherever in the code inside it is called."""

    def __init__(self, groups: int | None, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self.groups, self.refuse = groups, refuse

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._sdpa(*args, **kwargs)

    def _sdpa(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        groups = key.shape[1] if self.groups is None else self.groups
        tensors = (query, key, value)
        reason = None
        if groups > 1 and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            reason = _against(*tensors, attn_mask, dropout_p, is_causal, scale, groups)
            if reason is None:
                return grouped_sdpa(*tensors, groups=groups, is_causal=is_causal, scale=scale)
            self.refuse(reason)
        options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return F.scaled_dot_product_attention(*tensors, **options, enable_gqa=enable_gqa)


class GroupedAttention:
    """Stands around an attention module's function. before: what stood there. whole: why calls ran whole,
    counted."""

    def __init__(self, groups: int | None, before: Callable[..., Any] | None, whole: Counter[str]) -> None:
        self.groups, self.before, self.whole = groups, before, whole

    def __call__(
        self, function: Callable[..., Any], kind: str, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        if kind == "eager" and not torch.compiler.is_compiling():
            function = functools.partial(self._eager, function)
        inner = function if self.before is None else functools.partial(self.before, function, kind)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or kind == "eager":
            return inner(module, *args, **kwargs)
        with _InGroups(self.groups, self._refuse):
            return inner(module, *args, **kwargs)

    def _eager(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """By tiles, with gradients or without; whole where that would give something else, or for a row."""
        if query.shape[2] > 1:
            tensors = query, key, value
            reason = against_tiles(function, module, tensors, attention_mask, options, self.groups)
            if reason is None:
                return by_tiles(*tensors, attention_mask, options, self.groups)
            self._refuse(reason)
        if isinstance(attention_mask, LazyMask):
            attention_mask = attention_mask.whole()
        return function(module, query, key, value, attention_mask, **options)

    def _refuse(self, reason: str) -> None:
        if not self.whole[reason]:
            warnings.warn(f"peftkern: attention's backward runs whole: {reason}", stacklevel=3)
        self.whole[reason] += 1


@dataclass(frozen=True)
class AttentionReport:
    """What `attention_by_groups` did.

    grouped  names of the attention modules whose backward runs by groups
    tiled    those of them whose attention is the eager one, which runs by tiles of queries, forward too
    masks    names of the modules that build the masks of these, by tiles as well
    refused  the other attention modules, each with the reason
    whole    filled while the model runs: why calls ran whole, with how many did
    """

    grouped: tuple[str, ...]
    refused: dict[str, str]
    tiled: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    whole: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        count = len(self.grouped) + len(self.refused)
        served = f"{len(self.grouped)} of {count} attention modules"
        text = f"peftkern: {served} run backward by groups of key/value heads"
        if self.tiled:
            masks = "and their masks, " if self.masks else "their masks whole, "
            text += f"; {len(self.tiled)} of them, {masks}by tiles of queries, forward too"
        reasons = Counter(self.refused.values())
        text += "".join(f"; {n} whole: {reason}" for reason, n in reasons.items())
        return text + "".join(f"; {n} calls whole: {reason}" for reason, n in self.whole.items())


def attention_by_groups(
    model: nn.Module, *, groups: int | None = None, exclude: Iterable[str] = ()
) -> AttentionReport:
    """Let the backward pass of a model's attention run a group of key/value heads at a time.

    Same numbers, less workspace on a GPU (not measured): at 32 query and 8 key/value heads the peak of a
    decoder layer's attention backward falls from 8 to 4.5 parts of the queries' size. Where torch would not
    run its flash attention (a mask, dropout in attention, another backend) a call runs whole; the report
    counts why, and the first call of a kind warns.

    Works on modules that ask transformers for their attention function, per instance, beneath whatever
    `patch` does; put prefixes on the model before it.

    Args:
        groups: how many groups; divides the number of key/value heads. None: a key/value head at a time.
        exclude: module names, or whole dotted parts of them, to leave as they are.
    Returns: AttentionReport.
    Raises: ValueError where no attention module can be served, or `groups` is not positive.
    """
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"groups: got {groups!r}, expected a number of groups, 1 or more")
    patterns, found, refused, whole = patterns_of(model, exclude), [], {}, Counter()
    for name, module in model.named_modules():
        reason = surroundable(module)
        if reason is None and (reason := excluded(name, patterns)) is None:
            found.append((name, module))
        elif not _asks_nothing(reason):
            refused[name] = reason
    if not found:
        raise ValueError(_nothing(model, refused))
    for _, module in found:
        held = around_of(module)
        before = held.before if isinstance(held, GroupedAttention) else held
        surround(module, GroupedAttention(groups, before, whole))
    tiled = tuple(name for name, module in found if _is_eager(module))
    masks = _masks_by_tiles(model) if tiled else ()
    return AttentionReport(tuple(name for name, _ in found), refused, tiled, masks, whole)


def _is_eager(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"


def _masks_by_tiles(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose masks are built by tiles from now on."""
    builders = [(name, module) for name, module in model.named_modules() if masked(module)]
    return tuple(name for name, module in builders if surround_masks(module, LazyMask))


def attention_whole(model: nn.Module) -> int:
    """Undo `attention_by_groups`; returns how many modules it served."""
    count = 0
    for module in model.modules():
        release_masks(module)
        held = around_of(module)
        if isinstance(held, GroupedAttention):
            count += 1
            if held.before is None:
                release(module)
            else:
                surround(module, held.before)
    return count


def _asks_nothing(reason: str) -> bool:
    return reason.startswith("its forward does not ask")


def _nothing(model: nn.Module, refused: dict[str, str]) -> str:
    listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(refused.values()).items())
    return f"model: {type(model).__name__}: no attention module can run by groups: {listed or 'it has none'}"
