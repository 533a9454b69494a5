"""The AVX-512 level's own code, emulated by SIMDe: proof of its logic on CPUs that lack it (not of its
speed); its linears are in test_avx512_emulated_linear.py. What is exact by contract is compared bit for bit
with the baseline level and with PyTorch, the rest with fp64."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.formats.nf4 import code_tensor, dynamic_map
from peftkern.ops.glu import ACTIVATIONS
from peftkern.ops.rms_norm import CASTS

from ..ops import test_add_rms_norm as test_add_rms_norm_op
from ..ops import test_glu
from ..ops import test_rms_norm as test_rms_norm_op
from ..ops import test_rope as test_rope_op
from ..ops.bounds import assert_as_accurate
from . import compiled_blocks
from .compiled import DTYPES, c_weight, i64, load, once, pointer
from .emulated_linear import FORMATS, LEVELS, THREADS, dropout_mask, use_level
from .emulation import EMULATED, emulated_extension, emulated_library

pytestmark = EMULATED


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(once(tmp_path_factory, "avx512_emulated", emulated_library))


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _dequantize(
    lib: ctypes.CDLL, level: str, weight: NF4Weight, window: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor:
    use_level(lib, level)
    row, rows, col, cols = window
    # what lies behind the output stays as it was
    guard = torch.full((rows * cols + 64,), -777.0, dtype=dtype)
    status = lib.pk_dequantize_4bit_cpu(
        ctypes.byref(c_weight(weight)), *map(i64, window), pointer(guard), DTYPES[dtype], THREADS
    )
    assert status == 0
    assert (guard[rows * cols :] == -777.0).all()
    return guard[: rows * cols]


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_bit_for_bit(lib: ctypes.CDLL, quant: dict, dtype: torch.dtype) -> None:
    """Whole weights, and windows that begin at odd elements, in mid-block, and end before a vector does."""
    for n, k in ((96, 256), (33, 130), (7, 65)):
        weight = NF4Weight.from_dense(torch.randn(n, k) * torch.logspace(-9, 6, n)[:, None], **quant)
        dense = weight.dequantize(dtype).reshape(n, k)
        for window in (
            (0, n, 0, k),
            (1, n - 1, 1, k - 1),
            (2, 3, k // 2, 17),
            (n - 1, 1, k - 1, 1),
            (0, n, 3, 33),
            (3, 2, 0, k),
        ):
            row, rows, col, cols = window
            ours, baseline = (_dequantize(lib, level, weight, window, dtype) for level in reversed(LEVELS))
            assert _equal_bits(ours, baseline), window
            assert _equal_bits(ours, dense[row : row + rows, col : col + cols].reshape(-1)), window


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_codes_at_every_offset(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    """All 256 bytes, read from every starting element: a permutation error of the lookup cannot hide."""
    code = code_tensor("nf4")
    absmax = torch.rand(8) + 0.5
    weight = NF4Weight(
        torch.arange(256, dtype=torch.uint8), code, (1, 512), torch.float32, 64, "nf4", absmax=absmax
    )
    index = torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1).long()
    expected = (code[index] * absmax.repeat_interleave(64)).to(dtype)
    for start in range(0, 140):
        count = 512 - start - (start * 7) % 100
        assert _equal_bits(
            _dequantize(lib, "avx512", weight, (0, 1, start, count), dtype), expected[start : start + count]
        ), start


def test_halves_are_rounded_to_nearest_even(lib: ctypes.CDLL) -> None:
    """One block per absmax: halves' overflow, subnormals, and ties, against PyTorch's conversion."""
    absmax = torch.cat(
        [torch.logspace(-9, 6, 500), 2.0 ** torch.arange(-26, 17), 1.0 + torch.arange(1, 64) * 2.0**-11]
    )
    packed = torch.arange(absmax.numel() * 32, dtype=torch.int64).remainder(251).to(torch.uint8)
    weight = NF4Weight(
        packed, code_tensor("nf4"), (absmax.numel(), 64), torch.float32, 64, "nf4", absmax=absmax
    )
    exact = _dequantize(lib, "avx512", weight, (0, absmax.numel(), 0, 64), torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert _equal_bits(
            _dequantize(lib, "avx512", weight, (0, absmax.numel(), 0, 64), dtype), exact.to(dtype)
        )


def _quantize(lib: ctypes.CDLL, level: str, w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    use_level(lib, level)
    packed = torch.full(((w.numel() + 1) // 2 + 8,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((-(-w.numel() // blocksize) + 8,), -777.0)
    status = lib.pk_quantize_4bit_cpu(
        pointer(w),
        DTYPES[w.dtype],
        i64(w.numel()),
        blocksize,
        pointer(code),
        pointer(packed),
        pointer(absmax),
        THREADS,
    )
    assert status == 0
    assert (packed[-8:] == 0xA5).all() and (absmax[-8:] == -777.0).all()
    return packed[:-8], absmax[:-8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_quantize_bit_for_bit(lib: ctypes.CDLL, dtype: torch.dtype, quant_type: str, blocksize: int) -> None:
    code = code_tensor(quant_type)
    for numel in (1, 15, 64, 97, 4097, 10001):
        w = torch.randn(numel).to(dtype)
        w[numel // 3 : numel // 2] = 0
        ours, baseline = (_quantize(lib, level, w, blocksize, code) for level in reversed(LEVELS))
        assert _equal_bits(ours[0], baseline[0]) and _equal_bits(ours[1], baseline[1]), numel


def test_quantize_thresholds_and_their_neighbours(lib: ctypes.CDLL) -> None:
    """Every midpoint of two codes, one step below and above: a tie goes to the lower code on both levels."""
    code = code_tensor("nf4")
    middle = (code[:-1] + code[1:]) / 2
    values = torch.cat(
        [
            middle,
            torch.nextafter(middle, torch.tensor(2.0)),
            torch.nextafter(middle, torch.tensor(-2.0)),
            torch.ones(19),
        ]
    )
    index = torch.tensor([*range(15), *range(1, 16), *range(15), *[15] * 19], dtype=torch.uint8)
    packed, absmax = _quantize(lib, "avx512", values, 64, code)
    assert absmax.item() == 1.0
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).view(-1), index)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_not_finite(lib: ctypes.CDLL, quant_type: str) -> None:
    """NaN is code 0 wherever in a vector it lies; both levels agree on infinities."""
    code = code_tensor(quant_type)
    w = torch.randn(256)
    w[[0, 5, 70, 95, 130]] = float("nan")
    for level in LEVELS:
        packed, _ = _quantize(lib, level, w, 64, code)
        assert not torch.stack([packed >> 4, packed & 15], 1).view(-1)[w.isnan()].any(), level
    w[200] = float("inf")
    ours, baseline = (_quantize(lib, level, w, 64, code) for level in reversed(LEVELS))
    assert _equal_bits(ours[0], baseline[0]) and _equal_bits(ours[1], baseline[1])


def test_quantize_absmax_bit_for_bit(lib: ctypes.CDLL) -> None:
    code = dynamic_map()
    for count in (1, 31, 256, 257, 5000):
        absmax, results = torch.rand(count) - 0.4, []
        for level in LEVELS:
            use_level(lib, level)
            out, nested = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // 256))
            assert (
                lib.pk_quantize_absmax_cpu(
                    pointer(absmax), i64(count), 256, pointer(code), pointer(out), pointer(nested), THREADS
                )
                == 0
            )
            results.append((out, nested))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1]), count


def test_dropout_mask_bit_for_bit(lib: ctypes.CDLL) -> None:
    for m, k in ((3, 1), (5, 127), (4, 300)):
        ours, baseline = (dropout_mask(lib, level, m, k, 6554, 2**40 + 17) for level in reversed(LEVELS))
        assert torch.equal(ours, baseline)


def _draws(case, ours, plainly, count: int = 20) -> None:
    """Each result of `count` draws together, within the contract's bound; `ours` runs on the emulated
    level."""
    runs = [
        (ours(*args), plainly(*args), plainly(*(t.double() for t in args)))
        for args in (case() for _ in range(count))
    ]
    for name in runs[0][0]:
        assert_as_accurate(name, *(torch.cat([run[i][name].flatten() for run in runs]) for i in range(3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_linear_units(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A row shorter than a vector, and one with a tail; the rest of tests/ops runs nightly."""
    use_level(lib, "avx512")
    for number, name in enumerate(ACTIVATIONS):
        for m, n in ((3, 5), (2, 77)):
            case = lambda m=m, n=n: [(2 * torch.randn(m, n)).to(dtype) for _ in range(3)]  # noqa: E731
            ours = lambda g, u, dy, number=number: compiled_blocks.glu(lib, g, u, dy, number)  # noqa: E731
            _draws(
                case,
                ours,
                lambda g, u, dy, name=name: test_glu._run(lambda g, u: test_glu.ACTS[name](g) * u, g, u, dy),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    use_level(lib, "avx512")
    for cast, offset in test_rms_norm_op.MODES:
        number = CASTS.index(cast)
        for shape in ((5, 13), (33, 150)):
            case = lambda shape=shape: test_rms_norm_op.case(shape, dtype, dtype)  # noqa: E731
            ours = lambda x, w, dy, o=offset, c=number: compiled_blocks.rms_norm(lib, x, w, dy, 1e-5, o, c)  # noqa: E731
            _draws(
                case,
                ours,
                lambda x, w, dy, o=offset, c=cast: test_rms_norm_op.run(
                    test_rms_norm_op.stock, x, w, dy, o, c
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    use_level(lib, "avx512")
    op = test_add_rms_norm_op
    for cast, offset in test_rms_norm_op.MODES:
        number = CASTS.index(cast)
        for shape in ((5, 13), (33, 150)):
            case = lambda shape=shape: op.case(shape, dtype, dtype)  # noqa: E731

            def ours(x, r, w, dy, ds, o=offset, c=number):
                return compiled_blocks.add_rms_norm(lib, x, r, w, dy, ds, 1e-5, o, c)

            _draws(case, ours, lambda *args, o=offset, c=cast: op.run(op.stock, *args, o, c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    use_level(lib, "avx512")

    def ours(q, k, cos, sin, dq, dk):
        q, k = q.contiguous(), k.contiguous()
        names = (("q", "k"), (q, k), False), (("dq", "dk"), (dq, dk), True)
        return {
            name: out
            for keys, x, inv in names
            for name, out in zip(keys, compiled_blocks.rope(lib, *x, cos, sin, inv), strict=True)
        }

    for shape in ((1, 3, 1, 4, 22, 22), (2, 2, 2, 3, 96, 72)):
        _draws(
            lambda shape=shape: test_rope_op.case(shape, dtype),
            ours,
            lambda *a: test_rope_op.run(test_rope_op.stock, *a),
            5,
        )


@pytest.mark.slow
def test_the_ops_own_tests_on_the_emulated_level(tmp_path: Path) -> None:
    """tests/ops as they are, on an extension whose AVX-512 level is emulated: launchers, regimes and bounds
    included."""
    variables = {"PEFTKERN_TEST_EXTENSION": str(emulated_extension(tmp_path)), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.native.emulated_plugin",
        "-p",
        "no:cacheprovider",
        "tests/ops",
        "-k",
        "avx512",
    ]
    root = Path(__file__).parents[2]
    run = subprocess.run(
        command, cwd=root, env=os.environ | variables, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]
