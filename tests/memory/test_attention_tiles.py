"""Attention with a soft cap by tiles: the reference's numbers, and memory linear in the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peftkern.memory.attention_reference import reference
from peftkern.memory.attention_tiles import capped_attention
from peftkern.memory.count import MemoryCount
from peftkern.memory.tiles import Tiling, attention_tiling, fitted_tiling

from ..ops.bounds import assert_as_accurate

# B, query heads, key/value heads, S, d, and what else
CASES = [
    ((2, 4, 2, 33, 16), dict(is_causal=True), dict(rows=8)),
    ((2, 4, 2, 33, 16), dict(is_causal=True, window=5), dict(rows=8, groups=2)),
    ((1, 6, 2, 70, 8), dict(is_causal=True, window=64), dict(rows=64)),
    ((2, 3, 3, 17, 8), dict(), dict(rows=5, groups=1)),
    ((3, 4, 1, 1, 8), dict(is_causal=True), dict()),
]


def operands(b: int, heads: int, kv: int, s: int, d: int, keys: int | None = None, **options) -> list[Tensor]:
    """q, k, v as a decoder layer has them, with scores far above the caps below."""
    sizes = ((s, heads), (keys or s, kv), (keys or s, kv))
    tensors = [torch.randn(b, rows, n, d, **options).transpose(1, 2) for rows, n in sizes]
    return [(3 * t).requires_grad_() for t in tensors]


def gradients(function: Any, tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize(("shape", "options", "tiles"), CASES, ids=str)
def test_it_computes_the_reference(shape: tuple, options: dict, tiles: dict, softcap: float | None) -> None:
    tensors = operands(*shape, dtype=torch.float64)
    options = options | {"softcap": softcap, "scale": 0.3}
    d_out = torch.randn_like(tensors[0])
    expected = gradients(lambda *t: reference(*t, **options), tensors, d_out)
    got = gradients(lambda *t: capped_attention(*t, **options, **tiles), tensors, d_out)
    for ours, exact in zip(got, expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_errs_no_more_than_the_whole(dtype: torch.dtype) -> None:
    tensors = operands(2, 4, 2, 130, 32, dtype=dtype)
    d_out, options = torch.randn_like(tensors[0]), {"softcap": 5.0, "is_causal": True}
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = gradients(lambda *t: reference(*t, **options), wide, d_out.double())
    plain = gradients(lambda *t: reference(*t, **options), tensors, d_out)
    ours = gradients(lambda *t: capped_attention(*t, **options, rows=48), tensors, d_out)
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_mask_is_added_to_the_capped_scores(samples: int, heads: int) -> None:
    tensors = operands(2, 4, 2, 11, 8, keys=14, dtype=torch.float64)
    mask = torch.randn(samples, heads, 11, 14, dtype=torch.float64)
    mask[:, :, 3] = torch.finfo(torch.float64).min  # a row that reads nothing
    mask[:, :, 5, 2:] = -torch.inf
    d_out = torch.randn_like(tensors[0])
    expected = gradients(lambda *t: reference(*t, mask, softcap=3.0), tensors, d_out)
    got = gradients(lambda *t: capped_attention(*t, mask, softcap=3.0, rows=4), tensors, d_out)
    for ours, exact in zip(got, expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)


def test_autograd_agrees_with_differences() -> None:
    tensors = [t.detach().requires_grad_() for t in operands(1, 2, 1, 5, 3, dtype=torch.float64)]
    options = {"softcap": 3.0, "is_causal": True, "window": 3, "rows": 2}
    assert torch.autograd.gradcheck(lambda *t: capped_attention(*t, **options), tensors)


@pytest.mark.parametrize("needed", [(0,), (1, 2)], ids=str)
def test_only_what_is_asked_for_has_a_gradient(needed: tuple[int, ...]) -> None:
    tensors = operands(1, 4, 2, 9, 8)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in needed)
    capped_attention(*tensors, softcap=5.0).sum().backward()
    assert [t.grad is not None for t in tensors] == [index in needed for index in range(3)]


def test_autocast_multiplies_in_its_dtype_there_and_back() -> None:
    tensors = operands(1, 4, 2, 40, 8)
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors]
    options = {"softcap": 5.0, "is_causal": True}
    with torch.autocast("cpu", torch.bfloat16):
        out = capped_attention(*tensors, **options)
        out.sum().backward()
    expected = gradients(lambda *t: capped_attention(*t, **options), narrow, torch.ones_like(out))
    assert torch.equal(out, expected[0])
    assert all(torch.equal(t.grad, e.float()) for t, e in zip(tensors, expected[1:], strict=True))


def peak(length: int, window: int | None = None) -> int:
    tensors = operands(1, 4, 2, length, 8)
    with MemoryCount(classify=None) as count:
        capped_attention(*tensors, softcap=5.0, is_causal=True, window=window, rows=64).sum().backward()
    return count.peaks["forward"]


@pytest.mark.parametrize("window", [None, 64], ids=str)
def test_memory_grows_with_the_length_alone(window: int | None) -> None:
    """Equal steps in length add equal bytes; no score of a tile is there for keys that no window holds."""
    small, middle, large = (peak(length, window) for length in (256, 512, 768))
    assert abs((large - middle) - (middle - small)) <= 2048
    if window is not None:
        assert (large - middle) / 256 < 4 * 8 * (6 * 4 + 6 * 2) + 256


def test_two_numbers_a_row_are_saved_beside_the_operands() -> None:
    saved, tensors = {}, operands(2, 4, 2, 33, 16)
    with saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        out = capped_attention(*tensors, softcap=5.0, is_causal=True)
    expected = [t.numel() * 4 for t in tensors] + [2 * 4 * 2 * 4 * 33]
    assert sorted(t.untyped_storage().nbytes() for t in saved.values()) == sorted(expected)
    assert out.transpose(1, 2).is_contiguous()


def test_a_tile_stays_within_its_budget() -> None:
    assert attention_tiling(1, 8, 4, 4096, 4096, budget=1 << 26) == Tiling(1, 1, 256)
    assert attention_tiling(1, 8, 4, 1 << 20, 1 << 20) == Tiling(1, 1, 64)
    assert attention_tiling(3, 8, 4, 100, 100, budget=1 << 40) == Tiling(3, 8, 100)
    assert attention_tiling(3, 8, 4, 100, 100, budget=8 << 20) == Tiling(1, 8, 100)
    assert attention_tiling(3, 8, 4, 100, 100, groups=2, budget=1 << 40) == Tiling(1, 4, 100)
    tiling, keys = fitted_tiling(lambda rows: rows + 1023, 1, 8, 4, 1 << 20)
    assert keys == tiling.rows + 1023 and 0.5 < tiling.rows * 4 * keys * 14 / (64 << 20) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"window": 3}, "window: got 3"),
        ({"rows": 0}, "rows: got 0"),
        ({"groups": 3}, "groups: got 3"),
        ({"mask": torch.zeros(1, 1, 9, 8)}, "mask: got"),
        ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "mask: expected a floating-point"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict, message: str) -> None:
    q, k, v = operands(1, 4, 2, 9, 8)
    with pytest.raises(ValueError, match=message):
        capped_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="its operands are"):
        capped_attention(q, k.double(), v)
