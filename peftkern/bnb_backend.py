"""Entry point `bitsandbytes.backends`: plain bitsandbytes on the CPU runs peftkern's native 4-bit kernels.

bitsandbytes calls `register` while it is being imported. `PEFTKERN_BNB_BACKEND=0` switches it off; `unregister` gives bitsandbytes its own
kernels back. Weights that bitsandbytes has repacked for AVX512_BF16 inference always go to its own kernel.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from . import backends, functional, nf4
from .nf4 import NF4Weight
from .ops import quantize as _quantize

__all__ = ["register", "state", "unregister"]

_log = logging.getLogger(__name__)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OFF = ("0", "false", "off", "no")
# The argument lists these kernels were written for: an op with another one is left to bitsandbytes.
_ARGUMENTS = {
    "quantize_4bit": ("A", "blocksize", "quant_type", "quant_storage"),
    "dequantize_4bit": ("A", "absmax", "blocksize", "quant_type", "shape", "dtype"),
    "gemv_4bit": ("A", "B", "shapeB", "absmax", "code", "blocksize"),
    "gemm_4bit": ("A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit", "absmax_code", "absmax_offset"),
}


class _Hook:
    """What is registered now: the library handle that undoes it, and bitsandbytes' own kernels."""

    registration: library.Library | None = None
    stock: dict[str, Any] = {}
    reason = "bitsandbytes has not been imported, or peftkern is not installed (its entry point is missing)"


def register() -> bool:
    """Override bitsandbytes' 4-bit CPU ops; whether they are ours now. Never raises: `state()` tells the reason."""
    if _Hook.registration is not None:
        return True
    try:
        _Hook.reason = _obstacle() or _override()
    except Exception as error:  # a broken hook must not break `import bitsandbytes`
        unregister()
        _Hook.reason = f"registration failed: {type(error).__name__}: {error}"
        _log.warning("peftkern: bitsandbytes keeps its own CPU kernels, %s", _Hook.reason)
    return _Hook.registration is not None


def unregister() -> bool:
    """Give bitsandbytes its own CPU kernels back; whether ours were registered."""
    registration, _Hook.registration, _Hook.stock = _Hook.registration, None, {}
    if registration is None:
        return False
    registration._destroy()
    _Hook.reason = "unregistered by the caller"
    return True


def state() -> tuple[bool, str]:
    """Whether bitsandbytes' CPU ops are ours, and which, or why not."""
    return _Hook.registration is not None, _Hook.reason


def _obstacle() -> str | None:
    if os.environ.get("PEFTKERN_BNB_BACKEND", "1").strip().lower() in _OFF:
        return "switched off by PEFTKERN_BNB_BACKEND"
    ok, reason = backends.available("cpu")
    if not ok:
        return reason
    return None if hasattr(torch.ops.bitsandbytes, "quantize_4bit") else "bitsandbytes has not been imported"


def _override() -> str:
    names = [name for name, expected in _ARGUMENTS.items() if _arguments(name) == expected]
    _Hook.stock = {name: library.get_kernel(f"bitsandbytes::{name}", "CPU") for name in names}
    _Hook.registration = library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # torch warns of every override
        for name in names:
            _Hook.registration.impl(name, _KERNELS[name], "CPU", allow_override=True)
    left = sorted(_ARGUMENTS.keys() - set(names))
    return f"overrides {', '.join(names)}" + (f"; left as they are, unknown arguments: {', '.join(left)}" if left else "")


def _arguments(name: str) -> tuple[str, ...]:
    op = getattr(torch.ops.bitsandbytes, name, None)
    return tuple(argument.name for argument in op.default._schema.arguments) if op is not None else ()


def _stock(name: str, *args: Any) -> Any:
    return _Hook.stock[name].call_boxed(_CPU, *args)


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    if A.dtype not in _FLOATS or A.numel() == 0 or blocksize not in nf4.BLOCKSIZES:
        return _stock("quantize_4bit", A, blocksize, quant_type, quant_storage)
    packed, absmax = _quantize.quantize_4bit(A.contiguous(), blocksize, nf4.code_tensor(quant_type))
    return (packed if quant_storage == torch.uint8 else packed.view(-1).view(quant_storage).unsqueeze(1)), absmax


def _dequantize_4bit(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    weight = _weight(A, shape, dtype, blocksize, quant_type, absmax=_flat(absmax))
    return functional.dequantize_4bit(weight)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    if absmax.dtype != torch.float32 or absmax.dim() != 1:  # the repacked layout: absmax is bf16 [K / blocksize, N]
        return _stock("gemv_4bit", A, B, shapeB, absmax, code, blocksize)
    quant_type = "fp4" if code[1] > 0 else "nf4"
    return _linear(A, _weight(B, shapeB, A.dtype, blocksize, quant_type, absmax=_flat(absmax)))


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if absmax_8bit is None:
        scales = dict(absmax=_flat(absmax))
    else:
        nested = dict(absmax_8bit=absmax_8bit, absmax_code=absmax_code, nested_absmax=_flat(absmax))
        scales = nested | dict(absmax_offset=absmax_offset.float())
    return _linear(A, _weight(B, shapeB, A.dtype, blocksize, quant_type, **scales), bias)


def _weight(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int, quant_type: str, **scales: Tensor) -> NF4Weight:
    """View bitsandbytes' tensors; NF4Weight checks that their sizes fit, as native code will trust them."""
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    code = nf4.code_tensor(quant_type)
    return NF4Weight(packed.reshape(-1), code, tuple(shape), dtype, blocksize, quant_type, **scales)


def _linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    with torch.no_grad():  # the autograd of these ops is bitsandbytes'
        return functional.linear_4bit(x, weight, bias)


def _flat(absmax: Tensor) -> Tensor:
    return absmax.float().reshape(-1).contiguous()


_KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "gemv_4bit": _gemv_4bit,
    "gemm_4bit": _gemm_4bit,
}
