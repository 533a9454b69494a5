"""Merging one weight: every number against its definition in fp64, every form against what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import NF4Weight
from peftkern.functional import quantize_4bit
from peftkern.merging import (
    Branch,
    feedback_4bit,
    fold,
    folded_bias,
    measure,
    merge_dense,
    requantize_4bit,
    rounding_residual,
    row_slabs,
    slabs,
    stochastic_4bit,
)

SHAPES = [(96, 64), (48, 80), (33, 72), (5, 7)]  # the last three: blocks of 64 straddle rows
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True)]


def weight_of(n: int, k: int, *, quant_type: str = "nf4", nested: bool = True, seed: int = 0) -> NF4Weight:
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1
    return quantize_4bit(dense, quant_type=quant_type, nested=nested)


def branches_for(n: int, k: int, kinds: str = "lora", *, seed: int = 1, size: float = 0.02) -> list[Branch]:
    """A branch for each of the kinds, "lora", "dora" and "bias", joined by +."""
    g, found = torch.Generator().manual_seed(seed), []
    for kind in kinds.split("+"):
        up, down = torch.randn(n, 3, generator=g) * size, torch.randn(3, k, generator=g)
        magnitude = torch.rand(n, generator=g) + 0.5 if kind == "dora" else None
        bias = torch.randn(n, generator=g) if kind == "bias" else None
        found.append(Branch(up, down, magnitude, bias))
    return found


def folded(base: Tensor, branches: list[Branch]) -> Tensor:
    """The definition, in fp64: what PEFT's forward in evaluation multiplies x by."""
    base = base.double()
    total = base.clone()
    for branch in branches:
        delta = branch.up.double() @ branch.down.double()
        total = total + delta
        if branch.magnitude is not None:
            total = total * (branch.magnitude.double() / (base + delta).norm(dim=1))[:, None]
    return total


@pytest.fixture(params=[1 << 22, 1000], ids=["one slab", "slabs"])
def small_slabs(request, monkeypatch):
    monkeypatch.setattr(slabs.row_slabs, "__defaults__", (request.param,))


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("kinds", ["lora", "dora", "lora+lora", "lora+dora+lora", "dora+dora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape, kinds):
    weight, branches = weight_of(*shape), branches_for(*shape, kinds)
    exact = folded(weight.dequantize(torch.float32), branches)
    merged = merge_dense(weight, branches, dtype=torch.float32)
    torch.testing.assert_close(merged.double(), exact, rtol=2e-6, atol=1e-7)
    assert merge_dense(weight, branches, dtype=torch.bfloat16).dtype is torch.bfloat16
    dense = weight.dequantize(torch.float32)
    torch.testing.assert_close(merge_dense(dense, branches).double(), exact, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(merge_dense(dense.double(), branches), exact, rtol=1e-12, atol=1e-14)
    transposed = torch.empty(shape[1], shape[0])
    merge_dense(dense.t().contiguous().t(), branches, out=transposed.t())
    assert torch.equal(transposed.t(), merge_dense(dense, branches))


def test_slabs_cover_every_row_once_and_end_with_a_block():
    for n, k in [*SHAPES, (1, 4096), (1000, 576)]:
        weight = weight_of(n, k)
        spans = list(row_slabs(weight, 2000))
        assert [row for start, stop in spans for row in range(start, stop)] == list(range(n))
        assert all(start * k % 64 == 0 for start, _ in spans)
        whole = weight.dequantize(torch.float32)
        parts = [slabs.decode_rows(weight, *span) for span in spans]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_requantized_in_slabs_has_the_bits_of_the_whole(shape, quant_type, nested):
    weight = weight_of(*shape, quant_type=quant_type, nested=nested)
    branches = branches_for(*shape)
    got = requantize_4bit(weight, branches)
    whole = merge_dense(weight, branches, dtype=torch.float32)
    want = quantize_4bit(whole, quant_type=quant_type, nested=nested)
    for name in ("packed", "absmax", "absmax_8bit", "nested_absmax", "absmax_offset"):
        left, right = getattr(got, name), getattr(want, name)
        assert (left is None and right is None) or torch.equal(left.flatten(), right.flatten()), name
    assert got.dtype == weight.dtype and got.packed.data_ptr() != weight.packed.data_ptr()


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("kinds", ["lora", "dora", "lora+dora"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_measures_are_their_definitions(shape, kinds):
    weight, branches = weight_of(*shape), branches_for(*shape, kinds)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    other = weight.dequantize(torch.float32) + 0.01 * noise
    merged = requantize_4bit(weight, branches)
    origin, stored = weight.dequantize(torch.float32).double(), merged.dequantize(torch.float32).double()
    delta, effective = folded(origin, branches) - origin, stored - origin
    got = measure(weight, branches, merged)
    assert got.mismatch is got.mismatch_ratio is None
    assert got.weight == pytest.approx(origin.norm().item(), rel=1e-6)
    assert got.delta_ratio == pytest.approx((delta.norm() / origin.norm()).item(), rel=1e-5)
    error = (stored - origin - delta).norm()
    assert got.error_ratio == pytest.approx((error / delta.norm()).item(), rel=1e-5)
    assert got.survival == pytest.approx(((delta * effective).sum() / delta.norm() ** 2).item(), rel=1e-4)
    cosine = (delta * effective).sum() / delta.norm() / effective.norm()
    assert got.cosine == pytest.approx(cosine.item(), rel=1e-4)
    onto = merge_dense(other, branches)
    got = measure(weight, branches, onto, original=lambda start, stop: other[start:stop], onto_original=True)
    mismatch = (other.double() - origin).norm()
    assert got.mismatch_ratio == pytest.approx((mismatch / delta.norm()).item(), rel=1e-5)
    assert got.effective == pytest.approx((folded(other, branches) - origin).norm().item(), rel=1e-5)
    assert got.error < 1e-6 * got.weight
    exact = measure(origin, branches, folded(origin, branches))
    assert exact.survival == pytest.approx(1, abs=1e-12) and exact.error < 1e-13


def test_nothing_to_merge_is_nothing_measured():
    weight = weight_of(96, 64)
    none = [Branch(torch.zeros(96, 3), torch.ones(3, 64))]
    got = measure(weight, none, weight)
    assert got.delta == got.error == 0.0 and math.isnan(got.survival)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("shape", [(96, 64), (33, 72)])
def test_residual_is_the_best_of_its_rank(shape):
    weight, branches = weight_of(*shape), branches_for(*shape, "lora+dora")
    merged = requantize_4bit(weight, branches)
    error = folded(weight.dequantize(torch.float32), branches) - merged.dequantize(torch.float32).double()
    singular = torch.linalg.svdvals(error)
    for rank in (1, 4, 16):
        up, down = rounding_residual(weight, branches, merged, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        left = (error - up.double() @ down.double()).norm()
        best = singular[rank:].norm()
        assert best * (1 - 1e-6) <= left <= 1.01 * best
        again = rounding_residual(weight, branches, merged, rank)
        assert torch.equal(again[0], up) and torch.equal(again[1], down)
        with_it = measure(weight, branches, merged, residual=(up, down))
        assert with_it.error == pytest.approx(left.item(), rel=1e-4)
    up, down = rounding_residual(weight, branches, merged, min(shape))
    assert (error - up.double() @ down.double()).norm() < 1e-5 * error.norm()
    with pytest.raises(ValueError, match="rank: got 0, expected 1 to"):
        rounding_residual(weight, branches, merged, 0)


def test_one_adapter_of_rank_r_leaves_a_residual_that_rank_r_mostly_fills():
    """A 4-bit step is larger than most of delta, which is then the error itself."""
    weight, branches = weight_of(256, 256), branches_for(256, 256, size=0.002)
    merged = requantize_4bit(weight, branches)
    bare = measure(weight, branches, merged)
    up, down = rounding_residual(weight, branches, merged, 3)
    assert bare.survival < 0.6 < measure(weight, branches, merged, residual=(up, down)).survival


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (33, 72)])
def test_feedback_serves_the_inputs_better_than_the_nearest_codes(shape, nested):
    n, k = shape
    weight, branches = weight_of(n, k, nested=nested), branches_for(n, k)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4 * k, 8, generator=g) @ torch.randn(8, k, generator=g)
    x += 0.3 * torch.randn(4 * k, k, generator=g)
    goal = folded(weight.dequantize(torch.float32), branches)

    def loss(merged: NF4Weight) -> float:
        return ((merged.dequantize(torch.float32).double() - goal) @ x.double().t()).norm().item()

    fed = feedback_4bit(weight, branches, x.t() @ x)
    assert loss(fed) < 0.7 * loss(requantize_4bit(weight, branches))
    assert fed.nested == nested and fed.packed.shape == weight.packed.shape


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_feedback_is_gptq_column_by_column(monkeypatch, batch):
    """Against the algorithm in fp64 with an explicit inverse for each step (optimal brain quantization)."""
    from peftkern.merging import feedback

    monkeypatch.setattr(feedback, "_BATCH", batch)
    n, k = 16, 64
    weight, branches = weight_of(n, k, nested=False), branches_for(n, k)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(512, k, generator=g) * torch.linspace(0.5, 2, k)
    moments = x.t() @ x
    got = feedback_4bit(weight, branches, moments).dequantize(torch.float32).double()
    rows = fold(weight.dequantize(torch.float32), branches)
    scale = quantize_4bit(rows, nested=False).absmax.repeat_interleave(64).view(n, k).double()
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    rows, code = rows.double(), weight.code.double()
    left = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    while left:
        column, inverse = left[0], torch.linalg.inv(damped[left][:, left])
        value = rows[:, column]
        index = (value[:, None] / scale[:, column, None] - code).abs().argmin(1)
        error = value - code[index] * scale[:, column]
        rows[:, left] -= error[:, None] * (inverse[0] / inverse[0, 0])
        rows[:, column] = code[index] * scale[:, column]
        left = left[1:]
    assert (got - rows).abs().max() < 1e-5


def test_feedback_names_moments_that_cannot_be():
    weight, branches = weight_of(96, 64), branches_for(96, 64)
    with pytest.raises(ValueError, match=r"moments: got \(3, 3\), expected \(64, 64\)"):
        feedback_4bit(weight, branches, torch.eye(3))
    with pytest.raises(ValueError, match="moments: hold NaN"):
        feedback_4bit(weight, branches, torch.full((64, 64), math.nan))
    unseen = feedback_4bit(weight, branches, torch.zeros(64, 64))  # no inputs: the nearest codes
    nearest = measure(weight, branches, requantize_4bit(weight, branches))
    assert measure(weight, branches, unseen).error <= 1.1 * nearest.error


def test_stochastic_rounding_is_right_on_average():
    weight, branches = weight_of(32, 64, nested=False), branches_for(32, 64)
    goal, draws = folded(weight.dequantize(torch.float32), branches), 400
    g = torch.Generator().manual_seed(5)
    total = torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(draws):
        total += stochastic_4bit(weight, branches, g).dequantize(torch.float32).double() - goal
    scale = requantize_4bit(weight, branches).absmax.double().view(32, 1)  # a row is a block
    code = weight.code.double().sort().values
    upper = torch.bucketize(goal / scale, code).clamp(1, 15)
    width = (code[upper] - code[upper - 1]) * scale
    chance = ((goal / scale - code[upper - 1]) / (code[upper] - code[upper - 1])).clamp(0, 1)
    standard = width * (chance * (1 - chance) / draws).sqrt()
    few = 3 * width / draws  # where the chance is less than of a draw
    assert ((total / draws).abs() <= 4.5 * standard + few).all()
    assert (total / draws).mean().abs() < 4 * standard.square().sum().sqrt() / (32 * 64)
    survival = measure(weight, branches, stochastic_4bit(weight, branches, g)).survival
    assert survival == pytest.approx(1, abs=0.25)
    first, second = (stochastic_4bit(weight, branches, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.packed, second.packed)


def test_autocast_rounds_nothing():
    weight, branches = weight_of(96, 64), branches_for(96, 64, "lora+dora")

    def results() -> list:
        made = requantize_4bit(weight, branches)
        fed = feedback_4bit(weight, branches, torch.eye(64))
        dense = merge_dense(weight, branches, dtype=torch.float32)
        return [
            dense,
            made.packed,
            fed.packed,
            measure(weight, branches, made),
            *rounding_residual(weight, branches, made, 2),
        ]

    made = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = results()
    for a, b in zip(made, again, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_zero_weight_stays_zero():
    weight = quantize_4bit(torch.zeros(64, 64), nested=False)
    none = [Branch(torch.zeros(64, 3), torch.ones(3, 64))]
    made = [requantize_4bit(weight, none), stochastic_4bit(weight, none, torch.Generator().manual_seed(0))]
    made.append(feedback_4bit(weight, none, torch.eye(64)))
    assert all(not one.dequantize(torch.float32).any() for one in made)


@pytest.mark.usefixtures("small_slabs")
def test_bias_of_several_adapters():
    weight = weight_of(96, 64)
    branches = branches_for(96, 64, "bias+dora+bias")
    base, first, dora, last = weight.dequantize(torch.float32).double(), *branches
    gain = dora.magnitude.double() / (base + dora.up.double() @ dora.down.double()).norm(dim=1)
    bias = torch.randn(96)
    want = bias.double() + first.bias.double() * gain + last.bias.double()
    torch.testing.assert_close(folded_bias(weight, branches, bias).double(), want, rtol=1e-5, atol=1e-6)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that an operation gave."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            wide = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64, torch.int64)
            if wide and not value._is_view():
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("form", ["requantize", "stochastic", "feedback", "residual", "measure"])
def test_scratch_is_slabs_not_the_weight(form, monkeypatch):
    limit, n, k = 1 << 14, 2048, 128
    weight, branches = weight_of(n, k), branches_for(n, k, "lora+dora")
    moments, merged = torch.eye(k), requantize_4bit(weight, branches)
    monkeypatch.setattr(slabs.row_slabs, "__defaults__", (limit,))
    with Sizes() as sizes:
        if form == "requantize":
            requantize_4bit(weight, branches)
        elif form == "stochastic":
            stochastic_4bit(weight, branches, torch.Generator().manual_seed(0))
        elif form == "feedback":
            feedback_4bit(weight, branches, moments)
        elif form == "residual":
            rounding_residual(weight, branches, merged, 2)
        else:
            measure(weight, branches, merged)
    allowed = max(limit, k * k, n * (2 + 8))  # a slab, the moments, one side of the residual
    assert 0 < sizes.largest <= allowed < n * k // 8
