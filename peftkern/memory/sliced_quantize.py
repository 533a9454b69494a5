"""Quantization to 4 bits slice by slice, with the bits of quantizing the whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats.codes import code_tensor, dynamic_map
from ..ops import quantize
from .stored_weights import SLICE

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

__all__ = ["dense_slices", "quantize_slices", "staging_bytes"]

_NESTED = 256  # the block of an absmax that is quantized itself


def quantize_slices(
    slices: Iterable[tuple[int, Tensor]],
    like: Params4bit,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: Any,
) -> Params4bit:
    """A quantized parameter of the format of `like` from the slices of a dense tensor.

    Slices are coded by bitsandbytes' op, which on a CPU is peftkern's kernel where its backend is registered.
    The offset of a nested absmax is the mean of all of them: they stay in fp32 (1/16 of a byte an element)
    until the last slice is there.

    Args:
        slices: (index of the first element, flat slice of any float dtype); all but the last hold a multiple
            of 16,384 elements.
        like: an unquantized Params4bit: its quant_type, blocksize, nesting, storage dtype and module.
        shape, dtype: of the dense weight; slices are rounded to `dtype` first.
        device: where the result is to be.
    Returns: the Params4bit that `Params4bit(dense.to(dtype)).to(device)` is, bit for bit.
    """
    numel, size = torch.Size(shape).numel(), like.blocksize
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // size), dtype=torch.float32, device=device)
    for start, part in slices:
        _code(part.to(device=device, dtype=dtype), start, packed, absmax, like)
    return _parameter(packed, absmax, like, shape, dtype)


def dense_slices(weight: Tensor) -> Iterable[tuple[int, Tensor]]:
    """The slices of a dense tensor in row-major order, without a copy where it is contiguous."""
    flat = weight.detach().reshape(-1)
    return ((start, flat[start : start + SLICE]) for start in range(0, flat.numel(), SLICE))


def _code(part: Tensor, start: int, packed: Tensor, absmax: Tensor, like: Params4bit) -> None:
    """Put the bytes and the absmax of a slice where they belong."""
    size = like.blocksize
    if part.is_cpu and part.numel() % 2:  # of which bitsandbytes 0.48 loses the last
        codes, scales = quantize.quantize_4bit(part, size, code_tensor(like.quant_type))
    else:
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(part, size, like.quant_type, torch.uint8)
    packed[start // 2 : start // 2 + codes.numel()] = codes.reshape(-1)
    absmax[start // size : start // size + scales.numel()] = scales.reshape(-1)


def staging_bytes(numel: int, itemsize: int, *, nested: bool, blocksize: int) -> int:
    """Bytes on the device beside the result while a tensor of `numel` elements is quantized: a slice of
    `itemsize` bytes an element with its codes and absmax; where absmax is nested, it is there once more in
    fp32, and twice while it is quantized itself."""
    count = min(SLICE, numel)
    slice_bytes = count * itemsize + (count + 1) // 2 + 4 * -(-count // blocksize)
    absmax = 4 * -(-numel // blocksize) if nested else 0
    return max(slice_bytes + absmax, 2 * absmax)


def _nested(centred: Tensor) -> tuple[Tensor, QuantState]:
    """An absmax, less its mean, in 8 bits with its state, by bitsandbytes. By our kernel where a block is all
    zeros, as that of a weight of one block is, and bitsandbytes is 0.48, whose CPU kernel ends the
    process then."""
    from bitsandbytes import __version__, functional
    from packaging.version import Version  # which bitsandbytes needs

    safe = Version(__version__) >= Version("0.50") or not centred.is_cpu
    if safe or all(block.any() for block in centred.split(_NESTED)):
        return functional.quantize_blockwise(centred, blocksize=_NESTED)
    code = dynamic_map(centred.device)
    codes, absmax = quantize.quantize_absmax(centred, code, _NESTED)
    return codes, functional.QuantState(absmax=absmax, code=code, blocksize=_NESTED, dtype=centred.dtype)


def _parameter(
    packed: Tensor, absmax: Tensor, like: Params4bit, shape: tuple[int, ...], dtype: torch.dtype
) -> Params4bit:
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    parts: dict[str, Any] = dict(shape=torch.Size(shape), dtype=dtype, blocksize=like.blocksize)
    parts |= dict(
        code=functional.get_4bit_type(like.quant_type, device=packed.device), quant_type=like.quant_type
    )
    if like.compress_statistics:
        offset = absmax.mean()
        absmax, state2 = _nested(absmax - offset)
        parts |= dict(offset=offset, state2=state2)
    state = functional.QuantState(absmax=absmax, **parts)
    module = like.module
    made = Params4bit(
        packed.view(like.quant_storage).unsqueeze(1),
        requires_grad=False,
        quant_state=state,
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_type=like.quant_type,
        quant_storage=like.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    if module is not None:
        module.quant_state = state
    return made
