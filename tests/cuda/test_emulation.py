"""The emulator itself: known kernels give known results, and faulty ones are found out."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from ..native.compiled import pointer

OK, CUDA = 0, 64


@pytest.fixture
def lib(selftest: ctypes.CDLL, order: int):
    selftest.pk_emulation_order(order)
    yield selftest
    selftest.pk_emulation_order(0)


def _error(lib: ctypes.CDLL) -> str:
    return lib.pk_cuda_error_text().decode()


def _sum(lib: ctypes.CDLL, barrier: bool) -> tuple[Tensor, Tensor]:
    x = torch.arange(3 * 128, dtype=torch.float32)
    out = torch.full((3,), float("nan"))
    assert lib.selftest_sum(pointer(x), pointer(out), 3, barrier) == OK, _error(lib)
    return out, x.view(3, 128).sum(1)


def test_a_block_sums_by_shuffles_and_shared_memory(lib: ctypes.CDLL) -> None:
    got, expected = _sum(lib, barrier=True)
    assert torch.equal(got, expected)


def test_a_missing_barrier_reads_poison_in_some_order(selftest: ctypes.CDLL) -> None:
    wrong = 0
    for order in (0, 1, 2, 3):
        selftest.pk_emulation_order(order)
        got, expected = _sum(selftest, barrier=False)
        wrong += not torch.equal(got, expected)
    selftest.pk_emulation_order(0)
    assert wrong


def _ring(lib: ctypes.CDLL, barrier: bool) -> tuple[Tensor, Tensor]:
    x, out = torch.randn(96), torch.full((96,), float("nan"))
    assert lib.selftest_ring(pointer(x), pointer(out), 96, 5, barrier, ctypes.c_int64(4 * 96)) == OK, _error(
        lib
    )
    return out, x.roll(-5)


def test_barriers_in_a_loop(lib: ctypes.CDLL) -> None:
    got, expected = _ring(lib, barrier=True)
    assert torch.equal(got, expected)


def test_a_buffer_overwritten_too_early_shows_in_every_order(lib: ctypes.CDLL) -> None:
    got, expected = _ring(lib, barrier=False)
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("fault", range(4))
def test_a_barrier_that_not_all_threads_reach_is_an_error(lib: ctypes.CDLL, fault: int) -> None:
    assert lib.selftest_divergent(fault) == CUDA
    words = "lacks the lane itself" if fault == 3 else "not all threads reach"
    assert words in _error(lib)
    assert lib.selftest_divergent(9) == OK  # the error was of that launch alone


def test_shuffles_and_votes(lib: ctypes.CDLL) -> None:
    x = torch.randint(0, 1000, (64,), dtype=torch.int32)
    got = torch.full((7, 64), -1, dtype=torch.int32)
    assert lib.selftest_shuffle(pointer(x), pointer(got)) == OK, _error(lib)
    lane, base = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    vote = torch.tensor([sum(int(x[32 * w + i] & 1) << i for i in range(32)) for w in range(2)])
    expected = [
        x[base + 7],
        x[base + (lane ^ 5)],
        x[base + torch.where(lane % 8 + 3 < 8, lane + 3, lane)],
        x[base + torch.where(lane >= 2, lane - 2, lane)],
        x[base + lane // 4 * 4 + 1],
        vote[base // 32].to(torch.int32),
        x[base + (lane ^ 1)],
    ]
    for row, values in zip(got, expected, strict=True):
        assert torch.equal(row, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_against_a_triple_loop(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Small integers, so that every order of sums gives the same bits."""
    a, b = torch.randint(-9, 10, (16, 16)).to(dtype), torch.randint(-9, 10, (8, 16)).to(dtype)
    c = torch.randint(-9, 10, (16, 8)).float()
    expected = c.clone()
    for i in range(16):
        for j in range(8):
            for k in range(16):
                expected[i, j] += a[i, k].float() * b[j, k].float()
    assert lib.selftest_mma(pointer(a), pointer(b), pointer(c), dtype == torch.bfloat16) == OK, _error(lib)
    assert torch.equal(c, expected)


def _pipeline(lib: ctypes.CDLL, fault: int) -> tuple[Tensor, Tensor]:
    a, b = torch.randint(-9, 10, (16, 16)).bfloat16(), torch.randint(-9, 10, (16, 8)).bfloat16()
    c = torch.full((16, 8), float("nan"))
    assert lib.selftest_pipeline(pointer(a), pointer(b), pointer(c), fault) == OK, _error(lib)
    if fault == 3:
        b[8:] = 0
    return c, a.float() @ b.float()


@pytest.mark.parametrize("fault", [0, 3])
def test_copies_fragments_and_product_together(lib: ctypes.CDLL, fault: int) -> None:
    """Case 3 leaves out the copies of half the rows, which are zeros then."""
    got, expected = _pipeline(lib, fault)
    assert torch.equal(got, expected)


def test_a_copy_not_waited_for_is_poison(lib: ctypes.CDLL) -> None:
    got, _ = _pipeline(lib, 1)
    assert got.isnan().all()


def test_misaligned_and_oversized_are_errors(lib: ctypes.CDLL) -> None:
    buffer = torch.zeros(64, dtype=torch.uint8)
    for stores, words in ((False, "multiple of 16"), (True, "misaligned address")):
        assert lib.selftest_misaligned(pointer(buffer), pointer(buffer), stores) == CUDA
        assert words in _error(lib)
    x = torch.zeros(32)
    assert lib.selftest_ring(pointer(x), pointer(x), 32, 1, True, ctypes.c_int64(99 * 1024)) == OK
    assert lib.selftest_ring(pointer(x), pointer(x), 32, 1, True, ctypes.c_int64(99 * 1024 + 1)) == CUDA
    assert lib.selftest_ring(pointer(x), pointer(x), 1025, 1, True, ctypes.c_int64(4096)) == CUDA
    assert "invalid configuration" in _error(lib)


def test_packing_rounds_to_nearest_even(lib: ctypes.CDLL) -> None:
    """Every exponent, ties in both directions, subnormals, infinities and NaN, against PyTorch's rounding."""
    bits = torch.arange(0, 1 << 32, 65521 * 7, dtype=torch.int64)
    ties = torch.cat(
        [
            torch.arange(1 << 16) << 16 | 0x8000,
            torch.arange(1 << 16) << 16 | 0x1000 | 0x2000 * (torch.arange(1 << 16) & 1),
        ]
    )
    x = (
        torch.cat([bits, ties])[: -1 if (len(bits) + len(ties)) % 2 else None]
        .to(torch.int32)
        .view(torch.float32)
    )
    out = torch.empty(len(x), dtype=torch.int32)
    assert lib.selftest_pack(pointer(x), pointer(out), len(x) // 2) == OK, _error(lib)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        got, expected = out[column::2].contiguous().view(dtype), x.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(got[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_byte_permute_takes_any_byte(selftest: ctypes.CDLL) -> None:
    selftest.selftest_prmt.restype = ctypes.c_uint32
    for selector, expected in (
        (0x3210, 0x33221100),
        (0x7654, 0x77665544),
        (0x0246, 0x00224466),
        (0x5140, 0x55114400),
    ):
        assert (
            selftest.selftest_prmt(ctypes.c_uint32(0x33221100), ctypes.c_uint32(0x77665544), selector)
            == expected
        )
