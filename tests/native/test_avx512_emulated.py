"""The AVX-512 level's own code, emulated by SIMDe: proof of its logic on CPUs that lack it (not of its
speed). What is exact by contract is compared bit for bit with the baseline level and with PyTorch, the rest
with fp64."""

from __future__ import annotations

import ctypes
import os
import platform
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
from ..ops.bounds import FACTOR, assert_as_accurate, products_of_many_rows, relative_norm
from . import compiled_blocks
from .compiled import DTYPES, c_lora, c_weight, i64, load, once, pointer
from .emulation import MISSING, emulated_extension, emulated_library, simde_missing

pytestmark = [
    pytest.mark.skipif(simde_missing(), reason=MISSING),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"),
        reason="the dispatcher has an AVX-512 level on x86-64 only",
    ),
]
LEVELS = ("baseline", "avx512")
THREADS = 1  # the emulation is slow enough; test_two_threads takes two
FORMATS = [
    {},
    {"nested": False},
    {"quant_type": "fp4"},
    {"blocksize": 32},
    {"blocksize": 4096},
    {"blocksize": 128, "nested": False},
]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(once(tmp_path_factory, "avx512_emulated", emulated_library))


def _level(lib: ctypes.CDLL, name: str) -> None:
    assert lib.pk_set_isa(name.encode()) == 0 and lib.pk_isa() == name.encode()


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _dequantize(
    lib: ctypes.CDLL, level: str, weight: NF4Weight, window: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor:
    _level(lib, level)
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
    _level(lib, level)
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
            _level(lib, level)
            out, nested = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // 256))
            assert (
                lib.pk_quantize_absmax_cpu(
                    pointer(absmax), i64(count), 256, pointer(code), pointer(out), pointer(nested), THREADS
                )
                == 0
            )
            results.append((out, nested))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1]), count


def _mask(lib: ctypes.CDLL, level: str, m: int, k: int, threshold: int, seed: int) -> Tensor:
    _level(lib, level)
    mask = torch.empty(m, k)
    assert (
        lib.pk_dropout_mask_cpu(i64(m), i64(k), threshold, ctypes.c_uint64(seed), pointer(mask), THREADS) == 0
    )
    return mask


def test_dropout_mask_bit_for_bit(lib: ctypes.CDLL) -> None:
    for m, k in ((3, 1), (5, 127), (4, 300)):
        ours, baseline = (_mask(lib, level, m, k, 6554, 2**40 + 17) for level in reversed(LEVELS))
        assert torch.equal(ours, baseline)


class Case:
    """One linear with every input; `dropout` is a threshold out of 65536."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype,
        *,
        dropout: int = 0,
        bias: bool = True,
        dense: bool = False,
        **quant,
    ) -> None:
        w = torch.randn(n, k) * 0.05
        self.m, self.n, self.k, self.r, self.dtype, self.dropout, self.seed = (
            m,
            n,
            k,
            r,
            dtype,
            dropout,
            2**33 + 5,
        )
        self.weight = w.to(dtype) if dense else NF4Weight.from_dense(w, **quant)
        self.x, self.dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        self.a, self.b = (torch.randn(r, k) / k**0.5).to(dtype), (torch.randn(n, r) * 0.1).to(dtype)
        self.bias = torch.randn(n).to(dtype) if bias else None
        self.scaling, self.threads = 0.75, THREADS

    def scratch(self, lib: ctypes.CDLL) -> tuple[Tensor, ctypes.c_int64]:
        """Exactly what the library asks for, poisoned, with a guard behind it."""
        size = lib.pk_qlora_linear_scratch_bytes(
            i64(self.m), i64(self.n), i64(self.k), i64(self.r), self.threads
        )
        buffer = torch.full((size // 4 + 16,), float("nan"))
        buffer[size // 4 :] = -777.0
        return buffer, ctypes.c_int64(size)

    def run(self, lib: ctypes.CDLL, level: str, *, gemv: bool) -> dict[str, Tensor]:
        _level(lib, level)
        lora = c_lora(self.a, self.b, self.scaling, self.dropout, self.seed)
        weight, number = c_weight(self.weight), DTYPES[self.dtype]
        y, dx = (
            torch.full((self.m, self.n), float("nan"), dtype=self.dtype),
            torch.full((self.m, self.k), float("nan"), dtype=self.dtype),
        )
        xa, dyb = torch.full((self.m, self.r), float("nan")), torch.full((self.m, self.r), float("nan"))
        d_a, d_b, d_bias = (
            torch.full_like(self.a, float("nan")),
            torch.full_like(self.b, float("nan")),
            torch.full((self.n,), float("nan")),
        )
        scratch, size = self.scratch(lib)
        refs = (ctypes.byref(weight), ctypes.byref(lora))
        args = (
            pointer(self.x),
            number,
            i64(self.m),
            pointer(self.bias),
            number,
            pointer(y),
            pointer(xa),
            int(gemv),
            pointer(scratch),
            size,
            self.threads,
        )
        assert lib.pk_qlora_linear_fwd_cpu(*refs, *args) == 0
        grads = map(pointer, (xa, dyb, dx, d_a, d_b, d_bias, scratch))
        assert (
            lib.pk_qlora_linear_bwd_cpu(
                *refs, pointer(self.dy), pointer(self.x), number, i64(self.m), *grads, size, self.threads
            )
            == 0
        )
        assert (scratch[size.value // 4 :] == -777.0).all(), "wrote past its scratch"
        return {"y": y, "xa": xa, "dyb": dyb, "dx": dx, "d_lora_a": d_a, "d_lora_b": d_b, "d_bias": d_bias}

    @products_of_many_rows
    def plain(self, lib: ctypes.CDLL, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition in plain PyTorch: `dtype` fp64 is exact, any other is the yardstick."""
        w = (self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize(torch.float32)).to(
            dtype
        )
        x, dy, a, b = (t.to(dtype) for t in (self.x, self.dy, self.a, self.b))
        keep = (
            _mask(lib, "baseline", self.m, self.k, self.dropout, self.seed).to(dtype)
            if self.dropout
            else torch.ones(())
        )
        keep = keep.to(dtype)
        xa, dyb = (x * keep) @ a.t(), self.scaling * (dy @ b)
        y = x @ w.t() + self.scaling * (xa @ b.t()) + (0 if self.bias is None else self.bias.to(dtype))
        dx = dy @ w + keep * (dyb @ a)
        grads = {
            "d_lora_a": dyb.t() @ (x * keep),
            "d_lora_b": self.scaling * (dy.t() @ xa),
            "d_bias": dy.sum(0),
        }
        return {"y": y, "xa": xa, "dyb": dyb, "dx": dx, **grads}


def check_case(lib: ctypes.CDLL, *shape_and_dtype, gemv: bool, level: str = "avx512", **options) -> None:
    """Within the contract's bound of plain PyTorch's error, over enough draws that no handful of errors is
    judged. (The baseline level passes the same in tests/ops.)"""
    m, r = shape_and_dtype[0], shape_and_dtype[3]
    draws = max(1, min(256, -(-1024 // (m * r))))
    cases = [Case(*shape_and_dtype, **options) for _ in range(draws)]
    exact = [case.plain(lib, torch.float64) for case in cases]
    plain = [case.plain(lib, case.dtype) for case in cases]
    fp32 = [case.plain(lib, torch.float32) for case in cases]
    ours = [case.run(lib, level, gemv=gemv) for case in cases]
    for name in exact[0]:
        yardstick = plain if ours[0][name].dtype != torch.float32 else fp32
        got, plainly, exactly = (
            torch.cat([run[name].flatten() for run in runs]) for runs in (ours, yardstick, exact)
        )
        # By the norm: xa and dyb, on their way into the gradients; and adapter gradients over few rows,
        # nearly products of two Gaussian
        # draws, whose worst error says little. All else by element too.
        if name in ("xa", "dyb") or (name.startswith("d_lora") and m < 16):
            assert relative_norm(got, exactly) <= FACTOR * relative_norm(plainly, exactly), name
        elif name != "d_bias" or m < 100:  # over many rows: test_bias_gradient_of_many_rows
            assert_as_accurate(name, got, plainly, exactly)


SHAPES = [
    (1, 64, 64, 1),
    (5, 33, 100, 3),
    (7, 70, 192, 8),
    (9, 50, 257, 5),
    (33, 97, 130, 16),
    (64, 60, 320, 64),
    (70, 200, 576, 16),
    (20, 45, 40, 256),
]


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
    _level(lib, "avx512")
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
    _level(lib, "avx512")
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
    _level(lib, "avx512")
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
    _level(lib, "avx512")

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
