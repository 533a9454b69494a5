"""Quantization to 4 bits and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from ..formats.quantize import quantized
from ..ops import dequantize as _dequantize
from ..ops import quantize as _quantize  # noqa: F401 - registers the ops that `quantized` calls
from . import checks

__all__ = ["dequantize_4bit", "quantize_4bit"]


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    check_finite: bool = False,
) -> NF4Weight:
    """Quantize a dense weight to NF4 or FP4.

    code[i] = nearest of 16 values to w[i] / absmax(block of i); with `nested`, the absmax is itself quantized
    to 8 bits in blocks of 256.

    Args:
        weight: fp32, bf16 or fp16, any shape, any layout (read in row-major order).
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, 32 ... 4096, a power of two.
        nested: "double quantization" of the absmax.
        check_finite: raise where the weight holds NaN or inf (costs one pass; the codes of such a block are
            otherwise undefined).
    Returns: NF4Weight; `packed` is uint8 [(numel+1)//2, 1].
    Raises: TypeError for another dtype, ValueError for a quant type, blocksize or value out of range.
    Source: QLoRA (Dettmers et al., 2023), sections 3 and appendix E.

    >>> w = quantize_4bit(torch.randn(128, 64))
    >>> w.dequantize().shape
    torch.Size([128, 64])
    """
    return NF4Weight(**quantized(weight, quant_type, blocksize, nested, check_finite))


def dequantize_4bit(
    weight: NF4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense weight: T(fp32(code) * fp32(absmax)), one rounding, bit for bit.

    Args:
        weight: NF4Weight.
        dtype: fp32, bf16 or fp16; default: out's, else the dtype it was quantized from.
        out: a contiguous tensor of `weight.shape` to fill, so that a loop need not allocate.
    Returns: Tensor in `weight.shape`; `out` where it is given.
    """
    dtype = dtype or (weight.dtype if out is None else out.dtype)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
    if out is not None:
        got = (tuple(out.shape), out.dtype, out.device)
        if got != (tuple(weight.shape), dtype, weight.device) or not out.is_contiguous():
            raise ValueError(
                f"out: got {got}, expected contiguous {(tuple(weight.shape), dtype, weight.device)}"
            )
    return _dequantize.dequantize_4bit(weight, dtype, out)
