"""What the C functions of attention refuse, before anything is read or written."""

from __future__ import annotations

import ctypes

import pytest
import torch

from peftkern.runtime import backends

from .compiled_attention import Attention, Grad, Heads, attention, exact_attention, heads

OK, NULL, SHAPE, SCRATCH, ISA = 0, 1, 2, 5, 6
SIZES = dict(batch=1, heads=2, kv_heads=1, seq=4, keys=4, dim=8)
AT = 4096  # never read: no call is right


@pytest.fixture
def lib():
    """The extension itself, as a library of C functions, on a level that has the kernel."""
    level = next((level for level in backends.native().isas() if level in ("avx512bf16", "amx")), None)
    if level is None:
        pytest.skip("no bf16 products here")
    loaded = ctypes.CDLL(backends.native().__file__)
    if not hasattr(loaded, "pk_attention_fwd_cpu"):
        pytest.skip("the extension does not show its C functions")
    before = backends.native().isa()
    loaded.pk_set_isa(level.encode())
    yield loaded
    loaded.pk_set_isa(before.encode())


def call(**changes) -> Attention:
    place = Heads(AT, 64, 32, 8)
    sizes = SIZES | {name: value for name, value in changes.items() if name in SIZES}
    found = Attention(place, place, place, *sizes.values(), 0.5, 0, None, 0, 0)
    for name, value in changes.items():
        if name not in SIZES:
            setattr(found, name, Heads(*value) if isinstance(value, tuple) else value)
    return found


def forward(lib: ctypes.CDLL, of: Attention | None, *, y: int | None = AT, lse=AT, scratch=AT, size=0) -> int:
    place = Heads(y, 64, 32, 8)
    return lib.pk_attention_fwd_cpu(
        None if of is None else ctypes.byref(of),
        ctypes.byref(place),
        ctypes.c_void_p(lse),
        ctypes.c_void_p(scratch),
        ctypes.c_int64(size),
        1,
    )


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"dim": 0}, SHAPE),
        ({"dim": 257}, SHAPE),
        ({"heads": 3, "kv_heads": 2}, SHAPE),
        ({"kv_heads": 0}, SHAPE),
        ({"seq": -1}, SHAPE),
        ({"seq": 2**62}, SHAPE),
        ({"keys": 2**46, "seq": 2**46}, SHAPE),
        ({"batch": 2**62, "heads": 4}, SHAPE),
        ({"scale": 0.0}, SHAPE),
        ({"scale": float("nan")}, SHAPE),
        ({"causal": 1, "keys": 5}, SHAPE),
        ({"q": (AT, 64, 2**62, 8)}, SHAPE),
        ({"k": (None, 64, 32, 8)}, NULL),
        ({"v": (None, 64, 32, 8)}, NULL),
        ({}, SCRATCH),
    ],
    ids=str,
)
def test_what_is_refused(lib: ctypes.CDLL, changes: dict, status: int) -> None:
    of = call(**changes)
    assert forward(lib, of) == status
    lib.pk_attention_scratch_bytes.restype = ctypes.c_int64
    assert (lib.pk_attention_scratch_bytes(ctypes.byref(of), 1, 1) > 0) == (status == SCRATCH)
    grad = Grad(*[Heads(AT, 64, 32, 8)] * 5)
    size, at = ctypes.c_int64(0), ctypes.c_void_p(AT)
    assert lib.pk_attention_bwd_cpu(ctypes.byref(of), ctypes.byref(grad), at, at, size, 1) == status


def test_pointers_that_are_missing(lib: ctypes.CDLL) -> None:
    plenty = 1 << 30
    assert forward(lib, None) == NULL and forward(lib, call(), scratch=None, size=plenty) == NULL
    assert forward(lib, call(), y=None, size=plenty) == NULL
    assert forward(lib, call(), lse=None, size=plenty) == NULL
    for missing in range(5):
        places = [Heads(None if i == missing else AT, 64, 32, 8) for i in range(5)]
        grad, at = Grad(*places), ctypes.c_void_p(AT)
        of = call()
        got = lib.pk_attention_bwd_cpu(
            ctypes.byref(of), ctypes.byref(grad), at, at, ctypes.c_int64(plenty), 1
        )
        assert got == NULL


def test_a_level_without_the_kernel(lib: ctypes.CDLL) -> None:
    lib.pk_set_isa(b"baseline")
    assert not lib.pk_attention_served() and forward(lib, call(), size=1 << 30) == ISA


def test_through_the_c_abi(lib: ctypes.CDLL) -> None:
    inputs = heads((2, 4, 2, 50, 50, 24))
    got, exact = attention(lib, backends.native().isa(), inputs, None), exact_attention(inputs, None)
    for name, value in got.items():
        assert (value.double() - exact[name]).norm() < 2**-8 * exact[name].norm(), name
    assert torch.isfinite(got["y"]).all()
