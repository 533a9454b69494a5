"""From a dense weight to the fields of an `NF4Weight`, by the ops that the package registers with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import BLOCKSIZES, FLOATS, code_tensor, dynamic_map

__all__ = ["quantized"]

_NESTED_BLOCKSIZE = 256


def quantized(
    weight: Tensor, quant_type: str, blocksize: int, nested: bool, check_finite: bool = False
) -> dict[str, Any]:
    """The fields of the NF4Weight that holds `weight`; arguments and errors as of
    `functional.quantize_4bit`."""
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight: got {weight.dtype}, expected float32, bfloat16 or float16")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {BLOCKSIZES}")
    if weight.numel() == 0:
        raise ValueError(f"weight: is empty, shape {tuple(weight.shape)}")
    code = code_tensor(quant_type, weight.device)
    if check_finite and not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: holds NaN or inf; repair the checkpoint before quantizing it")
    ops = torch.ops.peftkern
    packed, absmax = ops.quantize_4bit(weight.detach().contiguous(), blocksize, code)
    fields = dict(
        packed=packed,
        code=code,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        blocksize=blocksize,
        quant_type=quant_type,
    )
    return fields | (_nested(absmax) if nested else {"absmax": absmax})


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    offset, absmax_code = absmax.mean(), dynamic_map(absmax.device)
    absmax_8bit, nested_absmax = torch.ops.peftkern.quantize_absmax(
        absmax - offset, absmax_code, _NESTED_BLOCKSIZE
    )
    return dict(
        absmax_8bit=absmax_8bit,
        absmax_code=absmax_code,
        nested_absmax=nested_absmax,
        absmax_offset=offset,
    )
