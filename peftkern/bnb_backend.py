"""Entry point `bitsandbytes.backends`: plain bitsandbytes on the CPU runs peftkern's native 4-bit kernels.

bitsandbytes calls `register` while it is being imported. `PEFTKERN_BNB_BACKEND=0` switches it off;
`unregister` takes everything back.

Two things of bitsandbytes change, and nothing else: the CPU kernels of its four 4-bit ops, and one name,
`_convert_weight_packed_for_cpu` in bitsandbytes.nn.modules. Through that name `Linear4bit.forward` repacks
its weight for inference at the first evaluation on a CPU with
AVX512_BF16, for good: afterwards there is no gradient, the absmax is rounded to bf16, and shapes that do not
divide are an assertion. While the hook is registered the name returns the weight as it is. Weights repacked
elsewhere are read rightly, with their gradient.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

from . import functional
from .formats import nf4
from .formats.bnb_repacked import codes_in_row_order, is_repacked, plain_absmax
from .formats.nf4 import NF4Weight
from .ops import quantize as _quantize
from .ops.linear import cpu
from .runtime import backends

__all__ = ["register", "state", "suspended", "unregister"]

_log = logging.getLogger(__name__)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_REPACK = "_convert_weight_packed_for_cpu"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = (torch.float32, torch.uint8, torch.float32, torch.float32, torch.float32)
_NESTED_BLOCK = 256  # gemm_4bit has no argument for another
_OFF = ("0", "false", "off", "no")
# The argument lists these kernels were written for: an op with another one is left to bitsandbytes.
_ARGUMENTS = {
    "quantize_4bit": ("A", "blocksize", "quant_type", "quant_storage"),
    "dequantize_4bit": ("A", "absmax", "blocksize", "quant_type", "shape", "dtype"),
    "gemv_4bit": ("A", "B", "shapeB", "absmax", "code", "blocksize"),
    "gemm_4bit": (
        "A",
        "B",
        "shapeB",
        "absmax",
        "blocksize",
        "quant_type",
        "bias",
        "absmax_8bit",
        "absmax_code",
        "absmax_offset",
    ),
}


class _Hook:
    """What is registered now: the library handle that undoes it, bitsandbytes' own kernels, and its own
    function that repacks."""

    registration: library.Library | None = None
    stock: dict[str, Any] = {}
    repack: Callable[..., Any] | None = None
    reason = "bitsandbytes has not been imported, or peftkern is not installed (its entry point is missing)"


def register() -> bool:
    """Override bitsandbytes' 4-bit CPU ops; whether they are ours now. Never raises: `state()` tells the
    reason."""
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
    """Give bitsandbytes its own CPU kernels and its repacking back; whether ours were registered."""
    registration, _Hook.registration, _Hook.stock = _Hook.registration, None, {}
    if registration is None:
        return False
    _let_repack()
    registration._destroy()
    _Hook.reason = "unregistered by the caller"
    return True


def state() -> tuple[bool, str]:
    """Whether bitsandbytes' CPU ops are ours, and which, or why not."""
    return _Hook.registration is not None, _Hook.reason


@contextmanager
def suspended() -> Iterator[None]:
    """bitsandbytes' own CPU kernels and its repacking inside the block, whatever was registered before;
    afterwards as it was."""
    importlib.import_module("bitsandbytes")  # which registers the hook, so that it can be taken back
    was = unregister()
    try:
        yield
    finally:
        if was:
            register()


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
        if "gemv_4bit" in names:
            _Hook.registration.impl("gemv_4bit", _Gemv4bit.call, "AutogradCPU")
    left = sorted(name for name in _ARGUMENTS if name not in names and _arguments(name))
    unknown = f"; left as they are, unknown arguments: {', '.join(left)}" if left else ""
    return f"overrides {', '.join(names)}{unknown}{_prevent_repacking()}"


def _prevent_repacking() -> str:
    """Put a function that leaves the weight as it is in the place of the one that repacks; what `state` is to
    say of it."""
    modules = importlib.import_module("bitsandbytes.nn.modules")
    repack = getattr(modules, _REPACK, None)
    if repack is None:  # a version that does not repack
        return ""
    if list(inspect.signature(repack).parameters)[:2] != ["qweight", "quant_state"]:
        return f"; repacking is left as it is, unknown arguments of {_REPACK}"
    # Someone who had put a function of theirs under the name may have given ours back to it.
    if repack is not _as_it_is:
        _Hook.repack = repack
    setattr(modules, _REPACK, _as_it_is)
    return "; no weight is repacked"


def _let_repack() -> None:
    modules = importlib.import_module("bitsandbytes.nn.modules")
    if _Hook.repack is not None and getattr(modules, _REPACK, None) is _as_it_is:
        setattr(modules, _REPACK, _Hook.repack)


def _as_it_is(qweight: Tensor, quant_state: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    return qweight, quant_state


def _arguments(name: str) -> tuple[str, ...]:
    """Of an op; () where this version of bitsandbytes has none of the name."""
    op = getattr(torch.ops.bitsandbytes, name, None)
    return tuple(argument.name for argument in op.default._schema.arguments) if op is not None else ()


def _stock(name: str, *args: Any) -> Any:
    return _Hook.stock[name].call_boxed(_CPU, *args)


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    if A.dtype not in _FLOATS or A.numel() == 0 or blocksize not in nf4.BLOCKSIZES:
        return _stock("quantize_4bit", A, blocksize, quant_type, quant_storage)
    packed, absmax = _quantize.quantize_4bit(A.contiguous(), blocksize, nf4.code_tensor(quant_type))
    return (
        packed if quant_storage == torch.uint8 else packed.view(-1).view(quant_storage).unsqueeze(1)
    ), absmax


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    weight = _weight(A, shape, dtype, blocksize, quant_type, absmax=absmax)
    return functional.dequantize_4bit(weight)


def _gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    if is_repacked(B, absmax, shapeB, blocksize) and _reads_repacked():
        return _stock("gemv_4bit", A, B, shapeB, absmax, code, blocksize)
    return _linear(A, _gemv_weight(B, shapeB, absmax, code, blocksize, A.dtype))


class _Gemv4bit(torch.autograd.Function):
    """gemv_4bit with its gradient: bitsandbytes registers none, and its `matmul_4bit` calls this op in
    training on a repacked weight."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
    ) -> Tensor:
        ctx.save_for_backward(B, absmax, code)
        ctx.shape, ctx.blocksize, ctx.dtype = tuple(shapeB), blocksize, A.dtype
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.bitsandbytes.gemv_4bit(A, B, shapeB, absmax, code, blocksize)
            return torch.ops.aten._unsafe_view(y, y.shape)  # no view: matmul_4bit adds the bias in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        B, absmax, code = ctx.saved_tensors
        dense = functional.dequantize_4bit(_gemv_weight(B, ctx.shape, absmax, code, ctx.blocksize, ctx.dtype))
        return torch.matmul(dy, dense), *[None] * 5

    @staticmethod
    def call(*args: Any) -> Tensor:
        """The kernel of the autograd key, which torch calls without a graph too."""
        return _Gemv4bit.apply(*args)


def _gemv_weight(
    B: Tensor, shape: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> NF4Weight:
    return _weight(
        B, shape, dtype, blocksize, "nf4", code, absmax=absmax
    )  # the values of `code` count, not the name


def _reads_repacked() -> bool:
    """Whether bitsandbytes' own gemv is the one for repacked weights, as on CPUs with AVX512_BF16."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


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
    parts = (
        (absmax, None, None, None, None)
        if absmax_8bit is None
        else (None, absmax_8bit, absmax_code, absmax, absmax_offset)
    )
    y = _token(A, B, shapeB, blocksize, quant_type, parts, bias)
    if y is not None:
        return y
    if absmax_8bit is None:
        scales = dict(absmax=absmax)
    else:
        nested = dict(absmax_8bit=absmax_8bit, absmax_code=absmax_code, nested_absmax=_flat(absmax))
        scales = nested | dict(absmax_offset=absmax_offset.float())
    return _linear(A, _weight(B, shapeB, A.dtype, blocksize, quant_type, **scales), bias)


def _weight(
    packed: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    code: Tensor | None = None,
    **scales: Tensor,
) -> NF4Weight:
    """View bitsandbytes' tensors; NF4Weight checks that their sizes fit, as native code will trust them."""
    if (absmax := scales.get("absmax")) is not None:
        if is_repacked(packed, absmax, shape, blocksize):
            packed = codes_in_row_order(packed, shape)
        scales["absmax"] = plain_absmax(absmax, shape, blocksize)
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    if code is None:
        code = _code(quant_type)
    return NF4Weight(packed.reshape(-1), code, tuple(shape), dtype, blocksize, quant_type, **scales)


def _token(
    x: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    scales: tuple,
    bias: Tensor | None,
) -> Tensor | None:
    """x W^T + bias for few rows of x where every operand is as the kernel reads it, else None.

    In a small layer the way through `_weight` and `functional.linear_4bit` takes several times as long as the
    product. What they check for native code is checked here, call by call. scales: absmax, absmax_8bit,
    absmax_code, nested_absmax, absmax_offset, or None each.
    """
    n, k = shape
    if not (
        x.dtype in _FLOATS
        and x.shape[-1:] == (k,)
        and k
        and n
        and blocksize in nf4.BLOCKSIZES
        and quant_type in nf4.CODES
    ):
        return None
    blocks = -(-n * k // blocksize)
    sizes = (blocks, blocks, 256, -(-blocks // _NESTED_BLOCK), 1)
    fits = (
        _fits(packed, torch.uint8, (n * k + 1) // 2)
        and x.is_contiguous()
        and (bias is None or _fits(bias, bias.dtype, n))
    )
    for scale, dtype, size in zip(scales, _SCALES, sizes, strict=True):
        fits = fits and (scale is None or _fits(scale, dtype, size))
    if not fits or (bias is not None and bias.dtype not in _FLOATS):
        return None
    if backends.forced() not in (None, "cpu") or torch.autograd._profiler_enabled():
        return None
    return cpu.few_rows(x, packed, (_code(quant_type), *scales, blocksize, _NESTED_BLOCK), n, bias)


def _fits(tensor: Tensor, dtype: torch.dtype, size: int) -> bool:
    return tensor.dtype == dtype and tensor.numel() == size and tensor.is_cpu and tensor.is_contiguous()


@functools.cache
def _code(quant_type: str) -> Tensor:
    with torch.inference_mode(False):
        return nf4.code_tensor(quant_type)


def _linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    n, k = weight.shape
    if x.shape[-1:] != (k,):  # bitsandbytes' own product is torch's, whose error callers know
        rows = tuple(x.shape) if x.dim() < 2 else (x.shape[:-1].numel(), x.shape[-1])
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({'x'.join(map(str, rows))} and {k}x{n})"
        )
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
