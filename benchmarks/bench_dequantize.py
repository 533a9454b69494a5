"""Decoding an NF4 weight with nested absmax, against bitsandbytes and a copy of the result; allocating, and
into a given buffer."""

from __future__ import annotations

import torch

from peftkern import NF4Weight
from peftkern.functional import dequantize_4bit
from peftkern.ops.dequantize import reference

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, bnb_linear, equal, has, moved_by_weight
from .shapes import GATE_8B, GATE_135M, KV_135M, Q_8B, SMALL

__all__ = ["build", "specs"]


def specs(small: bool) -> list[Spec]:
    shapes = (KV_135M, GATE_135M) if small else (Q_8B, GATE_8B, *SMALL)
    dtypes = ("bfloat16",) if small else ("bfloat16", "float32")
    return [
        Spec("dequantize", mode, d, s.n, s.k)
        for s in shapes
        for d in dtypes
        for mode in ("allocating", "preallocated")
    ]


def _reference(w: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    absmax = (w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    return reference.dequantize_4bit(
        w.packed, w.code, *absmax, w.shape, w.blocksize, w.nested_blocksize, dtype
    )


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype, given = DTYPES[spec.dtype], spec.mode == "preallocated"
    dense = torch.randn(spec.n, spec.k, dtype=torch.bfloat16) * 0.05
    layer = bnb_linear(dense.to(dtype), dtype) if has("bitsandbytes") else None
    w = NF4Weight.from_dense(dense.to(dtype)) if layer is None else NF4Weight.from_bnb(layer)
    expected = _reference(w, dtype)
    check, moved, buffers = (
        equal(expected),
        moved_by_weight(w, expected),
        [torch.empty_like(expected) for _ in range(2)],
    )
    ours = (
        (lambda: dequantize_4bit(w, dtype=dtype, out=buffers[0]))
        if given
        else (lambda: dequantize_4bit(w, dtype=dtype))
    )
    copy = (lambda: buffers[1].copy_(expected)) if given else (lambda: expected.clone())
    providers = [Provider(OURS, ours, check, moved), Provider("copy", copy, check, 2 * expected.nbytes)]
    if layer is not None and not given:  # bitsandbytes 0.50 has no CPU kernel that fills a given tensor
        import bitsandbytes.functional as bnb

        data, state = layer.weight.data, layer.weight.quant_state
        providers.append(Provider("bitsandbytes", lambda: bnb.dequantize_4bit(data, state), check, moved))
    return providers


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
