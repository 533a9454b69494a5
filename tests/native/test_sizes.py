"""Sizes at the edges of 64 bits, empty sizes, and scratch at any byte: a status or the right result, never
the process's end."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkern import NF4Weight
from peftkern.runtime import backends

from .compiled import CSRC, CWeight, c_lora, c_weight, i64, load, pointer
from .compiled_blocks import CRmsNorm

OK, NULL, SHAPE = range(3)
EDGES = (0, -1, 2**31, 2**47, 2**62, 2**63 - 1, -(2**63))
# Of the interface: csrc/include/peftkern.h and the signatures in csrc/bindings.cpp. Who changes either raises
# PEFTKERN_ABI_VERSION, with
# backends.ABI_VERSION, and puts the new digest here: an extension of an earlier checkout is then named as
# such, not called.
INTERFACES = {14: "745d9a6c602b5a8e"}


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    lib = load(Path(backends.native().__file__))
    for name in ("pk_lora_scratch_bytes", "pk_rms_norm_scratch_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    return lib


def _interface() -> str:
    header = re.sub(r"/\*.*?\*/", "", (CSRC / "include/peftkern.h").read_text(), flags=re.DOTALL)
    bound = re.findall(
        r"(m\.def\(|py::init<|py::init\(|m\.attr\()([^{;]*)", (CSRC / "bindings.cpp").read_text()
    )
    words = " ".join([header, *("".join(part) for part in bound)])
    # Where lines break says nothing: white space counts between two words alone.
    words = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"\s+", " ", words))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def test_the_interface_has_a_version_of_its_own(lib: ctypes.CDLL) -> None:
    declared = int(
        re.search(r"define PEFTKERN_ABI_VERSION (\d+)", (CSRC / "include/peftkern.h").read_text())[1]
    )
    assert declared == backends.ABI_VERSION == lib.pk_abi_version()
    assert _interface() == INTERFACES.get(declared), (
        "the interface changed: raise its version (see the comment of INTERFACES)"
    )


# In a process of its own, as a signal would end it: every edge in every size of what says how much scratch is
# needed.
SCRATCH = """
import itertools, sys
from tests.native.test_sizes import EDGES, i64, load, Path, ctypes
lib = load(Path(sys.argv[1]))
for name in ("pk_qlora_linear_scratch_bytes", "pk_lora_scratch_bytes"):
    good = (4, 8, 16, 2)
    getattr(lib, name).restype = ctypes.c_int64
    for at, value in itertools.product(range(4), EDGES):
        sizes = [*good[:at], value, *good[at + 1:]]
        print(name, at, value, getattr(lib, name)(*map(i64, sizes), 2))
lib.pk_rms_norm_scratch_bytes.restype = ctypes.c_int64
for m, n in itertools.product(EDGES, EDGES):
    print("norm", m, n, lib.pk_rms_norm_scratch_bytes(i64(m), i64(n), 1))
"""


def test_scratch_of_impossible_sizes_is_nothing() -> None:
    command = [sys.executable, "-c", SCRATCH, backends.native().__file__]
    done = subprocess.run(command, cwd=CSRC.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 4 * len(EDGES) + len(EDGES) ** 2
    for *_, value, size in lines:
        assert 0 <= int(size) < 2**60
        assert int(size) == 0 or 0 <= int(value) <= 2**47


@pytest.mark.parametrize("level", backends.native().isas())
def test_edges_of_every_size_are_refused(lib: ctypes.CDLL, level: str) -> None:
    """With good pointers to little memory: what is not refused would be read."""
    before = lib.pk_isa()
    assert lib.pk_set_isa(level.encode()) == OK
    try:
        for call, count in _CALLS.values():
            for at, value in itertools.product(range(count), (-1, 2**62, 2**63 - 1, -(2**63))):
                assert call(lib, **{"abcd"[at]: value}) == SHAPE, (call, at, value)
    finally:
        lib.pk_set_isa(before)


_MEMORY = torch.zeros(1 << 16)
_AT = pointer(_MEMORY)


def _weight(n: int, k: int) -> CWeight:
    return CWeight(data=_AT, n=n, k=k, dtype=0)


def _linear(lib: ctypes.CDLL, a: int = 4, b: int = 8, c: int = 16) -> int:
    low, w = c_lora(None, None), _weight(b, c)
    args = (_AT, 0, i64(a), pointer(None), 0, _AT, _AT, 0, _AT, i64(1 << 18), 1)
    return lib.pk_qlora_linear_fwd_cpu(ctypes.byref(w), ctypes.byref(low), *args)


def _low_rank(lib: ctypes.CDLL, a: int = 4, b: int = 8, c: int = 16) -> int:
    low = c_lora(torch.zeros(2, 16), torch.zeros(8, 2))
    args = (_AT, 0, i64(a), i64(b), i64(c), pointer(None), 0, _AT, _AT, _AT, i64(1 << 18), 1)
    return lib.pk_lora_fwd_cpu(ctypes.byref(low), *args)


def _window(lib: ctypes.CDLL, a: int = 0, b: int = 8, c: int = 0, d: int = 64) -> int:
    w = c_weight(_WEIGHT)
    return lib.pk_dequantize_4bit_cpu(ctypes.byref(w), i64(a), i64(b), i64(c), i64(d), _AT, 0, 1)


def _norm(lib: ctypes.CDLL, a: int = 4, b: int = 8, c: int = 8) -> int:
    norm = CRmsNorm(x=_AT, weight=_AT, m=a, n=b, ld_x=c, eps=1e-6)
    return lib.pk_rms_norm_fwd_cpu(ctypes.byref(norm), _AT, _AT, _AT, i64(1 << 18), 1)


def _mask(lib: ctypes.CDLL, a: int = 4, b: int = 8) -> int:
    return lib.pk_dropout_mask_cpu(i64(a), i64(b), 10, ctypes.c_uint64(1), _AT, 1)


def _columns(lib: ctypes.CDLL, a: int = 4, b: int = 8) -> int:
    return lib.pk_scale_columns_fwd_cpu(_AT, 0, i64(a), i64(b), _AT, pointer(None), _AT, 1)


def _quantize(lib: ctypes.CDLL, a: int = 64) -> int:
    return lib.pk_quantize_4bit_cpu(_AT, 0, i64(a), 64, _AT, _AT, _AT, 1)


_WEIGHT = NF4Weight.from_dense(torch.randn(8, 64))
_CALLS = {
    c.__name__: (c, count)
    for c, count in (
        (_linear, 3),
        (_low_rank, 3),
        (_window, 4),
        (_norm, 3),
        (_mask, 2),
        (_columns, 2),
        (_quantize, 1),
    )
}


def test_nothing_to_do_is_done(lib: ctypes.CDLL) -> None:
    assert [_linear(lib, a=0), _linear(lib, b=0), _low_rank(lib, a=0), _low_rank(lib, b=0)] == [OK] * 4
    assert [_linear(lib, c=0), _low_rank(lib, c=0)] == [SHAPE] * 2, "without in_features there is no product"
    assert [_window(lib, b=0), _window(lib, d=0), _mask(lib, a=0), _mask(lib, b=0), _columns(lib, a=0)] == [
        OK
    ] * 5


def test_threads_beyond_reason_are_bounded(lib: ctypes.CDLL) -> None:
    most = lib.pk_qlora_linear_scratch_bytes(i64(4), i64(8), i64(16), i64(2), 2**31 - 1)
    assert most == lib.pk_qlora_linear_scratch_bytes(i64(4), i64(8), i64(16), i64(2), 4096)


@pytest.mark.parametrize("m", [3, 40])
def test_scratch_may_begin_at_any_byte(lib: ctypes.CDLL, isa: str, m: int) -> None:
    x, w, (a, b) = torch.randn(m, 64), _WEIGHT, (torch.randn(5, 64), torch.randn(8, 5))
    size = lib.pk_qlora_linear_scratch_bytes(i64(m), i64(8), i64(64), i64(5), 1)
    results = []
    for offset in (0, 1, 2, 7, 63):
        guard = torch.full((size + offset + 64,), 0xA5, dtype=torch.uint8)
        y, xa, dx, d_a, dyb = (
            torch.empty(m, 8),
            torch.empty(m, 5),
            torch.empty(m, 64),
            torch.empty(5, 64),
            torch.empty(m, 5),
        )
        scratch = (ctypes.c_void_p(guard.data_ptr() + offset), i64(size), 1)
        view, low = c_weight(w), c_lora(a, b)
        heads = ctypes.byref(view), ctypes.byref(low)
        assert (
            lib.pk_qlora_linear_fwd_cpu(
                *heads, pointer(x), 0, i64(m), pointer(None), 0, pointer(y), pointer(xa), 0, *scratch
            )
            == OK
        )
        outputs = (pointer(dyb), pointer(dx), pointer(d_a), pointer(None), pointer(None))
        assert (
            lib.pk_qlora_linear_bwd_cpu(
                *heads, pointer(y), pointer(x), 0, i64(m), pointer(xa), *outputs, *scratch
            )
            == OK
        )
        assert bool((guard[:offset] == 0xA5).all()) and bool((guard[offset + size :] == 0xA5).all())
        results.append((y, xa, dx, d_a))
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))
