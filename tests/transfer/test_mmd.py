"""The tiled MMD against its definition in fp64, its memory, its test, and what it refuses."""

from __future__ import annotations

import copy
import math

import numpy
import pytest
import torch
from torch import Tensor, library

from peftkern.transfer import mmd_tiles
from peftkern.transfer.mmd import SCALES, GaussianKernels, MMDLoss, mmd2, mmd_test
from peftkern.transfer.mmd_reference import mmd2_reference

SHAPES = [(2, 2, 1), (3, 2, 5), (63, 100, 17), (64, 64, 8), (129, 65, 33)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmd_tiles, "CPU_TILE", 32)


def features(m: int, n: int, width: int, shift: float = 0.5) -> tuple[Tensor, Tensor]:
    x = torch.randn(m, width, dtype=torch.float64)
    y = 1.3 * torch.randn(n, width, dtype=torch.float64) + shift
    return x.requires_grad_(), y.requires_grad_()


def with_gradients(value: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value.detach(), *torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize(("m", "n", "width"), SHAPES)
def test_value_and_gradients_are_the_reference_s(m: int, n: int, width: int) -> None:
    x, y = features(m, n, width)
    kernels = GaussianKernels.fit(x, y)
    expected = with_gradients(mmd2_reference(x, y, kernels.variances), x, y)
    for ours, reference in zip(with_gradients(mmd2(x, y, kernels), x, y), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("m", "n", "width"), SHAPES)
def test_errors_in_fp32_are_those_of_fp32(m: int, n: int, width: int) -> None:
    x, y = features(m, n, width)
    kernels = GaussianKernels.fit(x, y)
    exact = with_gradients(mmd2_reference(x, y, kernels.variances), x, y)
    low = [t.detach().float().requires_grad_() for t in (x, y)]
    plain = with_gradients(mmd2_reference(*low, kernels.variances), *low)
    ours = with_gradients(mmd2(*low, kernels), *low)
    for name, a, b, c in zip(("value", "dx", "dy"), ours, plain, exact, strict=True):
        scale = c.norm() if name != "value" else torch.tensor(2.0)  # of the three means the value is made of
        error, allowed = (a - c).norm() / scale, (b - c).norm() / scale
        assert error <= 4 * allowed + 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x, y = (t.detach().to(dtype).requires_grad_() for t in features(40, 50, 16))
    kernels = GaussianKernels.fit(x, y)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = mmd2(x, y, kernels)
    dx, dy = torch.autograd.grad(value, (x, y))
    reference = with_gradients(mmd2_reference(*exact, kernels.variances), *exact)
    assert value.dtype == torch.float32 and dx.dtype == dy.dtype == dtype
    assert abs(value.item() - reference[0].item()) < 1e-5
    for ours, wanted in ((dx, reference[1]), (dy, reference[2])):
        assert (ours - wanted).norm() / wanted.norm() < 2 * torch.finfo(dtype).eps


def test_a_common_offset_does_not_cancel_the_digits() -> None:
    x, y = features(60, 60, 12)
    kernels = GaussianKernels.fit(x, y)
    far = [(t.detach() + 1000).float().requires_grad_() for t in (x, y)]
    # What fp32 leaves of the offset features is all that may differ.
    near = [(t.detach() - 1000).double().requires_grad_() for t in far]
    value, dx, _ = with_gradients(mmd2(*far, kernels), *far)
    wanted, dx_wanted, _ = with_gradients(mmd2_reference(*near, kernels.variances), *near)
    assert abs(value - wanted) < 2e-5 and (dx - dx_wanted).norm() / dx_wanted.norm() < 1e-3


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, y = features(40, 30, 6)
    kernels = GaussianKernels.fit(x, y)
    (3 * mmd2(x, y.detach(), kernels)).backward()
    (wanted,) = torch.autograd.grad(3 * mmd2_reference(x, y.detach(), kernels.variances), x)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-10, atol=1e-13)
    assert y.grad is None and not mmd2(x.detach(), y.detach(), kernels).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x, y = features(8, 8, 3)
    with pytest.raises(RuntimeError, match="mmd2 has no second derivative"):
        torch.autograd.grad(mmd2(x, y, GaussianKernels.fit(x, y)), x, create_graph=True)


def test_kernels_may_skip_powers_but_not_lie_between() -> None:
    x, y = features(50, 40, 7)
    kernels = GaussianKernels((80.0, 1.25, 10.0))
    expected = with_gradients(mmd2_reference(x, y, kernels.variances), x, y)
    for ours, reference in zip(with_gradients(mmd2(x, y, kernels), x, y), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)
    for variances in ((1.0, 3.0), (1.0, 1.0), (), (0.0,), (math.inf,)):
        with pytest.raises(ValueError, match="variances: got"):
            GaussianKernels(variances)


def test_median_is_of_the_squared_distances_between_rows() -> None:
    x, y = features(30, 20, 4)
    rows = torch.cat([x, y]).detach().numpy()
    distances = ((rows[:, None] - rows) ** 2).sum(2)[numpy.triu_indices(len(rows), 1)]
    middle = torch.tensor(distances).median().item()
    assert GaussianKernels.fit(x, y).variances == pytest.approx([scale * middle for scale in SCALES])


def test_kernel_is_scikit_learn_s() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = (t.detach() for t in features(45, 35, 9))
    kernels = GaussianKernels.fit(x, y)

    def gram(a: Tensor, b: Tensor) -> numpy.ndarray:
        return numpy.mean([pairwise.rbf_kernel(a, b, gamma=1 / (2 * s)) for s in kernels.variances], axis=0)

    within = [(gram(t, t).sum() - len(t)) / (len(t) * (len(t) - 1)) for t in (x, y)]
    assert mmd2(x, y, kernels).item() == pytest.approx(sum(within) - 2 * gram(x, y).mean(), abs=1e-12)


def test_estimate_is_unbiased() -> None:
    """Of two samples of one distribution it is 0 on average; with diagonals it would be well above."""
    kernels = GaussianKernels((8.0,))
    values = torch.stack([mmd2(torch.randn(12, 4), torch.randn(9, 4), kernels) for _ in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 400**0.5 < 0.02
    assert (values < 0).float().mean() > 0.3


def test_tiles_need_no_square_matrix() -> None:
    """The largest tensor that an operation makes has the rows' own size, not the square of their number."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            results = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(results) if isinstance(t, Tensor)]
            largest = max([largest, *sizes])
            return results

    x, y = torch.randn(700, 6), torch.randn(500, 6)
    mixture = mmd_tiles.Mixture.of((2.0, 4.0))
    with Watch():
        mmd_tiles.mmd2_with_gradients(x, y, mixture, True)
        mmd_tiles.kernel_forms(x, y, mixture, torch.ones(1200, 3))
    assert largest <= 1200 * 8


def test_p_value_is_that_of_permuted_rows() -> None:
    x, y = (t.detach() for t in features(40, 30, 5, shift=0.1))
    found = mmd_test(x, y, permutations=19, seed=3)
    assert found.value == pytest.approx(mmd2(x, y, found.kernels).item(), abs=1e-12)
    rows, generator = torch.cat([x, y]), torch.Generator().manual_seed(3)
    for value in found.null:
        # Which rows are in the first set after the permutation.
        first = (torch.randperm(70, generator=generator) < 40).nonzero()[:, 0]
        second = torch.tensor([i for i in range(70) if i not in set(first.tolist())])
        assert value == pytest.approx(mmd2(rows[first], rows[second], found.kernels).item(), abs=1e-12)
    assert found.p_value == (1 + sum(value >= found.value for value in found.null)) / 20


def test_p_value_tells_what_differs_and_keeps_its_level() -> None:
    x, y = (t.detach() for t in features(60, 60, 5, shift=1.0))
    differing = mmd_test(x, y, permutations=99)
    assert differing.p_value == 0.01 and differing.verdict.startswith("the two sets differ")
    pairs = [(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(60)]
    rejected = sum(mmd_test(x, y, permutations=39, seed=s).p_value <= 0.1 for s, (x, y) in enumerate(pairs))
    assert rejected <= 13  # 6 expected; more than 13 of 60 has a probability of 0.003


def test_rows_of_one_document_are_no_independent_draws() -> None:
    """Documents of nearly equal rows, all of one distribution: only a test by rows sees a difference."""
    of_x, of_y = numpy.repeat(numpy.arange(6), 10), numpy.repeat(numpy.arange(5), 10)
    by_rows, by_documents = 0, 0
    for seed in range(10):
        centres = torch.randn(11, 4, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([centres[:6][of_x], centres[6:][of_y]])
        rows += 0.05 * torch.randn(110, 4, generator=torch.Generator().manual_seed(100 + seed))
        x, y = rows[:60], rows[60:]
        by_rows += mmd_test(x, y, permutations=49).p_value <= 0.05
        by_documents += mmd_test(x, y, permutations=49, documents=(of_x, of_y)).p_value <= 0.05
    assert by_rows >= 6 and by_documents <= 2


def test_kernels_are_fixed_at_the_start_and_kept() -> None:
    loss = MMDLoss()
    assert loss.kernels is None
    x, y = (t.detach() for t in features(20, 20, 4))
    first = loss(x, y)
    kernels = loss.kernels
    # A loss with the median of each batch would be the same for features of any scale.
    assert loss(10 * x, 10 * y) != first and loss.kernels == kernels == GaussianKernels.fit(x, y)
    restored = MMDLoss()
    restored.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert restored.kernels == kernels and torch.equal(restored(x, y), first)


@pytest.mark.parametrize("gradients", [True, False])
def test_op_keeps_the_rules_of_ops(gradients: bool) -> None:
    x, y = (t.detach().float() for t in features(20, 30, 4))
    library.opcheck(torch.ops.peftkern.mmd2.default, (x, y, [1.0, 2.0], gradients))


def test_result_draws_itself() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    x, y = (t.detach() for t in features(20, 20, 4))
    axes = figure.add_subplot()
    found = mmd_test(x, y, permutations=9)
    found.draw(axes)
    assert axes.get_title() == found.verdict


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(1, 4), torch.randn(5, 4), r"x: got 1 row\(s\), expected at least 2"),
        (torch.randn(5, 4), torch.randn(0, 4), r"y: got 0 row\(s\)"),
        (torch.randn(5, 4), torch.randn(5, 3), "got widths 4 and 3"),
        (torch.randn(5), torch.randn(5, 3), r"x: got torch.float32 of shape \(5,\)"),
        (torch.randn(5, 3), torch.ones(5, 3).long(), "y: got torch.int64"),
        (torch.tensor([[1.0], [math.nan]]), torch.randn(5, 1), "x: got features that are NaN or infinite"),
        (torch.ones(5, 3), torch.ones(6, 3), "the median distance between rows is 0"),
    ],
)
def test_bad_features_are_named(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmd_test(x, y)


def test_bad_tests_are_named() -> None:
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    with pytest.raises(ValueError, match="permutations: got 0"):
        mmd_test(x, y, permutations=0)
    with pytest.raises(ValueError, match="documents: got 3 and 4 names, expected 4 and 4"):
        mmd_test(x, y, documents=([1, 2, 3], [1, 2, 3, 4]))
    with pytest.raises(ValueError, match="fewer than 2 documents"):
        mmd_test(x, y, documents=([1, 1, 1, 1], [1, 2, 3, 4]))


@pytest.mark.slow
def test_loss_and_gradients_of_20000_rows_take_less_than_a_gigabyte() -> None:
    """In a process of its own, above what it has before: the gradients, three copies of the rows, and a
    tile."""
    import subprocess
    import sys

    code = """if True:
        import resource, torch
        from peftkern.transfer.mmd import GaussianKernels, mmd2
        x, y = torch.randn(20_000, 384, requires_grad=True), torch.randn(20_000, 384, requires_grad=True)
        mmd2(x[:100], y[:100], GaussianKernels.fit(x, y)).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mmd2(x, y, GaussianKernels.fit(x, y)).backward()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 600, done.stdout  # MiB; measured on a CPU: see docs/transfer/adaptation.md
