"""Attention functions on CPUs in place of transformers': torch's SDPA in bf16 tiles of our own, and, where
torch multiplies 16-bit matrices in naive loops, attention in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from ..ops import attention as attention_op
from ..ops import autocast_off, transformed
from .weights import autocast_dtype

__all__ = ["STOCK", "in_fp32", "in_tiles"]


def in_tiles(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function`, whose calls of torch's SDPA are ours where our kernel serves them: never of a few queries,
    which are spared the look at every function that torch calls. args: the module, query, key, value."""
    few = len(args) > 1 and args[1].shape[-2] < attention_op.config.FEWEST_QUERIES
    if few or torch.compiler.is_compiling() or transformed():
        return function(*args, **kwargs)
    with _Tiles():
        return function(*args, **kwargs)


STOCK = F.scaled_dot_product_attention  # what others may put there calls it


class _Tiles(TorchFunctionMode):
    """Around transformers' SDPA function, so that what it makes of heads, masks and causality stays its
    own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is STOCK:
            return _sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's SDPA; ours where the native kernel serves what it would compute."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    operands = [query, key, value]
    if autocast_dtype(query) is not None:
        operands = [x.to(autocast_dtype(query)) if x.dtype == torch.float32 else x for x in operands]
    heads = query.dim() == 4 and (enable_gqa or query.shape[1] == key.shape[1])
    masked = attn_mask is None or (attn_mask.dim() == 4 and not is_causal)
    alike = len({x.dtype for x in operands}) == 1 and query.shape[:1] == key.shape[:1] == value.shape[:1]
    causal = is_causal and query.shape[-2] == key.shape[-2]
    if not (heads and masked and alike and dropout_p == 0.0 and causal == is_causal) or not (
        attention_op.config.native(*operands, attn_mask, factor)
    ):
        return STOCK(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return functional.scaled_dot_product_attention(*operands, mask=attn_mask, causal=is_causal, scale=factor)


def in_fp32(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    slow: tuple[torch.dtype, ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`function` on fp32 operands, its results rounded to what it would have returned."""
    result = autocast_dtype(query) or query.dtype
    if (
        result not in slow
        or not _pays(query, key, value)
        or kwargs.get("dropout")
        or kwargs.get("cache") is not None
    ):
        return function(module, query, key, value, attention_mask, **kwargs)
    operands = [_wide(each) for each in (query, key, value, attention_mask)]
    with autocast_off(query):
        output, weights = function(module, *operands, **{name: _wide(each) for name, each in kwargs.items()})
    return output.to(result), None if weights is None else weights.to(result)


def _pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """One token against a cache, without gradients, reads the keys once: casting them would take as long."""
    if not (
        query.device.type == key.device.type == value.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
    ):
        return False
    return query.shape[2] > 1 or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    )


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
