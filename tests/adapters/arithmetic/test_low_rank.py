"""Recompression and the core space against dense SVDs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.adapters.arithmetic import core_space, recompress
from peftkern.adapters.arithmetic.low_rank import compress_dense, concatenate


def factors(count: int, n: int = 40, k: int = 30, r: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, r, generator=generator), torch.randn(r, k, generator=generator)) for _ in range(count)
    ]


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(
    ("rank", "n", "k"),
    [(1, 40, 30), (3, 40, 30), (8, 40, 30), (5, 12, 30), (5, 40, 9), (16, 40, 30)],
)
def test_recompression_is_the_truncated_svd(rank: int, n: int, k: int) -> None:
    b, a = concatenate(factors(4, n, k))
    dense = b.double() @ a.double()
    values = torch.linalg.svdvals(dense)
    result = recompress(b, a, rank=rank)
    kept = min(rank, n, k, 16)
    best = values[kept:].norm() / values.norm()
    assert result.b.shape == (n, kept) and result.a.shape == (kept, k)
    assert result.error == pytest.approx(best.item(), rel=1e-9, abs=1e-12)
    assert relative(result.b.double() @ result.a.double(), dense) == pytest.approx(
        best.item(),
        rel=1e-5,
        abs=2e-7,
    )


def test_max_error_keeps_the_fewest_ranks() -> None:
    b, a = concatenate(factors(4))
    values = torch.linalg.svdvals(b.double() @ a.double())
    for allowed in (0.05, 0.2, 0.6):
        result = recompress(b, a, max_error=allowed)
        kept = result.b.shape[1]
        assert result.error <= allowed < (values[kept - 1 :].norm() / values.norm()).item()
    assert recompress(b, a, rank=3, max_error=0.001).b.shape[1] == 3, "the rank is a bound"


def test_null_directions_are_dropped_without_loss() -> None:
    (one,), (other,) = factors(1, seed=1), factors(1, seed=2)
    b, a = concatenate([one, other, (-other[0], other[1])])
    result = recompress(b, a)
    assert result.b.shape[1] == 4
    assert relative(result.b @ result.a, one[0] @ one[1]) < 1e-6
    zero = recompress(b * 0, a)
    assert zero.error == 0.0 and not zero.b.any() and zero.b.shape[1] == 1


def test_no_matrix_of_n_by_k_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    b, a = torch.randn(3000, 16), torch.randn(16, 2000)
    with Largest() as largest:
        recompress(b, a, rank=4)
        core_space([(b[:, :8], a[:8]), (b[:, 8:], a[8:])])
    assert largest.elements == 3000 * 16


def test_core_space_is_lossless_and_belongs_to_the_updates() -> None:
    parts = factors(3)
    core = core_space(parts)
    for (b, a), own in zip(parts, core.cores, strict=True):
        assert relative(core.u @ own @ core.v.T, b.double() @ a.double()) < 1e-13
        again_b, again_a = core.expand(own)
        assert relative(again_b @ again_a, b @ a) < 1e-6
    mixing = torch.randn(4, 4, dtype=torch.float64)  # another factorization of the same updates
    other = core_space([(b.double() @ mixing, torch.linalg.solve(mixing, a.double())) for b, a in parts])
    rounding = 1000 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(mixing))
    for own, again in zip(core.cores, other.cores, strict=True):
        assert (own.abs() - again.abs()).abs().max() < rounding * own.abs().max()


def test_core_space_of_equal_updates_has_no_null_directions() -> None:
    (part,) = factors(1)
    assert core_space([part, part]).u.shape[1] == 4


@pytest.mark.parametrize("shape", [(60, 50), (1100, 1030)])
def test_compressing_a_dense_update(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
    update = b @ a + 0.3 * torch.randn(*shape, generator=generator)
    values = torch.linalg.svdvals(update.double())
    result = compress_dense(update, 6)
    best = (values[6:].norm() / values.norm()).item()
    assert result.error == pytest.approx(best, rel=1e-3)
    assert relative(result.b @ result.a, update) == pytest.approx(result.error, rel=1e-4)


@pytest.mark.parametrize("options", [{"rank": 0}, {"max_error": -1.0}, {"max_error": float("nan")}])
def test_wrong_options(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        recompress(torch.ones(3, 2), torch.ones(2, 4), **options)


def test_factors_that_do_not_multiply() -> None:
    with pytest.raises(ValueError, match="b, a: got shapes"):
        recompress(torch.ones(3, 2), torch.ones(3, 4))
