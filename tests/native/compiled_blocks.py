"""The structs of the decoder layer's small ops, as ctypes lays them out, and calls with every buffer
poisoned."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .compiled import DTYPES, i64, pointer

_P, _I64, _I32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class CGlu(ctypes.Structure):
    """pk_glu."""

    _fields_ = [("gate", _P), ("up", _P), ("ld_gate", _I64), ("ld_up", _I64)]


class CGluGrad(ctypes.Structure):
    """pk_glu_grad."""

    _fields_ = [("d_gate", _P), ("d_up", _P), ("ld_d_gate", _I64), ("ld_d_up", _I64)]


class CRmsNorm(ctypes.Structure):
    """pk_rms_norm."""

    _fields_ = [
        ("x", _P),
        ("weight", _P),
        ("m", _I64),
        ("n", _I64),
        ("ld_x", _I64),
        ("dtype", _I32),
        ("weight_dtype", _I32),
    ]
    _fields_ += [("y_dtype", _I32), ("cast", _I32), ("eps", _F), ("offset", _F)]


class CRopeHeads(ctypes.Structure):
    """pk_rope_heads."""

    _fields_ = [("x", _P), ("y", _P)]
    _fields_ += [
        (name, _I64) for name in ("heads", "x_batch", "x_head", "x_seq", "y_batch", "y_head", "y_seq")
    ]


STRUCTS = {"pk_glu": CGlu, "pk_glu_grad": CGluGrad, "pk_rms_norm": CRmsNorm, "pk_rope_heads": CRopeHeads}


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN with a guard behind it, and the guard."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 16,), torch.nan, dtype=dtype)
    buffer[count:] = -777.0
    return buffer[:count].view(shape), buffer[count:]


def glu(lib: ctypes.CDLL, gate: Tensor, up: Tensor, dy: Tensor, activation: int) -> dict[str, Tensor]:
    """Forward and backward over [m, n] with contiguous rows; h of both must have the same bits."""
    (m, n), number = gate.shape, DTYPES[gate.dtype]
    outs = [guarded((m, n), gate.dtype) for _ in range(4)]
    h, again, d_gate, d_up = (out for out, _ in outs)
    operands = CGlu(pointer(gate), pointer(up), gate.stride(0), up.stride(0))
    grads = CGluGrad(pointer(d_gate), pointer(d_up), n, n)
    assert lib.pk_glu_fwd_cpu(ctypes.byref(operands), number, i64(m), i64(n), activation, pointer(h), 1) == 0
    refs = ctypes.byref(operands), ctypes.byref(grads)
    assert lib.pk_glu_bwd_cpu(*refs, number, i64(m), i64(n), activation, pointer(dy), pointer(again), 1) == 0
    assert torch.equal(h, again) and all((guard == -777.0).all() for _, guard in outs)
    return {"h": h, "d_gate": d_gate, "d_up": d_up}


def rms_norm(
    lib: ctypes.CDLL, x: Tensor, weight: Tensor, dy: Tensor, eps: float, offset: float, cast: int
) -> dict[str, Tensor]:
    """Forward and backward over [m, n]; y of dy's dtype."""
    (m, n), lib.pk_rms_norm_scratch_bytes.restype = x.shape, ctypes.c_int64
    y, rstd, dx, d_weight = outs = [
        guarded(s, d)
        for s, d in (((m, n), dy.dtype), ((m,), torch.float32), ((m, n), x.dtype), ((n,), torch.float32))
    ]
    dtypes = (DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dy.dtype])
    norm = CRmsNorm(pointer(x), pointer(weight), m, n, x.stride(0), *dtypes, cast, eps, offset)
    size = lib.pk_rms_norm_scratch_bytes(i64(m), i64(n), 1)
    scratch, guard = guarded((size // 4,), torch.float32)
    tail = (pointer(scratch), i64(size), 1)
    assert lib.pk_rms_norm_fwd_cpu(ctypes.byref(norm), pointer(y[0]), pointer(rstd[0]), *tail) == 0
    assert (
        lib.pk_rms_norm_bwd_cpu(
            ctypes.byref(norm), pointer(dy), pointer(rstd[0]), pointer(dx[0]), pointer(d_weight[0]), *tail
        )
        == 0
    )
    assert (guard == -777.0).all() and all((g == -777.0).all() for _, g in outs)
    return {"y": y[0], "dx": dx[0], "d_weight": d_weight[0].to(weight.dtype)}


def add_rms_norm(
    lib: ctypes.CDLL,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dy: Tensor,
    ds: Tensor,
    eps: float,
    offset: float,
    cast: int,
) -> dict[str, Tensor]:
    """Forward and backward of a stream over [m, n]; y of dy's dtype."""
    (m, n), lib.pk_rms_norm_scratch_bytes.restype = x.shape, ctypes.c_int64
    kinds = (
        ((m, n), dy.dtype),
        ((m, n), x.dtype),
        ((m,), torch.float32),
        ((m, n), x.dtype),
        ((n,), torch.float32),
    )
    outs = [guarded(shape, dtype) for shape, dtype in kinds]
    y, s, rstd, d_sum, d_weight = (out for out, _ in outs)
    of = lambda t: CRmsNorm(  # noqa: E731
        pointer(t),
        pointer(weight),
        m,
        n,
        t.stride(0),
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        DTYPES[dy.dtype],
        cast,
        eps,
        offset,
    )
    size = lib.pk_rms_norm_scratch_bytes(i64(m), i64(n), 1)
    scratch, guard = guarded((size // 4,), torch.float32)
    tail, norm, of_s = (pointer(scratch), i64(size), 1), of(x), of(s)
    assert lib.pk_add_rms_norm_fwd_cpu(ctypes.byref(norm), *map(pointer, (residual, s, y, rstd)), *tail) == 0
    assert (
        lib.pk_add_rms_norm_bwd_cpu(ctypes.byref(of_s), *map(pointer, (dy, ds, rstd, d_sum, d_weight)), *tail)
        == 0
    )
    assert (guard == -777.0).all() and all((g == -777.0).all() for _, g in outs)
    return {"y": y, "s": s, "dx": d_sum, "d_residual": d_sum, "d_weight": d_weight.to(weight.dtype)}


def rope(lib: ctypes.CDLL, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> list[Tensor]:
    """q, k [B, H, S, D] contiguous, cos and sin [B or 1, S, Dr]."""
    outs = [guarded(x.shape, x.dtype) for x in (q, k)]
    heads = [
        CRopeHeads(pointer(x), pointer(y), x.shape[1], *x.stride()[:3], *y.stride()[:3])
        for x, (y, _) in zip((q, k), outs, strict=True)
    ]
    sizes = (i64(q.shape[0]), i64(q.shape[2]), i64(q.shape[3]))
    angles = (
        pointer(cos),
        pointer(sin),
        DTYPES[cos.dtype],
        i64(cos.stride(0) if cos.shape[0] > 1 else 0),
        i64(cos.shape[2]),
    )
    assert lib.pk_rope_cpu(*map(ctypes.byref, heads), DTYPES[q.dtype], *sizes, *angles, int(inverse), 1) == 0
    assert all((guard == -777.0).all() for _, guard in outs)
    return [out for out, _ in outs]
