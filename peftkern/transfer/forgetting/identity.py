"""What tells one base from another by its weights: a hash of values sampled from each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...formats.bnb_repacked import plain_absmax
from .layers import Factors, sampled_values

__all__ = ["base_identity"]

_SAMPLES = 64


def base_identity(factors: Mapping[str, Factors]) -> dict[str, str]:
    """For each layer by name a short hash over the shape and 64 sampled values of its base weight.

    Values are compared as bf16, so that a base loaded in fp32 or bf16 is the same one; of a 4-bit weight they
    are its blocks' absolute maxima. A base in 4 bits and the dense one it was quantized from are two bases:
    their Fisher information differs.
    """
    return {name: _hash(layer) for name, layer in factors.items()}


def _hash(layer: Factors) -> str:
    digest = hashlib.sha256(f"{layer.b.shape[0]} {layer.a.shape[1]}".encode())
    digest.update(_sampled(layer.module.base_layer).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _sampled(base: nn.Module) -> Tensor:
    weight: Any = base.weight
    state = getattr(weight, "quant_state", None)
    values = weight.data if state is None else _absmax(state)
    sampled = sampled_values(values, _SAMPLES)
    return sampled.to(torch.bfloat16) if sampled.is_floating_point() else sampled


def _absmax(state: Any) -> Tensor:
    """The blocks' maxima of a 4-bit weight, flat, whether they are nested, or repacked for a CPU, or neither.

    Nested ones are decoded here: the identity is not to depend on which kernels bitsandbytes has in place.
    """
    if state.nested:
        nested = state.state2
        scales = nested.absmax.repeat_interleave(nested.blocksize)[: state.absmax.numel()]
        return nested.code[state.absmax.flatten().long()] * scales + state.offset
    return plain_absmax(state.absmax, state.shape, state.blocksize)
