"""Which layers of a model move by dW = s B A, with their factors: what a penalty on dW can hold, and what it
cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...patching.detect import is_lora

__all__ = ["Factors", "lora_factors", "trained_elsewhere"]

# Initializations that leave the base's weights as they are: only then is "adapters off" the pretrained model.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
_NOT_ONE_MATRIX = ("ParamWrapper", "MultiheadAttention")


@dataclass(frozen=True)
class Factors:
    """One layer's update dW = scaling * b @ a, [N, K].

    module: the layer itself, called with x [..., K] and giving y [..., N]. a: [r, K]. b: [N, r].
    """

    module: nn.Module
    a: Tensor
    b: Tensor
    scaling: float


def lora_factors(model: nn.Module, *, adapter: str | None = None) -> dict[str, Factors]:
    """The factors of every LoRA layer by name, those of the active adapter unless one is named.

    Exact for LoRA and rsLoRA with any pattern of ranks and alphas, on dense, 8-bit and 4-bit linear layers
    and transformers' Conv1D.
    Raises ValueError for what is no s B A on the pretrained weight: DoRA and other variants, a LoRA bias,
    embeddings, convolutions, experts in one tensor, initializations that change the base (PiSSA, OLoRA,
    CorDA, LoftQ), merged or several active adapters.
    """
    _require_plain_start(model, adapter)
    found = {name: module for name, module in model.named_modules() if is_lora(module)}
    factors = {name: _factors(name, module, adapter) for name, module in found.items()}
    held = {name: value for name, value in factors.items() if value is not None}
    if not held:
        named = f"the adapter {adapter!r}" if adapter else "an active LoRA adapter"
        raise ValueError(f"model: no layer has {named}: add one with peft.get_peft_model first")
    return held


def trained_elsewhere(model: nn.Module, factors: Mapping[str, Factors]) -> list[str]:
    """Names of trainable parameters that are no factor of `factors`: what they change, no penalty on dW
    sees."""
    held = {id(tensor) for layer in factors.values() for tensor in (layer.a, layer.b)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]


def _factors(name: str, layer: Any, adapter: str | None) -> Factors | None:
    active = [
        one
        for one in layer.active_adapters
        if one in (*layer.lora_A, *getattr(layer, "lora_embedding_A", ()))
    ]
    if adapter is None and len(active) > 1:
        raise ValueError(
            f"{name}: several adapters are active ({', '.join(active)}): name one, or add them up first"
        )
    chosen = adapter or (active[0] if active else None)
    if chosen is None or chosen not in (*layer.lora_A, *getattr(layer, "lora_embedding_A", ())):
        return None
    reason = _unlike_one_product(layer, chosen)
    if reason:
        raise ValueError(
            f"{name}: {reason}, so its update is not s B A and the penalty would not be exact: leave it out"
            " of target_modules"
        )
    return Factors(
        layer, layer.lora_A[chosen].weight, layer.lora_B[chosen].weight, float(layer.scaling[chosen])
    )


def _unlike_one_product(layer: Any, adapter: str) -> str | None:
    """Why the layer's update is not one product of two matrices on a fixed weight; None where it is."""
    if adapter in getattr(layer, "lora_embedding_A", ()) or type(layer).__name__ in _NOT_ONE_MATRIX:
        return f"it is a LoRA layer of the kind {type(layer).__name__}"
    if not isinstance(layer.lora_A[adapter], nn.Linear) or layer.lora_A[adapter].weight.dim() != 2:
        return f"its factors are of the kind {type(layer.lora_A[adapter]).__name__}"
    if getattr(layer, "use_dora", {}).get(adapter, False):
        return "DoRA scales each row of the weight besides"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"its adapter is of the variant {type(variant).__name__}"
    if layer.lora_B[adapter].bias is not None:
        return "its adapter has a bias (lora_bias)"
    if getattr(layer, "merged", False):
        return "its adapter is merged into the base (unmerge it first)"
    return None


def _require_plain_start(model: nn.Module, adapter: str | None) -> None:
    configs = getattr(model, "peft_config", None)
    for name, config in (configs or {}).items():
        start = getattr(config, "init_lora_weights", True)
        if adapter in (None, name) and start not in _PLAIN_INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights={start!r} takes the adapter's start out of the base's weights, so that"
                " with adapters off the model is not the pretrained one: use True, 'gaussian' or 'eva'"
            )


def on(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of `like`."""
    return tensor if tensor.device == like.device else tensor.to(like.device)


def sampled_values(weight: Tensor, count: int) -> Tensor:
    """At most `count` entries of a tensor at equal distances, in a layout without padding."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu()
