"""The cross-entropy kernel through its C function: every level this CPU has, and the AVX-512 one emulated by
SIMDe, against fp64."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern.runtime import backends

from ..ops.bounds import FACTOR, assert_as_accurate, relative_norm
from .compiled import DTYPES, i64, load, once, pointer
from .emulation import MISSING, emulated_library, simde_missing

OK, NULL, SHAPE, DTYPE = 0, 1, 2, 3
GUARD = -777.0


@pytest.fixture(scope="module", params=[*backends.native().isas(), "avx512 emulated"])
def lib(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A library whose level is chosen."""
    level = request.param.split()[0]
    if "emulated" in request.param:
        if simde_missing() or platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip(MISSING)
        library = load(once(tmp_path_factory, "avx512_emulated", emulated_library))
    else:
        library = load(Path(backends.native().__file__))
    before = library.pk_isa()
    assert library.pk_set_isa(level.encode()) == OK
    yield library
    library.pk_set_isa(before)


def kernel(
    lib: ctypes.CDLL,
    u: Tensor,
    labels: Tensor,
    *,
    width: int = 1 << 40,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    softcap: float = 0.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    gradient: bool = True,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of u [m, n]; laid out in slices of `width` columns for the call, with a guard behind
    them."""
    m, n = u.shape
    parts = u.split(min(width, n), dim=1)
    logits = torch.cat([*(part.reshape(-1) for part in parts), torch.full((64,), GUARD, dtype=u.dtype)])
    loss = torch.full((m + 8,), GUARD)
    floats = (ctypes.c_float(softcap), ctypes.c_float(smoothing), ctypes.c_float(z_loss))
    sizes = (i64(m), i64(n), i64(width))
    tensors = (pointer(bias), pointer(labels), pointer(row_scale))
    status = lib.pk_cross_entropy_cpu(
        pointer(logits), DTYPES[u.dtype], *sizes, *tensors, *floats, pointer(loss), int(gradient), threads
    )
    assert status == OK
    assert (logits[m * n :] == GUARD).all() and (loss[m:] == GUARD).all()
    ends = [0, *torch.tensor([part.numel() for part in parts]).cumsum(0).tolist()]
    shaped = [logits[a:b].view(m, -1) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return loss[:m], torch.cat(shaped, dim=1)


def exactly(
    u: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    bias=None,
    row_scale=None,
    softcap=0.0,
    smoothing=0.0,
    z_loss=0.0,
    **_,
):
    """The definition by torch's autograd; in fp32 the yardstick, with u's own rounding of the gradient."""
    leaf = u.detach().to(dtype, copy=True).requires_grad_()
    logits = leaf if bias is None else leaf + bias.to(dtype)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    loss = loss + z_loss * torch.logsumexp(logits, 1).square()
    loss.backward(torch.ones(len(u), dtype=dtype) if row_scale is None else row_scale.to(dtype))
    return loss.detach(), leaf.grad


def check(
    lib: ctypes.CDLL,
    m: int,
    n: int,
    dtype: torch.dtype,
    *,
    scale: float = 2.0,
    bias: bool = False,
    scaled: bool = False,
    **options,
):
    u, labels = (torch.randn(m, n) * scale).to(dtype), torch.randint(0, n, (m,))
    vectors = {"bias": torch.randn(n) if bias else None, "row_scale": torch.rand(m) if scaled else None}
    loss, grad = kernel(lib, u, labels, **vectors, **options)
    plain, exact = (exactly(u, labels, d, **vectors, **options) for d in (torch.float32, torch.float64))
    assert_as_accurate("loss", loss, plain[0], exact[0])
    error, allowed = relative_norm(grad, exact[1]), FACTOR * relative_norm(plain[1].to(dtype), exact[1])
    assert error <= max(allowed, torch.finfo(dtype).eps), f"{error:.3e} > {allowed:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 33, 1023, 1024, 1025, 5000])
def test_sizes(lib: ctypes.CDLL, n: int, dtype: torch.dtype) -> None:
    """Less than a vector, whole vectors and chunks, one more and one less."""
    check(lib, 40, n, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scaled": True},
        {"smoothing": 0.1},
        {"z_loss": 0.01},
        {"softcap": 3.0},
        {"softcap": 50.0},
    ]
    + [{"bias": True, "scaled": True, "smoothing": 0.2, "z_loss": 0.001, "softcap": 5.0}],
    ids=str,
)
def test_options(lib: ctypes.CDLL, options: dict) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(lib, 40, 1300, dtype, **options)


@pytest.mark.parametrize("width", [1, 7, 500, 1024, 1299, 1300])
def test_slices_of_columns_change_nothing_but_the_order_of_sums(lib: ctypes.CDLL, width: int) -> None:
    check(lib, 12, 1300, torch.float32, width=width, bias=True, softcap=6.0, smoothing=0.1)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_scales(lib: ctypes.CDLL, scale: float) -> None:
    check(lib, 200, 70, torch.float32, scale=scale)
    check(lib, 200, 70, torch.float32, scale=scale, softcap=7.0)


def test_only_the_loss(lib: ctypes.CDLL) -> None:
    u, labels = torch.randn(5, 40), torch.randint(0, 40, (5,))
    loss, after = kernel(lib, u, labels, gradient=False)
    assert torch.equal(after, u) and torch.equal(loss, kernel(lib, u, labels)[0])


def test_two_threads_give_the_bits_of_one(lib: ctypes.CDLL) -> None:
    u, labels = torch.randn(33, 700), torch.randint(0, 700, (33,))
    one, two = (kernel(lib, u, labels, softcap=4.0, smoothing=0.1, threads=threads) for threads in (1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_infinities_and_nan(lib: ctypes.CDLL) -> None:
    u = torch.randn(5, 3000)
    u[0, :2500], u[1, 9], u[2, 9], u[3, 9], u[4] = -torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    labels = torch.full((5,), 2900)
    loss, _ = kernel(lib, u, labels)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(u, labels, reduction="none"), equal_nan=True
    )


def test_bad_arguments_are_refused(lib: ctypes.CDLL) -> None:
    u, labels, loss = torch.randn(3, 8), torch.tensor([0, 7, 3]), torch.empty(3)

    def status(*, logits=u, m=3, n=8, width=8, dtype=0, targets=labels, out=loss) -> int:
        zero = ctypes.c_float(0.0)
        sizes, tensors = map(i64, (m, n, width)), (pointer(None), pointer(targets), pointer(None))
        return lib.pk_cross_entropy_cpu(
            pointer(logits), dtype, *sizes, *tensors, zero, zero, zero, pointer(out), 1, 1
        )

    assert status() == OK and status(m=0, logits=None) == OK
    assert [status(logits=None), status(targets=None), status(out=None)] == [NULL] * 3
    assert [status(m=-1), status(n=0), status(width=0)] == [SHAPE] * 3
    assert [status(targets=torch.tensor([0, bad, 3])) for bad in (8, -1, -100)] == [SHAPE] * 3
    assert [status(dtype=3), status(dtype=-1)] == [DTYPE] * 2
