"""What a backend is given of one linear."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Linear", "Needs"]


class Linear(NamedTuple):
    """A frozen linear with at most one adapter.

    weight                  packed codes, or dense [N, K]
    quant                   (code, absmax, absmax_8bit, absmax_code, nested_absmax, absmax_offset, blocksize,
                            nested_blocksize), as `formats.nf4.operands` gives it; code None: dense
    n, k                    out_features, in_features
    bias                    [N], or None
    lora_a, lora_b          [R, K] and [N, R]; None without an adapter
    scaling, dropout_p      of the adapter
    seed                    int64 [1], what its mask is drawn from; None: no dropout
    """

    weight: Tensor
    quant: tuple
    n: int
    k: int
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    bias: bool
    lora_a: bool
    lora_b: bool
