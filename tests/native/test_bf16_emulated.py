"""The levels with bf16 products, vdpbf16ps and AMX, emulated: proof of their logic on CPUs that lack them
(not of their speed). Compiling takes half a minute: pytest -m slow tests/native/test_bf16_emulated.py"""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from .compiled import link_shared, load
from .compiled_attention import attention, exact_attention, heads
from .compiled_loss import exact_loss, head, loss
from .emulated_linear import SHAPES, Case, check_case
from .emulation import MISSING, emulated_objects, simde_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(simde_missing(), reason=MISSING),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="these levels are on x86-64 only"
    ),
]
LEVELS = ("avx512bf16", "amx")
TILED = [
    (5, 33, 128, 3),
    (33, 97, 192, 16),
    (70, 200, 576, 16),
    (64, 60, 320, 64),
    (20, 45, 64, 256),
    (530, 40, 128, 4),
]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulated")
    return load(link_shared(emulated_objects(folder, bf16=True), folder / "libpeftkern_emulated_bf16.so"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [*TILED, *SHAPES], ids=str)
def test_linear(lib: ctypes.CDLL, level: str, shape: tuple[int, int, int, int]) -> None:
    """Shapes that tiles take, with rows, columns and ranks that fill none of them, and shapes that they
    leave."""
    check_case(lib, *shape, torch.bfloat16, gemv=False, level=level)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 33, 128, 3),
        (16, 48, 64, 16),
        (17, 97, 192, 16),
        (40, 50, 320, 8),
        (64, 20, 4224, 4),
        (5, 40, 100, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("level", LEVELS)
def test_few_rows(lib: ctypes.CDLL, shape: tuple[int, int, int, int], level: str) -> None:
    """By tiles (amx), one to four of x, none of them full, and by pairs, up to 8 rows of x at a time and the
    rest; rows longer than the scales that are held, and one shape that both leave."""
    check_case(lib, *shape, torch.bfloat16, gemv=True, level=level)
    check_case(lib, *shape, torch.bfloat16, gemv=True, level=level, nested=False, blocksize=128)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options", [{"nested": False}, {"blocksize": 256}, {"quant_type": "fp4"}, {"blocksize": 32}], ids=str
)
def test_formats(lib: ctypes.CDLL, level: str, options: dict) -> None:
    check_case(lib, 40, 70, 384, 4, torch.bfloat16, gemv=False, level=level, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_dropout(lib: ctypes.CDLL, level: str) -> None:
    check_case(lib, 45, 70, 192, 8, torch.bfloat16, gemv=False, level=level, dropout=6554)
    check_case(lib, 45, 70, 192, 8, torch.bfloat16, gemv=False, level=level, dropout=32768, bias=False)


@pytest.mark.parametrize("level", LEVELS)
def test_two_threads(lib: ctypes.CDLL, level: str) -> None:
    case = Case(70, 197, 320, 8, torch.bfloat16, dropout=6554)
    case.threads = 1
    alone = case.run(lib, level, gemv=False)
    case.threads = 2
    together = case.run(lib, level, gemv=False)
    for name in alone:
        assert torch.equal(alone[name], together[name]), name


def test_both_levels_give_the_same_bits(lib: ctypes.CDLL) -> None:
    """y and dx: the same products in the same order. xa, dyb and what comes of them are summed in other
    chains."""
    case = Case(70, 197, 320, 8, torch.bfloat16)
    case.b.zero_()
    dot, amx = (case.run(lib, level, gemv=False) for level in LEVELS)
    assert torch.equal(dot["y"], amx["y"]) and torch.equal(dot["dx"], amx["dx"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 70, 70, 64), (2, 2, 2, 33, 33, 20)], ids=str)
def test_attention(lib: ctypes.CDLL, level: str, masked: bool, shape: tuple[int, ...]) -> None:
    inputs = heads(shape)
    mask = torch.rand(shape[0], shape[3], shape[4]) > 0.3 if masked else None
    got, exact = attention(lib, level, inputs, mask), exact_attention(inputs, mask)
    for name, value in got.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2**-8, name  # a rounding of probabilities and one of results


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape, options",
    [((33, 600, 100), {}), ((40, 300, 64), {"blocksize": 64}), ((5, 1, 64), {})],
    ids=str,
)
def test_loss(lib: ctypes.CDLL, level: str, shape: tuple[int, int, int], options: dict) -> None:
    case = head(*shape, **options)
    (losses, dx), (exact, exact_dx) = loss(lib, level, case, threads=2), exact_loss(case)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    assert (dx.double() - exact_dx).norm() <= 2**-8 * exact_dx.norm() + 1e-30
