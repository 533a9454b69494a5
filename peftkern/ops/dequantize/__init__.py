"""Dequantization of a 4-bit weight, nested absmax included, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...formats.nf4 import NF4Weight
from .. import LIBRARY, backend, serving, undispatched

__all__ = ["dequantize_4bit"]


LIBRARY.define(
    "dequantize_4bit(Tensor packed, Tensor code, Tensor? absmax, Tensor? absmax_8bit, Tensor? "
    "absmax_code, Tensor? nested_absmax, "
    "Tensor? absmax_offset, SymInt[] shape, int blocksize, int nested_blocksize, ScalarType dtype) -> Tensor"
)

LIBRARY.define(
    "dequantize_4bit_out(Tensor packed, Tensor code, Tensor? absmax, Tensor? absmax_8bit, Tensor? "
    "absmax_code, Tensor? nested_absmax, "
    "Tensor? absmax_offset, int blocksize, int nested_blocksize, Tensor(a!) out) -> ()"
)


@library.impl(LIBRARY, "dequantize_4bit", "CompositeExplicitAutograd")
def _impl(packed: Tensor, *args: object) -> Tensor:
    return backend("dequantize", serving(packed, packed)).dequantize_4bit(packed, *args)


@library.register_fake("peftkern::dequantize_4bit", lib=LIBRARY)
def _(
    packed,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    shape,
    blocksize,
    nested_blocksize,
    dtype,
):
    return packed.new_empty(shape, dtype=dtype)


@library.impl(LIBRARY, "dequantize_4bit_out", "CompositeExplicitAutograd")
def _impl_out(packed: Tensor, *args: object) -> None:
    backend("dequantize", serving(packed, packed)).dequantize_4bit_out(packed, *args)


@library.register_fake("peftkern::dequantize_4bit_out", lib=LIBRARY)
def _(
    packed,
    code,
    absmax,
    absmax_8bit,
    absmax_code,
    nested_absmax,
    absmax_offset,
    blocksize,
    nested_blocksize,
    out,
):
    return None


def dequantize_4bit(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """NF4Weight -> dense tensor of `dtype` in `weight.shape`, or `out` filled."""
    w = weight
    given = w.packed, w.code, w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset
    # No gradient leads here, so that the dispatcher is for those who observe it: it takes longer than a small
    # weight's decoding.
    direct = undispatched(w.packed) and (out is None or type(out) is Tensor)
    ops = torch.ops.peftkern
    if out is not None:
        fill = _impl_out if direct else ops.dequantize_4bit_out
        fill(*given, w.blocksize, w.nested_blocksize, out)
        return out
    make = _impl if direct else ops.dequantize_4bit
    return make(*given, w.shape, w.blocksize, w.nested_blocksize, dtype)
