"""TIES and DARE against their definitions, whole, by their authors' steps; the streamed rule against that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftkern.adapters.arithmetic import Method
from peftkern.adapters.arithmetic.rules import KthMagnitude, Piece, dare_keeps, prepare_rule


def vectors(count: int = 3, length: int = 5000, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Heavy tails, exact zeros and exact opposites: what checkpoints' differences in bf16 have.
    found = [torch.randn(length, generator=generator) ** 3 for _ in range(count)]
    for vector in found:
        vector[torch.rand(length, generator=generator) < 0.1] = 0.0
    found[1][:300] = -found[0][:300]
    return found


def ties_by_definition(taus: list[Tensor], density: float) -> Tensor:
    """TIES (Yadav et al., 2023), algorithm 1, with the majority sign of their code where an entry's sum is
    zero."""
    kept = []
    for tau in taus:
        k = max(1, int(density * len(tau)))
        threshold = tau.abs().topk(k).values[-1]
        kept.append(torch.where(tau.abs() >= threshold, tau, 0))
    stacked = torch.stack(kept)
    signs = stacked.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    same = torch.where(signs > 0, stacked > 0, (stacked < 0) & (signs < 0))
    chosen = stacked * same
    return chosen.sum(0) / same.sum(0).clamp(min=1)


def cut(taus: list[Tensor], sizes: tuple[int, ...], piece: int) -> Iterator[Piece]:
    """The vectors as tensors of these sizes, each in pieces."""
    begin = 0
    for number, size in enumerate(sizes):
        for start in range(0, size, piece):
            stop = min(start + piece, size)
            yield Piece(f"t{number}", start, [tau[begin + start : begin + stop].clone() for tau in taus])
        begin += size


def merged(
    taus: list[Tensor],
    method: Method,
    sizes: tuple[int, ...] = (3000, 1, 1999),
    piece: int = 700,
) -> Tensor:
    terms = [f"term{i}" for i in range(len(taus))]
    rule = prepare_rule(method, terms, lambda purpose: cut(taus, sizes, piece))
    return torch.cat([rule.merge(part) for part in cut(taus, sizes, piece)])


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ties_is_its_definition_on_the_whole_vector(density: float, count: int) -> None:
    taus = vectors()[:count]
    result = merged(taus, Method("ties", density=density))
    torch.testing.assert_close(result, ties_by_definition(taus, density), rtol=1e-6, atol=0)


def test_the_threshold_is_of_all_tensors_together() -> None:
    taus = [torch.cat([torch.randn(3000) * 10, torch.randn(2000)])]
    result = merged(taus, Method("ties", density=0.2), sizes=(3000, 2000))
    assert (result[:3000] != 0).sum() == 1000 and not result[3000:].any()


def test_a_negative_weight_elects_with_its_sign() -> None:
    a, c = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4.0, 1.0, -5.0])
    result = merged([a, -c], Method("ties", density=1.0), sizes=(3,))
    assert result.tolist() == [-4.0, 2.0, 5.0]


def test_cancelled_entries_take_the_majority_sign() -> None:
    one, other = torch.tensor([1.0, 5.0, 6.0]), torch.tensor([-1.0, 5.0, 6.0])
    assert merged([one, other], Method("ties", density=1.0), sizes=(3,)).tolist() == [1.0, 5.0, 6.0]
    assert merged([-one, -other], Method("ties", density=1.0), sizes=(3,)).tolist() == [-1.0, -5.0, -6.0]
    assert merged([one[:1], other[:1]], Method("ties", density=1.0), sizes=(1,)).tolist() == [0.0], (
        "none elected"
    )


@pytest.mark.parametrize("piece", [1, 7, 700, 10000])
def test_pieces_do_not_matter(piece: int) -> None:
    taus = vectors()
    short = [tau[:300] for tau in taus] if piece == 1 else taus
    sizes = (200, 100) if piece == 1 else (3000, 1, 1999)
    for method in (Method("ties"), Method("dare"), Method("dare_ties", drop=0.5)):
        assert torch.equal(merged(short, method, sizes, piece), merged(short, method, sizes, 1 << 20))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_kth_magnitude_is_exact(scale: float) -> None:
    values = vectors()[0] * scale
    values[5:40] = values[7]  # ties
    ordered = values.abs().sort(descending=True).values
    for k in (1, 2, 17, 1000, 4499, 4999, 5000):
        counter = KthMagnitude()
        for part in values.split(999):
            counter.count(part)
        counter.narrow(k)
        for part in values.split(1001):
            counter.refine(part)
        assert counter.value() == ordered[k - 1].item()


def test_a_vector_that_is_not_finite_is_refused() -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="not finite"):
            merged([torch.tensor([1.0, bad, 2.0])], Method("ties"), sizes=(3,))


def test_dare_drops_and_rescales() -> None:
    taus = vectors(2, 20000)
    result = merged(taus, Method("dare", drop=0.7, seed=3), sizes=(20000,))
    kept = [dare_keeps(20000, 0, drop=0.7, seed=3, tensor="t0", term=f"term{i}") for i in range(2)]
    expected = sum(torch.where(keep, tau / (1 - 0.7), 0) for keep, tau in zip(kept, taus, strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    for keep in kept:  # 5 standard errors
        assert abs(keep.float().mean().item() - 0.3) < 5 * (0.21 / 20000) ** 0.5
    both = (kept[0] & kept[1]).float().mean().item()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / 20000) ** 0.5, "two terms' masks are independent"


def test_dare_is_a_function_of_seed_tensor_term_and_element() -> None:
    whole = dare_keeps(100, 0, drop=0.5, seed=1, tensor="w", term="a")
    for start, count in ((0, 1), (3, 20), (8, 8), (63, 37), (99, 1)):
        assert torch.equal(
            dare_keeps(count, start, drop=0.5, seed=1, tensor="w", term="a"),
            whole[start : start + count],
        )
    others = ({"seed": 2}, {"tensor": "v"}, {"term": "b"})
    for other in others:
        assert not torch.equal(
            dare_keeps(100, 0, **{"drop": 0.5, "seed": 1, "tensor": "w", "term": "a"} | other),
            whole,
        )
    assert whole[:16].int().tolist() == [1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0], "pinned"
    assert dare_keeps(1000, 0, drop=0.0, seed=1, tensor="w", term="a").all()


def test_dare_ties_elects_among_what_was_kept() -> None:
    taus = vectors(3)
    method = Method("dare_ties", drop=0.5, seed=2)
    kept = [dare_keeps(5000, 0, drop=0.5, seed=2, tensor="t0", term=f"term{i}") for i in range(3)]
    sparse = [torch.where(keep, tau / 0.5, 0) for keep, tau in zip(kept, taus, strict=True)]
    torch.testing.assert_close(
        merged(taus, method, sizes=(5000,)),
        ties_by_definition(sparse, 1.0),
        rtol=1e-6,
        atol=0,
    )


def test_scale_comes_last() -> None:
    taus = vectors(2)
    torch.testing.assert_close(merged(taus, Method("ties", scale=0.3)), 0.3 * merged(taus, Method("ties")))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "mean"},
        {"density": 0.0},
        {"density": 1.5},
        {"drop": 1.0},
        {"drop": -0.1},
        {"scale": float("nan")},
    ],
)
def test_wrong_options(options: dict) -> None:
    argument = {"name": "method"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        Method(**options)
