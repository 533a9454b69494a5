"""Gated linear units in plain PyTorch: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


def _activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x)."""
    if name == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if name == "gelu":
        below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * below, below + x * density
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """h = act(gate) * up, in fp32, rounded once; gate, up, h [..., I] of one dtype."""
    value, _ = _activation(_wide(gate), activation)
    return (value * _wide(up)).to(gate.dtype).contiguous()


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, h: Tensor | None
) -> None:
    """d_gate = dy * up * act'(gate), d_up = dy * act(gate) and, where it is given, h again: all filled, each
    rounded once."""
    value, slope = _activation(_wide(gate), activation)
    d_gate.copy_(_wide(dy) * _wide(up) * slope)
    d_up.copy_(_wide(dy) * value)
    if h is not None:
        h.copy_(value * _wide(up))
