"""The C functions of the decoder layer's small ops: struct sizes, and what they answer to bad arguments."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from peftkern.runtime import backends

from .compiled import CSRC, i64, load, pointer
from .compiled_blocks import STRUCTS, CGlu, CGluGrad, CRmsNorm, CRopeHeads

OK, NULL, SHAPE, DTYPE, SCRATCH = 0, 1, 2, 3, 5
M, N = 3, 8
BUFFER = torch.zeros(1024)
AT = pointer(BUFFER)


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return load(Path(backends.native().__file__))


def test_structs_match_the_header(tmp_path: Path) -> None:
    source, header = tmp_path / "sizes.c", CSRC / "include" / "peftkern.h"
    sizes = ", ".join(f"sizeof({name})" for name in STRUCTS)
    formats = " ".join(["%zu"] * len(STRUCTS))
    source.write_text(
        f'#include <stdio.h>\n#include "{header}"\nint main(void) {{ printf("{formats}", {sizes}); '
        f"return 0; }}\n"
    )
    subprocess.run(
        [os.environ.get("CC", "cc"), str(source), "-o", str(tmp_path / "sizes")], check=True, timeout=60
    )
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    assert list(map(int, printed)) == [ctypes.sizeof(struct) for struct in STRUCTS.values()]


def _glu(lib: ctypes.CDLL, *, m=M, n=N, dtype=0, activation=0, backward=False, dy=AT, h=AT, **fields) -> int:
    good = {
        "gate": AT,
        "up": AT,
        "ld_gate": n,
        "ld_up": n,
        "d_gate": AT,
        "d_up": AT,
        "ld_d_gate": n,
        "ld_d_up": n,
    } | fields
    operands, grads = (struct(*(good[name] for name, _ in struct._fields_)) for struct in (CGlu, CGluGrad))
    sizes = (dtype, i64(m), i64(n), activation)
    if not backward:
        return lib.pk_glu_fwd_cpu(ctypes.byref(operands), *sizes, h, 1)
    return lib.pk_glu_bwd_cpu(ctypes.byref(operands), ctypes.byref(grads), *sizes, dy, h, 1)


def test_glu_refuses(lib: ctypes.CDLL) -> None:
    for backward in (False, True):
        assert [
            _glu(lib, backward=backward),
            _glu(lib, backward=backward, m=0),
            _glu(lib, backward=backward, n=0),
        ] == [OK] * 3
        assert [_glu(lib, backward=backward, gate=None), _glu(lib, backward=backward, up=None)] == [NULL] * 2
        bad = [{"m": -1}, {"n": -1}, {"activation": 3}, {"activation": -1}, {"ld_gate": N - 1}, {"ld_up": 0}]
        assert [_glu(lib, backward=backward, **change) for change in bad] == [SHAPE] * 6
        assert [_glu(lib, backward=backward, dtype=d) for d in (-1, 3)] == [DTYPE] * 2
    assert _glu(lib, h=None) == NULL and _glu(lib, backward=True, h=None) == OK
    assert [_glu(lib, backward=True, **{name: None}) for name in ("dy", "d_gate", "d_up")] == [NULL] * 3
    assert [_glu(lib, backward=True, **{name: N - 1}) for name in ("ld_d_gate", "ld_d_up")] == [SHAPE] * 2
    assert lib.pk_glu_fwd_cpu(None, 0, i64(M), i64(N), 0, AT, 1) == NULL
    assert lib.pk_glu_bwd_cpu(ctypes.byref(CGlu(AT, AT, N, N)), None, 0, i64(M), i64(N), 0, AT, AT, 1) == NULL


_NORM = {
    "x": AT,
    "weight": AT,
    "m": M,
    "n": N,
    "ld_x": N,
    "dtype": 0,
    "weight_dtype": 0,
    "y_dtype": 0,
    "cast": 0,
    "eps": 1e-6,
    "offset": 0.0,
}


def _scratch(lib: ctypes.CDLL, with_d_weight: bool) -> int:
    lib.pk_rms_norm_scratch_bytes.restype = ctypes.c_int64
    return lib.pk_rms_norm_scratch_bytes(i64(M), i64(N), int(with_d_weight))


def _norm(
    lib: ctypes.CDLL, backward: bool, *, out=AT, rstd=AT, scratch=AT, size=4096, d_weight=None, **fields
) -> int:
    norm = ctypes.byref(CRmsNorm(**(_NORM | fields)))
    if backward:
        return lib.pk_rms_norm_bwd_cpu(norm, out, rstd, AT, d_weight, scratch, i64(size), 1)
    return lib.pk_rms_norm_fwd_cpu(norm, out, rstd, scratch, i64(size), 1)


@pytest.mark.parametrize("backward", [False, True])
def test_rms_norm_refuses(lib: ctypes.CDLL, backward: bool) -> None:
    assert [_norm(lib, backward), _norm(lib, backward, m=0), _norm(lib, backward, dtype=1, y_dtype=1)] == [
        OK
    ] * 3
    assert [_norm(lib, backward, **{name: None}) for name in ("x", "weight", "out", "rstd", "scratch")] == [
        NULL
    ] * 5
    assert [
        _norm(lib, backward, **change)
        for change in ({"m": -1}, {"n": 0}, {"ld_x": N - 1}, {"cast": 2}, {"cast": -1})
    ] == [SHAPE] * 5
    assert [_norm(lib, backward, **{name: 3}) for name in ("dtype", "weight_dtype", "y_dtype")] == [DTYPE] * 3
    assert _norm(lib, backward, dtype=1, y_dtype=2) == DTYPE
    assert [_norm(lib, backward, size=_scratch(lib, False) - short) for short in (1, 0)] == [SCRATCH, OK]
    if backward:
        assert [_norm(lib, True, d_weight=AT, size=_scratch(lib, True) - short) for short in (1, 0)] == [
            SCRATCH,
            OK,
        ]


def _add_norm(
    lib: ctypes.CDLL,
    backward: bool,
    *,
    first=AT,
    second=AT,
    third=AT,
    rstd=AT,
    scratch=AT,
    size=4096,
    d_weight=None,
    **fields,
) -> int:
    """first, second, third: residual, s, y forward; dy, ds, d_sum backward."""
    norm = ctypes.byref(CRmsNorm(**(_NORM | fields)))
    if backward:
        return lib.pk_add_rms_norm_bwd_cpu(norm, first, second, rstd, third, d_weight, scratch, i64(size), 1)
    return lib.pk_add_rms_norm_fwd_cpu(norm, first, second, third, rstd, scratch, i64(size), 1)


@pytest.mark.parametrize("backward", [False, True])
def test_add_rms_norm_refuses(lib: ctypes.CDLL, backward: bool) -> None:
    assert [
        _add_norm(lib, backward),
        _add_norm(lib, backward, m=0),
        _add_norm(lib, backward, dtype=1, y_dtype=1),
    ] == [OK] * 3
    names = ("x", "weight", "first", "second", "third", "rstd", "scratch")
    assert [_add_norm(lib, backward, **{name: None}) for name in names] == [NULL] * 7
    bad = ({"m": -1}, {"n": 0}, {"ld_x": N - 1}, {"cast": 2}, {"cast": -1})
    assert [_add_norm(lib, backward, **change) for change in bad] == [SHAPE] * 5
    assert [_add_norm(lib, backward, **{name: 3}) for name in ("dtype", "weight_dtype", "y_dtype")] == [
        DTYPE
    ] * 3
    assert [_add_norm(lib, backward, size=_scratch(lib, False) - short) for short in (1, 0)] == [SCRATCH, OK]
    if backward:
        assert [_add_norm(lib, True, d_weight=AT, size=_scratch(lib, True) - short) for short in (1, 0)] == [
            SCRATCH,
            OK,
        ]
        assert _add_norm(lib, True, d_weight=AT, m=0) == SHAPE


def _rope(
    lib: ctypes.CDLL,
    *,
    k=None,
    dtype=0,
    batch=1,
    seq=2,
    dim=8,
    cos=AT,
    sin=AT,
    angle_dtype=0,
    rotary=8,
    **fields,
) -> int:
    q = CRopeHeads(
        **{"x": AT, "y": AT, "heads": 2, "x_head": 16, "x_seq": 8, "y_head": 16, "y_seq": 8} | fields
    )
    sizes = (i64(batch), i64(seq), i64(dim))
    return lib.pk_rope_cpu(
        ctypes.byref(q),
        ctypes.byref(k or CRopeHeads()),
        dtype,
        *sizes,
        cos,
        sin,
        angle_dtype,
        i64(0),
        i64(rotary),
        0,
        1,
    )


def test_rope_refuses(lib: ctypes.CDLL) -> None:
    assert [_rope(lib), _rope(lib, batch=0), _rope(lib, seq=0), _rope(lib, rotary=0, cos=None, sin=None)] == [
        OK
    ] * 4
    assert [_rope(lib, **{name: None}) for name in ("x", "y", "cos", "sin")] == [NULL] * 4
    assert _rope(lib, k=CRopeHeads(heads=1)) == NULL
    bad = [
        {"rotary": 10},
        {"rotary": 7},
        {"rotary": -2},
        {"batch": -1},
        {"seq": -1},
        {"dim": -8},
        {"heads": -1},
    ]
    assert [_rope(lib, **change) for change in bad] == [SHAPE] * 7
    assert [_rope(lib, dtype=3), _rope(lib, angle_dtype=-1)] == [DTYPE] * 2
