"""Sums of two tensors on every level: torch's bits, subnormal numbers too; nothing behind them is written."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from peftkern.runtime import backends

from .compiled import DTYPES, i64, load, pointer
from .compiled_blocks import guarded

OK, NULL, SHAPE, DTYPE = 0, 1, 2, 3


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return load(Path(backends.native().__file__))


def _numbers(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of every size down to the subnormal ones, with zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    least = torch.finfo(dtype).smallest_normal
    sizes = torch.tensor([1.0, 1e-3, 100.0, least, 0.3 * least, 0.0])
    chosen = torch.randint(len(sizes), (count // 40 + 1,), generator=generator)  # often 40 of a size together
    numbers = torch.randn(count, generator=generator) * sizes[chosen].repeat_interleave(40)[:count]
    numbers[3::97], numbers[5::89] = torch.inf, torch.nan
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("count", [1, 15, 16, 63, 64, 100, 2047, 2048, 2049, 40_000])
def test_bits_are_those_of_torch(isa: str, lib: ctypes.CDLL, count: int, dtype: torch.dtype) -> None:
    x, y = (_numbers(count, dtype, seed) for seed in (0, 1))
    out, guard = guarded((count,), dtype)
    for threads in (1, 2):
        out.fill_(torch.nan)
        status = lib.pk_add_cpu(pointer(x), pointer(y), DTYPES[dtype], i64(count), pointer(out), threads)
        assert status == OK and torch.equal(guard, torch.full_like(guard, -777.0))
        torch.testing.assert_close(out, x + y, rtol=0, atol=0, equal_nan=True)
    for held in (x, y):  # in place
        total = held.clone()
        others = (pointer(y) if held is x else pointer(x), pointer(total))
        assert lib.pk_add_cpu(*others, DTYPES[dtype], i64(count), pointer(total), 2) == OK
        torch.testing.assert_close(total, x + y, rtol=0, atol=0, equal_nan=True)


def test_refuses(lib: ctypes.CDLL) -> None:
    buffer = torch.zeros(8)
    at = pointer(buffer)
    assert (
        lib.pk_add_cpu(at, at, 0, i64(8), at, 1) == OK
        and lib.pk_add_cpu(None, None, 0, i64(0), None, 1) == OK
    )
    for i in range(3):
        x, y, out = (None if i == j else at for j in range(3))
        assert lib.pk_add_cpu(x, y, 0, i64(8), out, 1) == NULL
    assert [lib.pk_add_cpu(at, at, 0, i64(count), at, 1) for count in (-1, 2**62)] == [SHAPE] * 2
    assert [lib.pk_add_cpu(at, at, dtype, i64(8), at, 1) for dtype in (-1, 3)] == [DTYPE] * 2
