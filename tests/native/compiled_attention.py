"""Attention by the C ABI of a library, and by its definition in fp64."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from peftkern.ops.attention import reference

__all__ = ["Attention", "Grad", "Heads", "attention", "exact_attention", "heads"]

i64 = ctypes.c_int64
THREADS = 1


class Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", i64), ("head", i64), ("row", i64)]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, Heads) for name in ("q", "k", "v")),
        *((name, i64) for name in ("batch", "heads", "kv_heads", "seq", "keys", "dim")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("mask", ctypes.c_void_p),
        ("mask_batch", i64),
        ("mask_row", i64),
    ]


class Grad(ctypes.Structure):
    _fields_ = [(name, Heads) for name in ("y", "dy", "dq", "dk", "dv")]


def heads(shape: tuple[int, ...]) -> list[Tensor]:
    """q, k, v, dy of (batch, heads, heads of keys, queries, keys, dim), in bf16."""
    b, h, hk, s, t, d = shape
    return [torch.randn(b, n, rows, d).bfloat16() for n, rows in ((h, s), (hk, t), (hk, t), (h, s))]


def attention(lib: ctypes.CDLL, level: str, inputs: list[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """y, dq, dk, dv; causal where there is no mask [batch, seq, keys]."""
    assert lib.pk_set_isa(level.encode()) == 0
    lib.pk_attention_scratch_bytes.restype = i64
    q, k, v, dy = inputs
    sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]
    place = (None, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0), mask.stride(1))
    call = Attention(*map(_of, (q, k, v)), *sizes, q.shape[3] ** -0.5, mask is None, *place)
    y, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse, of_y = torch.empty(q.shape[:3]), _of(y)
    size = max(lib.pk_attention_scratch_bytes(ctypes.byref(call), back, THREADS) for back in (0, 1))
    scratch = torch.empty(size, dtype=torch.uint8)
    tail = (ctypes.c_void_p(lse.data_ptr()), ctypes.c_void_p(scratch.data_ptr()), i64(size), THREADS)
    assert lib.pk_attention_fwd_cpu(ctypes.byref(call), ctypes.byref(of_y), *tail) == 0
    grad = Grad(*map(_of, (y, dy, dq, dk, dv)))
    assert lib.pk_attention_bwd_cpu(ctypes.byref(call), ctypes.byref(grad), *tail) == 0
    return {"y": y, "dq": dq, "dk": dk, "dv": dv}


def exact_attention(inputs: list[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """The same in fp64 by the definition."""
    q, k, v, dy = (x.double() for x in inputs)
    options = None if mask is None else mask[:, None], mask is None, q.shape[3] ** -0.5
    y, lse = reference.forward(q, k, v, *options)
    grads = reference.backward(dy, q, k, v, y, lse, *options)
    return {"y": y, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def _of(x: Tensor) -> Heads:
    return Heads(x.data_ptr(), *x.stride()[:3])
