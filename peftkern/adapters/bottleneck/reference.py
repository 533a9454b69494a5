"""The bottleneck adapter by its definition, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "bottleneck"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "identity": lambda z: z,
}


def bottleneck(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    activation: str = "silu",
    keep: Tensor | None = None,
) -> Tensor:
    """y + scaling * ((act(x down^T + down_bias) * keep) up^T + up_bias).

    y: [M, N]; x: [M, K]; down: [R, K]; up: [N, R]; down_bias: [R]; up_bias: [N]; scaling: a number, [1] or
    [N]; keep: [M, R], what dropout leaves, already divided by the probability of being left.
    """
    hidden = ACTIVATIONS[activation](F.linear(x, down, down_bias))
    if keep is not None:
        hidden = hidden * keep
    return y + scaling * F.linear(hidden, up, up_bias)
