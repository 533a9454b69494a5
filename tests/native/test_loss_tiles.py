"""The loss of a bf16 head in tiles through its C function: against fp64, the same bits for any number of
threads, and what it refuses."""

from __future__ import annotations

import ctypes

import pytest
import torch

from peftkern.runtime import backends

from .compiled import CWeight, c_weight, i64, pointer
from .compiled_loss import exact_loss, head, loss

OK, NULL, SHAPE, DTYPE, BLOCKSIZE, SCRATCH, ISA = range(7)
# (M, N, K): single words and rows, panels that are not full, a width of no whole block, several ranges of
# words, and several tasks of rows.
SHAPES = [(1, 40, 64), (5, 1, 64), (33, 1030, 100), (70, 257, 48), (40, 5000, 192), (530, 300, 64), (3, 5, 7)]


@pytest.fixture
def lib(level: str) -> ctypes.CDLL:
    return ctypes.CDLL(backends.native().__file__)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_against_fp64(lib: ctypes.CDLL, level: str, shape: tuple[int, int, int], z_loss: float) -> None:
    """Each row's gradient, however sure the row is: one rounding of what weighs the weight, one of dx."""
    case, row_scale = head(*shape), torch.rand(shape[0])
    losses, dx = loss(lib, level, case, row_scale=row_scale, z_loss=z_loss)
    exact, exact_dx = exact_loss(case, row_scale, z_loss)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    floor = torch.finfo(torch.bfloat16).tiny * shape[2]
    error = (dx.double() - exact_dx).norm(dim=1)
    assert (error <= 2**-8 * exact_dx.norm(dim=1) + floor).all(), (error / exact_dx.norm(dim=1)).max()
    alone, _ = loss(lib, level, case, z_loss=z_loss, gradient=False)
    assert torch.equal(alone, losses)


@pytest.mark.parametrize("options", [{"blocksize": 64}, {"nested": False}, {"blocksize": 256}], ids=str)
def test_4bit_weight(lib: ctypes.CDLL, level: str, options: dict) -> None:
    case = head(70, 333, 512, **options)
    losses, dx = loss(lib, level, case)
    exact, exact_dx = exact_loss(case)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    assert ((dx.double() - exact_dx).norm(dim=1) <= 2**-8 * exact_dx.norm(dim=1)).all()


def test_the_same_bits_for_any_number_of_threads(lib: ctypes.CDLL, level: str) -> None:
    case = head(600, 3000, 64)
    losses, dx = loss(lib, level, case)
    for threads in (2, 3):
        got, got_dx = loss(lib, level, case, threads=threads)
        assert torch.equal(got, losses) and torch.equal(got_dx, dx)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(lib: ctypes.CDLL, level: str, value: float) -> None:
    """In a row of x: in its own loss and gradient alone. In the weight: in every row."""
    x, weight, labels = head(40, 500, 64)
    x[7, 3] = value
    losses, dx = loss(lib, level, (x, weight, labels))
    others = torch.arange(40) != 7
    assert not losses[7].isfinite() and losses[others].isfinite().all() and dx[others].isfinite().all()
    x[7, 3], weight[450, 2] = 0.0, torch.nan
    assert loss(lib, level, (x, weight, labels))[0].isnan().all()


def test_what_is_refused(lib: ctypes.CDLL, level: str) -> None:
    x, weight, labels = head(4, 70, 64)
    four_bit = head(4, 70, 64, blocksize=32)[1]
    buffer = torch.empty(1 << 24, dtype=torch.uint8)
    plenty, at = i64(1 << 24), pointer(buffer)

    def call(w: CWeight | None = None, m=4, rows=x, targets=labels, out=at, room=at, size=plenty) -> int:
        described = c_weight(weight) if w is None else w
        given = pointer(rows), i64(m), pointer(targets), None, ctypes.c_float(0.0)
        return lib.pk_linear_cross_entropy_cpu(ctypes.byref(described), *given, out, None, room, size, 1)

    assert call() == OK and call(m=0, rows=None, targets=None, out=None, room=None) == OK
    assert call(rows=None) == NULL and call(targets=None) == NULL
    assert call(out=None) == NULL and call(room=None) == NULL and call(CWeight()) == NULL
    assert call(m=-1) == SHAPE and call(m=2**62) == SHAPE and call(size=i64(100)) == SCRATCH
    for wrong in (-1, 70):
        assert call(targets=torch.tensor([0, 1, wrong, 2])) == SHAPE
    assert call(c_weight(weight.float())) == DTYPE and call(c_weight(four_bit)) == BLOCKSIZE
    lib.pk_linear_cross_entropy_scratch_bytes.restype = ctypes.c_int64
    for sizes in ((-1, 8, 8), (4, 0, 8), (4, 8, 0), (2**62, 8, 8), (4, 2**62, 8), (4, 8, 2**62)):
        assert lib.pk_linear_cross_entropy_scratch_bytes(*map(i64, sizes), 1, 1) == 0
    lib.pk_set_isa(b"baseline")
    assert call() == ISA
