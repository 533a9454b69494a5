"""Quantization to 4 bits, and of the absmax to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...runtime.backends import select
from .. import LIBRARY, backend

__all__ = ["quantize_4bit", "quantize_absmax"]


LIBRARY.define("quantize_4bit(Tensor w, int blocksize, Tensor code) -> (Tensor packed, Tensor absmax)")
LIBRARY.define(
    "quantize_absmax(Tensor absmax, Tensor absmax_code, int blocksize) -> (Tensor absmax_8bit, Tensor "
    "nested_absmax)"
)


@library.impl(LIBRARY, "quantize_4bit", "CompositeExplicitAutograd")
def _quantize_4bit(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    return backend("quantize", select(w)).quantize_4bit(w, blocksize, code)


@library.impl(LIBRARY, "quantize_absmax", "CompositeExplicitAutograd")
def _quantize_absmax(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return backend("quantize", select(absmax)).quantize_absmax(absmax, absmax_code, blocksize)


@library.register_fake("peftkern::quantize_4bit", lib=LIBRARY)
def _(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    numel = w.numel()
    return w.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8), w.new_empty(
        (numel + blocksize - 1) // blocksize, dtype=torch.float32
    )


@library.register_fake("peftkern::quantize_absmax", lib=LIBRARY)
def _(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(
        (absmax.numel() + blocksize - 1) // blocksize
    )


quantize_4bit = torch.ops.peftkern.quantize_4bit
quantize_absmax = torch.ops.peftkern.quantize_absmax
