"""Sums of low-rank updates as concatenated ranks, brought to fewer ranks and to a common core, with no matrix
of out x in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Core", "Recompressed", "compress_dense", "concatenate", "core_space", "recompress"]

_NULL = 1e-10  # singular values below this part of the largest span nothing: products and QR run in fp64
_EXACT_UP_TO = 1024  # a dense matrix with a side up to this gets a full SVD; a greater one a randomized one
_OVERSAMPLES, _POWER_ITERATIONS = 16, 4


@dataclass(frozen=True)
class Recompressed:
    """b [N, r] and a [r, K], fp32, whose product is nearest to a given update; `error` is relative, in the
    Frobenius norm.

    `singular_values` are all of the update's that were computed, greatest first; `norm` is the update's
    Frobenius norm.
    """

    b: Tensor
    a: Tensor
    error: float
    norm: float
    singular_values: Tensor


@dataclass(frozen=True)
class Core:
    """Updates in one common basis: update i = u @ cores[i] @ v.T, exactly. u [N, R], v [K, R'], fp64."""

    u: Tensor
    v: Tensor
    cores: list[Tensor]

    def expand(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """b and a, fp32, of the update whose core this is."""
        left, values, right = torch.linalg.svd(core.to(self.u), full_matrices=False)
        root = values.sqrt()
        return (self.u @ (left * root)).float(), ((root[:, None] * right) @ self.v.T).float()


def concatenate(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """b [N, R] and a [R, K] of the sum of b_i @ a_i: their ranks side by side, R the sum of theirs."""
    return torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors], 0)


def recompress(b: Tensor, a: Tensor, *, rank: int | None = None, max_error: float = 0.0) -> Recompressed:
    """The best approximation of b @ a by fewer ranks: QR of b and of a.T, then an SVD of R x R. O((N + K)
    R^2) operations.

    Args:
        b: [N, R], any float dtype; a: [R, K].
        rank: the most ranks to keep; None: as many as `max_error` asks for.
        max_error: of those, keep the fewest whose relative Frobenius error is at most this; 0 drops null
            directions only.
    Returns: Recompressed, its error sqrt(sum of the dropped singular values squared) / norm.
    Raises: ValueError for a rank below 1, a negative or non-finite max_error, or factors that do not
        multiply.
    Source: Eckart and Young (1936) for the truncation.

    >>> b, a = torch.randn(50, 4), torch.randn(4, 30)
    >>> result = recompress(torch.cat([b, b], 1), torch.cat([a, a], 0))
    >>> tuple(result.b.shape), result.error < 1e-9
    ((50, 4), True)
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}, expected 1 or more")
    if not 0.0 <= max_error < math.inf:
        raise ValueError(f"max_error: got {max_error}, expected a number of 0 or more")
    if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"b, a: got shapes {tuple(b.shape)} and {tuple(a.shape)}, expected [N, R] and [R, K]",
        )
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T)
    kept = _enough(values, rank, max_error)
    root = values[:kept].sqrt()
    error, norm = _error(values, kept)
    return Recompressed(
        (left @ (u[:, :kept] * root)).float(),
        ((root[:, None] * vh[:kept]) @ right.T).float(),
        error,
        norm,
        values,
    )


def _error(values: Tensor, kept: int) -> tuple[float, float]:
    norm = values.norm().item()
    error = values[kept:].norm().item() / norm if norm else 0.0
    return (error if error > _NULL else 0.0), norm


def _enough(values: Tensor, rank: int | None, max_error: float) -> int:
    """The fewest singular values whose rest is within max_error and whose rest spans nothing, at most `rank`,
    at least 1."""
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # of values[i:]
    allowed = max(max_error, _NULL) * tails[0]
    needed = int((tails > allowed).sum())
    return max(1, min(needed, len(values) if rank is None else rank))


def core_space(factors: Sequence[tuple[Tensor, Tensor]]) -> Core:
    """Every b_i @ a_i in the basis of the singular vectors of all of them: left ones of [D_1 ... D_T], right
    ones of [D_1; ...; D_T].

    The basis depends on the updates alone, not on how each is factored. Its size is at most the sum of the
    ranks.

    Source: Core Space (Panariello et al., 2025), which takes the singular vectors of the stacked factors
        instead.
    """
    b, a = concatenate([(b.double(), a.double()) for b, a in factors])
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.T)
    ranks = [part.shape[1] for part, _ in factors]
    cores = [x @ y.T for x, y in zip(left_core.split(ranks, 1), right_core.split(ranks, 1), strict=True)]
    u, v = _basis(torch.cat(cores, 1)), _basis(torch.cat([core.T for core in cores], 1))
    return Core(left @ u, right @ v, [u.T @ core @ v for core in cores])


def _basis(columns: Tensor) -> Tensor:
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, : max(1, int((values > _NULL * values[0]).sum()))]


def compress_dense(update: Tensor, rank: int, *, seed: int = 0) -> Recompressed:
    """The nearest update of `rank` ranks to a dense one [N, K], for what is not low-rank itself.

    A full SVD where a side is at most 1024; else a randomized one (16 oversamples, 4 power iterations,
    seeded), whose reported error is that of the result it returns.
    Source: Halko, Martinsson and Tropp (2011), algorithm 4.4.
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected 1 or more")
    update = update.float()
    if min(update.shape) <= _EXACT_UP_TO:
        u, values, vh = torch.linalg.svd(update.double(), full_matrices=False)
        kept = min(rank, len(values))
        root = values[:kept].sqrt()
        error, norm = _error(values, kept)
        return Recompressed(
            (u[:, :kept] * root).float(),
            (root[:, None] * vh[:kept]).float(),
            error,
            norm,
            values,
        )
    generator = torch.Generator().manual_seed(seed)
    columns = min(rank + _OVERSAMPLES, min(update.shape))
    basis = torch.linalg.qr(update @ torch.randn(update.shape[1], columns, generator=generator).to(update))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(update @ torch.linalg.qr(update.T @ basis)[0])[0]
    found = recompress(basis, basis.T @ update, rank=rank)
    norm = torch.linalg.vector_norm(update, dtype=torch.float64).item()
    captured = found.singular_values[: found.b.shape[1]].square().sum().item()
    error = math.sqrt(max(norm**2 - captured, 0.0)) / norm if norm else 0.0
    return Recompressed(found.b, found.a, error, norm, found.singular_values)
