"""Checks of the public functions' arguments: each error names the argument, what was got, what was expected
and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight

__all__ = ["FLOATS", "activation", "adapter", "dropout", "flat", "floating", "seed", "vector", "weight_shape"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def floating(name: str, value: Tensor) -> None:
    """Raises TypeError for a tensor of another dtype than fp32, bf16 and fp16."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {value.dtype}, expected float32, bfloat16 or float16")


def dropout(p: float, seed: Tensor | None, device: torch.device) -> None:
    """A probability, and an int64 [1] seed on the device of x."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: got {p}, expected a probability from 0 to 1")
    if p and seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(
            f"seed: got {seed.dtype} {tuple(seed.shape)} on {seed.device}, expected int64 [1] on {device}"
        )


def seed(x: Tensor, p: float, given: Tensor | None) -> Tensor | None:
    """The given one, else one drawn from torch's generator; None without dropout."""
    dropout(p, given, x.device)
    if p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device) if given is None else given


def weight_shape(weight: NF4Weight | Tensor) -> tuple[tuple[int, int], torch.device]:
    """Of a frozen [N, K] weight: its shape and device."""
    shape = tuple(weight.shape)
    if len(shape) != 2:
        raise ValueError(f"weight: got shape {shape}, expected [out_features, in_features]")
    if isinstance(weight, Tensor):
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"weight: got a {weight.dtype} tensor, expected float32, bfloat16, float16 or an "
                "NF4Weight (NF4Weight.from_bnb)"
            )
        if weight.requires_grad:
            raise ValueError(
                "weight: requires grad, but the base weight is frozen here; call "
                "weight.requires_grad_(False) or use torch's linear"
            )
    return shape, weight.device


def activation(x: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """x [..., K] for a weight of `shape`."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        hint = (
            "; the weight looks transposed, quantize it as [out_features, in_features]"
            if x.dim() and x.shape[-1] == shape[0]
            else ""
        )
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [..., {shape[1]}] for a weight {shape}{hint}"
        )
    if x.device != device:
        raise ValueError(f"x: is on {x.device}, the weight is on {device}; move one of them")


def flat(x: Tensor) -> Tensor:
    """x [..., K] -> [M, K], a view where that can be."""
    k = x.shape[-1]
    return x.reshape(-1, k) if k else x.reshape(math.prod(x.shape[:-1]), 0)


def vector(name: str, value: Tensor | None, n: int, device: torch.device) -> None:
    """A float tensor [n], or None."""
    if value is None:
        return
    if value.dtype not in FLOATS or tuple(value.shape) != (n,) or value.device != device:
        raise ValueError(
            f"{name}: got {value.dtype} {tuple(value.shape)} on {value.device}, expected a float "
            f"tensor [{n}] on {device}"
        )


def adapter(lora_a: Tensor | None, lora_b: Tensor | None, n: int, k: int, device: torch.device) -> None:
    """lora_a [R, k] and lora_b [n, R] of one dtype, or neither."""
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise ValueError(f"{'lora_a' if lora_a is None else 'lora_b'}: is missing; give both or none")
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name}: got {value.dtype}, expected float32, bfloat16 or float16")
        if value.device != device:
            raise ValueError(f"{name}: is on {value.device}, the weight is on {device}; move one of them")
    r = lora_a.shape[0] if lora_a.dim() == 2 else -1
    if tuple(lora_a.shape) != (r, k) or not 1 <= r <= 256:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, expected [r, {k}] with r from 1 to 256")
    if tuple(lora_b.shape) != (n, r):
        raise ValueError(f"lora_b: got shape {tuple(lora_b.shape)}, expected [{n}, {r}]")
    if lora_a.dtype != lora_b.dtype:
        raise ValueError(f"lora_b: got {lora_b.dtype}, lora_a is {lora_a.dtype}; both must have one dtype")
