"""What a prefix's configuration says, against the keys that a model's attention has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .prefix_layers import Layer, Survey

if TYPE_CHECKING:
    from peft import PeftModel, PrefixTuningConfig

__all__ = ["add_gate", "fill", "fit", "is_prefix", "set_zero", "unfit"]


def is_prefix(config: Any) -> bool:
    return getattr(config.peft_type, "value", config.peft_type) == "PREFIX_TUNING"


def fill(config: PrefixTuningConfig, surveyed: Survey) -> tuple[int, int]:
    """Fill in what the configuration leaves open, of the widest keys there are; returns its heads and
    token_dim. PEFT then derives them anew from the model's configuration."""
    if config.num_layers is None:
        config.num_layers = 1 + max(layer.index for layer in surveyed.layers)
    widest = max(surveyed.layers, key=lambda layer: layer.heads * max(layer.width, layer.value_width))
    if config.token_dim is None and config.num_attention_heads is None:
        config.num_attention_heads = widest.heads
        config.token_dim = widest.heads * max(widest.width, widest.value_width)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 1
    return config.num_attention_heads, config.token_dim


@torch.no_grad()
def set_zero(encoder: nn.Module) -> None:
    """As PEFT's init_weights="zero", which PEFT 0.18 does not have."""
    transform = getattr(encoder, "transform", None)
    for parameter in encoder.embedding.parameters() if transform is None else transform[-1].parameters():
        parameter.zero_()


def add_gate(encoder: nn.Module, config: PrefixTuningConfig, surveyed: Survey) -> None:
    heads = max(layer.query_heads for layer in surveyed.layers)
    if len({layer.query_heads for layer in surveyed.layers}) > 1:
        raise ValueError("init='gate': the layers have different numbers of heads: use init='text'")
    weight = encoder.embedding.weight
    encoder.gate = nn.Parameter(torch.zeros(config.num_layers, heads, device=weight.device))


def fit(model: PeftModel, name: str, surveyed: Survey, wanted: tuple[int, int]) -> None:
    """Where PEFT has taken from the model's configuration a width that leaves layers out (of latent attention
    it knows a part; some versions do not know that layers differ): the encoder anew, of the heads and
    token_dim that are wanted."""
    config = model.peft_config[name]
    if (config.num_attention_heads, config.token_dim) == wanted or not any(
        unfit(layer, config) for layer in surveyed.layers
    ):
        return
    config.num_attention_heads, config.token_dim = wanted
    model._setup_prompt_encoder(name)


def unfit(layer: Layer, config: PrefixTuningConfig) -> str | None:
    """Why a prefix has nothing for a layer's keys."""
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    widest = max(layer.width, layer.value_width)
    if layer.source >= config.num_layers:
        return f"it is layer {layer.source}, and the prefix has {config.num_layers}"
    if layer.heads > heads or widest > width:
        return f"its keys have {layer.heads} heads of {widest}, the prefix {heads} of {width}"
    return None
