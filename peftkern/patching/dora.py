"""PEFT's DoRA layers on the fused path: where one DoRA adapter is active, alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .hooks import direct
from .plans import scaling_of

__all__ = ["DoraAdapter", "active_dora", "drops"]


class DoraAdapter(NamedTuple):
    """The one active adapter: its linears, the dropout that acts now (None: none), scaling and magnitude."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module | None
    scaling: float | Tensor
    magnitude: Tensor


def active_dora(layer: nn.Module) -> DoraAdapter | str:
    """The layer's active DoRA adapter, or why the fused path cannot run what is active."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    if len(names) != 1 or len(variants) != 1:
        return (
            f"{len(variants)} of its {len(names)} active adapters are variants of LoRA; DoRA is fused "
            "where it is alone"
        )
    kind = type(variants[0])
    if (kind.__module__, kind.__qualname__) != ("peft.tuners.lora.variants", "DoraLinearVariant"):
        return f"{kind.__name__} is not vanilla LoRA"
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    magnitude = layer.lora_magnitude_vector[name]
    watched = not all(direct(part) for part in (a, b, dropout, magnitude))
    if (
        type(a) is not nn.Linear
        or type(b) is not nn.Linear
        or a.bias is not None
        or b.bias is not None
        or watched
    ):
        return (
            "lora_A or lora_B of its DoRA adapter is no plain nn.Linear, or has a bias, a hook or a "
            "forward of its own"
        )
    if a.weight.dtype != b.weight.dtype or a.weight.shape[0] > 256:
        return (
            f"lora_A {a.weight.dtype} of rank {a.weight.shape[0]}, lora_B {b.weight.dtype}: expected one "
            "dtype and a rank up to 256"
        )
    acts = layer.training and not isinstance(dropout, nn.Identity)
    return DoraAdapter(a, b, dropout if acts else None, scaling_of(layer, name), magnitude.weight)


def drops(layer: nn.Module) -> bool:
    """Whether an active adapter has dropout, which acts in training."""
    return any(
        not isinstance(layer.lora_dropout[name], nn.Identity)
        for name in layer.active_adapters
        if name in layer.lora_dropout
    )
