"""The layout into which bitsandbytes repacks 4-bit weights for inference on CPUs with AVX512_BF16, and the
way back from it.

Stock `Linear4bit.forward` repacks at the first evaluation: the codes of 32 rows are interleaved, the absmax
becomes bf16, transposed, and no longer nested. Nothing here needs such a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["codes_in_row_order", "is_repacked", "keep_plain", "leaves_traces", "plain_absmax", "restore"]

_ROWS = 32  # rows whose codes are interleaved: rows 0-15 lie in the low nibbles, 16-31 in the high ones
_NESTED_BLOCK = 256
# What bitsandbytes notes on the QuantState: the first is True while repacked, False once its own way back has
# run.
_MARKS = (
    "packing_format_for_cpu",
    "original_dtype",
    "original_nested",
    "original_qshape",
    "original_storage_type",
)


def leaves_traces(state: Any) -> bool:
    """Whether a QuantState belongs to a weight that is repacked now, or that bitsandbytes has brought back,
    not quite as it was."""
    return hasattr(state, "packing_format_for_cpu") or _transposed(state.absmax, state.shape, state.blocksize)


def is_repacked(packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int) -> bool:
    """Whether bytes and absmax, as the ops get them, are those of a repacked weight: [N, K/2] where plain
    bytes are flat."""
    if not _transposed(absmax, shape, blocksize):
        return False
    return tuple(packed.shape if packed.is_contiguous() else packed.t().shape) == (shape[0], shape[1] // 2)


def codes_in_row_order(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bytes of a repacked weight of `shape` [N, K] in the plain format: uint8 [N*K/2, 1], row-major,
    first element high."""
    rows, columns = shape
    if rows % _ROWS or packed.numel() * 2 != rows * columns:
        raise ValueError(
            f"packed: got {packed.numel()} bytes, expected {rows * columns // 2} for shape ({rows}, "
            f"{columns}) and rows that are a "
            f"multiple of {_ROWS}"
        )
    source = packed if packed.is_contiguous() else packed.t()
    pairs = source.reshape(
        rows // _ROWS, columns // 2, _ROWS // 2, 2
    )  # last: an even column, and the odd one after it
    even, odd = pairs[..., 0], pairs[..., 1]
    halves = torch.stack([(even << 4) | (odd & 15), (even & 0xF0) | (odd >> 4)], dim=2)  # [N/32, K/2, 2, 16]
    return halves.permute(0, 2, 3, 1).reshape(-1, 1)


def plain_absmax(absmax: Tensor, shape: Sequence[int], blocksize: int) -> Tensor:
    """The absmax of a repacked weight in the plain format: fp32 [N*K/blocksize]. Any other is only made flat
    and fp32."""
    rows = absmax.T if _transposed(absmax, shape, blocksize) else absmax
    return rows.float().reshape(-1).contiguous()


def restore(weight: Tensor, state: Any) -> str:
    """Bring a Params4bit that was repacked and its QuantState back to the plain format, in place; returns
    what was lost, "" if nothing.

    The absmax of weights quantized from bf16 is a bf16 number, so that rounding it lost nothing. A nested
    absmax is quantized again with
    the offset that the state has kept: its 8-bit codes were thrown away, and the rounded values do not tell
    neighbouring codes apart.
    """
    if getattr(state, "packing_format_for_cpu", False):
        storage = getattr(state, "original_storage_type", torch.uint8)
        weight.data = codes_in_row_order(weight.data, state.shape).flatten().view(storage).unsqueeze(1)
    marks = {name: state.__dict__.pop(name) for name in _MARKS if name in state.__dict__}
    state.dtype, nested = marks.get("original_dtype", state.dtype), marks.get("original_nested", state.nested)
    if state.nested:  # bitsandbytes' own way back has quantized it, and left the offset in the weight's dtype
        state.offset = state.offset.float()
    else:
        state.absmax = plain_absmax(state.absmax, state.shape, state.blocksize)
        if nested:
            _nest(state)
    if nested:
        return "its absmax was rounded to bf16 and quantized again"
    return "" if state.dtype == torch.bfloat16 else "its absmax stays rounded to bf16"


def keep_plain(model: nn.Module) -> int:
    """Set each Linear4bit of `model` not to repack its weight in evaluation; returns how many would have."""
    able = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in able:
        module.support_avx512bf16_for_cpu = False
    return len(able)


def _transposed(absmax: Tensor, shape: Sequence[int] | None, blocksize: int) -> bool:
    if absmax is None or absmax.dtype != torch.bfloat16 or shape is None or len(shape) != 2:
        return False
    return tuple(absmax.shape) == (shape[1] // blocksize, shape[0])


def _nest(state: Any) -> None:
    from bitsandbytes import functional

    state.offset = state.absmax.mean() if state.offset is None else state.offset.float()
    state.absmax, state.state2 = functional.quantize_blockwise(
        state.absmax - state.offset, blocksize=_NESTED_BLOCK
    )
    state.nested = True
