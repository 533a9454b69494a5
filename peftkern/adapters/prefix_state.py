"""A prefix inside attention while the model runs: what stands around each layer's attention function, and
where the tokens' positions begin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..patching.weights import autocast_dtype
from .prefix_layers import Layer, Survey

__all__ = ["AroundLayer", "PrefixState", "ShiftedPositions", "gate_of", "layer_prefix"]


class PrefixState:
    """What the layers of one PEFT model look up at each call; copied with it.

    surveyed: what of the model can hold a prefix. enabled: False within `disable_adapter`. serving: for each
    adapter that is a prefix, the indices of the layers that get it.
    """

    def __init__(self, model: nn.Module, surveyed: Survey) -> None:
        self.model, self.surveyed, self.enabled = model, surveyed, True
        self.serving: dict[str, frozenset[int]] = {}

    def active(self) -> str | None:
        """The name of the active prefix; None where none is to be seen."""
        name = self.model.active_adapter
        return name if self.enabled and name in self.serving else None

    def shift(self) -> int:
        """By how much the tokens' positions follow the prefix: its length, as in PEFT; 0 in an encoder, and
        for a gated one, beside which the tokens keep the positions they have without it."""
        name = self.active()
        if (
            name is None
            or self.surveyed.positions is None
            or gate_of(self.model.prompt_encoder[name]) is not None
        ):
            return 0
        return self.model.peft_config[name].num_virtual_tokens


def gate_of(encoder: nn.Module) -> nn.Parameter | None:
    """The gate of a prefix [num_layers, H]; None where it has none."""
    return encoder._parameters.get("gate")


def layer_prefix(encoder: nn.Module, config: Any, layer: Layer) -> tuple[Tensor, Tensor]:
    """Keys [Hkv, P, D] and values [Hkv, P, Dv] of a layer, in the parameters' dtype: views of PEFT's
    embedding; with a projection that is still being trained, computed for this layer alone, so that any way
    of checkpointing can compute it again."""
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    transform = getattr(encoder, "transform", None)
    if transform is None:
        both = encoder.embedding.weight.view(-1, config.num_layers, 2, heads, width)[:, layer.source]
    else:
        first, activation, last = transform
        rows = slice(2 * layer.source * config.token_dim, 2 * (layer.source + 1) * config.token_dim)
        hidden = activation(first(encoder.embedding.weight))
        both = F.linear(hidden, last.weight[rows], last.bias[rows]).view(-1, 2, heads, width)
    k, v = both.permute(1, 2, 0, 3)
    return k[: layer.heads, :, : layer.width], v[: layer.heads, :, : layer.value_width]


class AroundLayer:
    """Stands around the attention function of one layer."""

    def __init__(self, state: PrefixState, layer: Layer) -> None:
        self.state, self.layer = state, layer

    def __call__(
        self,
        function: Callable[..., tuple[Tensor, Tensor | None]],
        kind: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        name = self.state.active()
        if name is None or self.layer.index not in self.state.serving[name]:
            return function(module, query, key, value, attention_mask, **kwargs)
        encoder, config = self.state.model.prompt_encoder[name], self.state.model.peft_config[name]
        prefix_k, prefix_v = (part.to(query.device) for part in layer_prefix(encoder, config, self.layer))
        gate = gate_of(encoder)
        if gate is not None:
            y, weights = function(module, query, key, value, attention_mask, **kwargs)
            scale = kwargs.get("scaling")
            y = functional.prefix_gated(
                y.transpose(1, 2),
                query,
                prefix_k,
                prefix_v,
                gate[self.layer.index].to(query.device),
                scale=scale,
            )
            return y.transpose(1, 2), weights
        if (
            kind == "sdpa"
            and not any(kwargs.get(option) for option in ("dropout", "softcap"))
            and kwargs.get("position_bias") is None
        ):
            return _joint(module, query, key, value, attention_mask, prefix_k, prefix_v, **kwargs), None
        return _concatenated(
            function,
            kind,
            module,
            query,
            key,
            value,
            attention_mask,
            prefix_k,
            prefix_v,
            **kwargs,
        )


def _joint(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> Tensor:
    """What transformers' SDPA function computes, [B, S, H, Dv], with the prefix beside the keys."""
    result = autocast_dtype(query) or query.dtype
    query, key, value = (each.to(result) for each in (query, key, value))
    causal = mask is None and query.shape[2] > 1 and _is_causal(module, is_causal)
    if (
        causal and key.shape[2] > query.shape[2]
    ):  # an empty static cache, of which only the first tokens are written
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    y = functional.prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        mask=mask,
        causal=causal,
        scale=scaling,
    )
    return y.transpose(1, 2)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    return getattr(module, "is_causal", True) if given is None else given


def _concatenated(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    prefix_k: Tensor,
    prefix_v: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function itself on the prefix followed by the keys: for what no split of the softmax can
    give (attention weights, dropout, a model's own function with capped scores or sinks)."""
    if (
        kind == "other"
        or not (mask is None or isinstance(mask, Tensor) and mask.dim() == 4)
        or kwargs.get("position_bias") is not None
    ):
        raise ValueError(
            f"{type(module).__name__}: a prefix without a gate needs the attention implementation 'sdpa' or"
            f" 'eager' and no position bias, got {getattr(module.config, '_attn_implementation', None)!r};"
            " call model.set_attn_implementation('sdpa'), or start with init='gate'"
        )
    if mask is None and kind == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs.get("is_causal")):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[
            None, None
        ]
    key = torch.cat([_ToBatch.apply(prefix_k, len(key), key.dtype), key], dim=2)
    value = torch.cat([_ToBatch.apply(prefix_v, len(value), value.dtype), value], dim=2)
    if mask is not None:
        mask = F.pad(mask, (prefix_k.shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
    return function(module, query, key, value, mask, **kwargs)


class _ToBatch(torch.autograd.Function):
    """A prefix for each sample of a batch, in its dtype; the gradients are summed over the batch in the
    prefix's own.
    """

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        ctx.dtype = prefix.dtype
        return prefix.to(dtype).expand(batch, -1, -1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.sum(0, dtype=ctx.dtype), None, None


class ShiftedPositions:
    """A forward pre-hook of the module that makes positions: the tokens' positions follow the prefix."""

    def __init__(self, state: PrefixState, backbone: nn.Module) -> None:
        self.state, self.backbone = state, backbone
        self.names = list(inspect.signature(backbone.forward).parameters)

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module is not self.backbone:
            raise RuntimeError(
                "a prefix inside attention does not work in replicas (nn.DataParallel): use"
                " DistributedDataParallel"
            )
        shift = self.state.shift()
        if not shift:
            return None
        given = dict(zip(self.names, args, strict=False)) | kwargs
        positions = given.get("position_ids")
        if positions is None:
            positions = _counted(given) if self.state.surveyed.positions == "mask" else _positions(given)
        return (), given | {"position_ids": positions + shift}


def _counted(given: dict[str, Any]) -> Tensor:
    """As a decoder counts them that looks at its attention mask."""
    mask = given.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return _positions(given)
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]


def _positions(given: dict[str, Any]) -> Tensor:
    """As a decoder counts them itself: from the number of tokens in its cache."""
    if given.get("cache_position") is not None:
        return given["cache_position"][None]
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    cache = given.get("cache")
    cache = given.get("past_key_values") if cache is None else cache
    seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + seen
