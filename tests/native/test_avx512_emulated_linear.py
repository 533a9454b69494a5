"""The AVX-512 level's linears, emulated by SIMDe, against fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ..ops.bounds import assert_as_accurate
from .compiled import DTYPES, load, once
from .emulated_linear import FORMATS, LEVELS, SHAPES, Case, check_case
from .emulation import EMULATED, emulated_library

pytestmark = EMULATED


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(once(tmp_path_factory, "avx512_emulated", emulated_library))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_by_blocks(lib: ctypes.CDLL, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_case(lib, *shape, dtype, gemv=False)


def test_linear_of_several_row_blocks(lib: ctypes.CDLL) -> None:
    check_case(lib, 530, 60, 300, 4, torch.float32, gemv=False)


def test_bias_gradient_of_many_rows(lib: ctypes.CDLL) -> None:
    case = Case(2048, 64, 64, 1, torch.float32)
    exact, plain = case.dy.double().sum(0), case.dy.sum(0)
    assert_as_accurate("d_bias", case.run(lib, "avx512", gemv=False)["d_bias"], plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 4, 8, 9, 16, 64])
def test_gemv(lib: ctypes.CDLL, m: int, dtype: torch.dtype) -> None:
    check_case(lib, m, 45, 256, 8, dtype, gemv=True)
    check_case(lib, m, 45, 130, 3, dtype, gemv=True)


def test_gemv_of_blocks_that_end_within_a_step(lib: ctypes.CDLL) -> None:
    for m in (1, 2, 3, 4, 7, 8):
        check_case(lib, m, 35, 96, 4, torch.float32, gemv=True, blocksize=32)
        check_case(lib, m, 34, 192, 4, torch.bfloat16, gemv=True, nested=False)


def test_gemv_of_rows_longer_than_a_piece(lib: ctypes.CDLL) -> None:
    check_case(lib, 5, 35, 4096 + 64, 64, torch.float32, gemv=True)
    check_case(lib, 1, 35, 4096 + 70, 256, torch.float32, gemv=True)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("gemv", [True, False])
def test_formats(lib: ctypes.CDLL, quant: dict, gemv: bool) -> None:
    check_case(lib, 6, 70, 384, 4, torch.float32, gemv=gemv, **quant)


@pytest.mark.parametrize("gemv", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_and_a_dense_base(lib: ctypes.CDLL, gemv: bool, dtype: torch.dtype) -> None:
    check_case(lib, 19, 70, 200, 8, dtype, gemv=gemv, dropout=6554)
    check_case(lib, 19, 70, 200, 8, dtype, gemv=gemv, dropout=32768, bias=False)
    check_case(lib, 19, 70, 200, 8, dtype, gemv=gemv, dense=True)


def test_two_threads(lib: ctypes.CDLL) -> None:
    """Two threads give the bits one gives, on either level: no sum depends on who computes it."""
    case = Case(70, 97, 300, 8, torch.bfloat16, dropout=6554)
    for level in LEVELS:
        case.threads = 1
        alone = case.run(lib, level, gemv=False)
        case.threads = 2
        together = case.run(lib, level, gemv=False)
        for name in alone:
            assert torch.equal(alone[name], together[name]), f"{level} {name}"
