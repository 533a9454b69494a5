"""The rows of a weight a slab at a time, so that no second dense copy of it is ever made."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight

__all__ = [
    "SLAB_ELEMENTS",
    "Rows",
    "block_scales",
    "decode_rows",
    "dense_rows",
    "full_precision",
    "row_slabs",
]

SLAB_ELEMENTS = 1 << 22  # 16 MiB of fp32: past the caches, so that a launch's cost is nothing beside it

Rows = Callable[[int, int], Tensor]
"""What gives the rows start ... stop - 1 of a dense weight."""


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, and without the caller's autocast, which would round products to 16 bits."""

    @functools.wraps(function)
    def exact(weight: NF4Weight | Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return function(weight, *args, **kwargs)

    return exact


def row_slabs(weight: NF4Weight | Tensor, elements: int = SLAB_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(start, stop) of slabs of at most `elements`, which end where a quantization block does.

    Where in_features is no multiple of the block size, a block straddles rows: a slab is then a multiple of
    as many rows as whole blocks need, even if that is more than `elements`.
    """
    n, k = weight.shape
    unit = weight.blocksize // math.gcd(k, weight.blocksize) if isinstance(weight, NF4Weight) else 1
    step = max(unit, elements // max(k, 1) // unit * unit)
    for start in range(0, n, step):
        yield start, min(n, start + step)


def block_scales(weight: NF4Weight, first: int, last: int) -> Tensor:
    """The absmax of the blocks first ... last - 1, fp32, with the bits that decoding the whole weight has."""
    if not weight.nested:
        return weight.absmax.reshape(-1)[first:last]
    codes = weight.absmax_8bit.reshape(-1)[first:last].long()
    outer = torch.arange(first, last, device=weight.device) // weight.nested_blocksize
    return weight.absmax_code[codes] * weight.nested_absmax.reshape(-1)[outer] + weight.absmax_offset


def decode_rows(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Rows of a 4-bit weight, fp32 [stop - start, K]; `start` begins a block."""
    k, size = weight.shape[1], weight.blocksize
    first, last = start * k // size, -(-stop * k // size)
    part = NF4Weight(
        packed=weight.packed.reshape(-1)[start * k // 2 : (stop * k + 1) // 2],
        code=weight.code,
        shape=(stop - start, k),
        dtype=torch.float32,
        blocksize=size,
        quant_type=weight.quant_type,
        absmax=block_scales(weight, first, last).contiguous(),
    )
    return part.dequantize(torch.float32)


def dense_rows(weight: NF4Weight | Tensor) -> Rows:
    """The rows of a weight as fp32; fp64 where the weight is fp64, which is what tests compare with. They lie
    one behind the other: a product onto a transposed matrix is summed in another order on some CPUs."""
    if isinstance(weight, NF4Weight):
        return lambda start, stop: decode_rows(weight, start, stop)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return lambda start, stop: weight[start:stop].to(dtype).contiguous()
