"""Maximum mean discrepancy: how far apart two sets of features lie, as a loss and as a test.

The kernel is the mean of Gaussians exp(-d^2 / (2 s)) whose variances s are the median squared distance of the
pooled rows times 1/4, 1/2, 1, 2 and 4. They are fixed once, on a subsample at the start: taken anew from each
batch they would make the loss free of scale, and it would drift. The estimate is the unbiased one (Gretton et
al., 2012): no diagonals, sets of any two sizes, negative at times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .mmd_tiles import Mixture, kernel_forms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SCALES", "GaussianKernels", "MMDLoss", "MMDTest", "mmd2", "mmd_test"]

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
_SIGNIFICANT = 0.05
Documents = tuple[Sequence[Any], Sequence[Any]]


@dataclass(frozen=True)
class GaussianKernels:
    """A mixture of Gaussian kernels by their variances, which differ by powers of two."""

    variances: tuple[float, ...]

    def __post_init__(self) -> None:
        Mixture.of(self.variances)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        scales: Sequence[float] = SCALES,
        sample: int = 1000,
        seed: int = 0,
    ) -> GaussianKernels:
        """`scales` times the median squared distance of at most `sample` rows of x [m, D] and of y [n, D]."""
        _check(x, y)
        rows = torch.cat([_subsample(features.detach(), sample, seed) for features in (x, y)])
        median = torch.pdist(rows - rows.mean(0)).square().median().item()
        if not median > 0:
            raise ValueError("x, y: the median distance between rows is 0: equal features give no kernel")
        return cls(tuple(scale * median for scale in scales))


class _MMD2(torch.autograd.Function):
    """The value and, where it will be asked for, the gradient in one pass over the tiles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, variances: list[float]) -> Tensor:
        gradients = any(ctx.needs_input_grad[:2])
        value, gradient = torch.ops.peftkern.mmd2(x.detach(), y.detach(), variances, gradients)
        ctx.save_for_backward(gradient)
        ctx.like = (x.shape[0], x.dtype, y.dtype)
        return value

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("mmd2 has no second derivative (create_graph=True): take mmd2_reference")
        (gradient,) = ctx.saved_tensors
        rows, x_dtype, y_dtype = ctx.like
        dx = (d_value * gradient[:rows]).to(x_dtype) if ctx.needs_input_grad[0] else None
        dy = (d_value * gradient[rows:]).to(y_dtype) if ctx.needs_input_grad[1] else None
        return dx, dy, None


def mmd2(x: Tensor, y: Tensor, kernels: GaussianKernels) -> Tensor:
    """The unbiased estimate of MMD^2 between the rows of two sets; differentiable in both, in O(m + n)
    memory.

    MMD^2 = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)

    Args:
        x: features [m, D] of any floating dtype, m >= 2, on any device.
        y: features [n, D], n >= 2; n may differ from m.
        kernels: fixed once, `GaussianKernels.fit` on features from before training.
    Returns: a scalar in fp32 (fp64 where x or y is), at most 2, around 0 (also below) for sets of one
    distribution.
    Raises: ValueError for other shapes, fewer than 2 rows, or features that are NaN or infinite.
    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 13 (2012), lemma 6; as a loss Long et al., ICML
    2015 (DAN).

    >>> x, y = torch.randn(100, 8), torch.randn(80, 8) + 1
    >>> kernels = GaussianKernels.fit(x, y)
    >>> bool(mmd2(x, y, kernels) > mmd2(x[:50], x[50:], kernels))
    True
    """
    _check(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return _MMD2.apply(x, y, list(kernels.variances))


class MMDLoss(nn.Module):
    """`mmd2` with kernels that `fit` or else the first batch fixes, and that the state dict keeps."""

    variances: Tensor

    def __init__(self, *, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        Mixture.of(scales)
        self.scales = tuple(scales)
        self.register_buffer("variances", torch.full((len(self.scales),), math.nan, dtype=torch.float64))

    @property
    def kernels(self) -> GaussianKernels | None:
        """The kernels, None before they are fixed."""
        variances = tuple(self.variances.tolist())
        return None if math.isnan(variances[0]) else GaussianKernels(variances)

    def fit(self, source: Tensor, target: Tensor) -> GaussianKernels:
        """Fix the kernels by the median distance of these features: [m, D] and [n, D]."""
        kernels = GaussianKernels.fit(source, target, scales=self.scales)
        self.variances.copy_(torch.tensor(kernels.variances, dtype=torch.float64))
        return kernels

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """MMD^2 between features [m, D] and [n, D]."""
        return mmd2(source, target, self.kernels or self.fit(source, target))


@dataclass(frozen=True)
class MMDTest:
    """MMD^2 of two sets, and the `null` values it has when the rows (or documents) change sides at random."""

    value: float
    p_value: float
    null: tuple[float, ...]
    rows: tuple[int, int]
    kernels: GaussianKernels

    @property
    def verdict(self) -> str:
        """In words."""
        measured = f"MMD² = {self.value:.2g}, p = {self.p_value:.2g} of {len(self.null)} permutations"
        if self.p_value <= _SIGNIFICANT:
            return f"the two sets differ ({measured})"
        return f"cannot tell the two sets apart ({measured})"

    def draw(self, axes: Axes) -> None:
        """The null distribution, and the measured value."""
        axes.hist(self.null, bins=30, color="0.7", label="rows change sides at random")
        axes.axvline(self.value, color="C3", label=f"measured: {self.value:.2g}")
        axes.set(xlabel="MMD² (unbiased)", ylabel="permutations", title=self.verdict)
        axes.legend()


def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    kernels: GaussianKernels | None = None,
    permutations: int = 200,
    seed: int = 0,
    documents: Documents | None = None,
) -> MMDTest:
    """Whether x [m, D] and y [n, D] come from one distribution: MMD^2 and its p-value, from one pass.

    Args:
        kernels: default: fitted on x and y.
        permutations: how often the rows change sides at random; p is at least 1 / (permutations + 1).
        seed: of the permutations.
        documents: the document each row of x and of y is from: then whole documents change sides, as rows of
            one document are no independent draws. Without it the rows must be independent.
    Raises: ValueError as `mmd2`; or where there are fewer than 2 documents on a side.
    """
    _check(x, y)
    if permutations < 1:
        raise ValueError(f"permutations: got {permutations}, expected at least 1")
    kernels = kernels or GaussianKernels.fit(x, y)
    sides = _permuted_sides(len(x), len(y), permutations, seed, documents).to(x.device)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.no_grad():
        forms, sums = kernel_forms(x, y, Mixture.of(kernels.variances), sides.to(dtype))
        values = _values(forms, sums, sides)
    value, null = values[0].item(), tuple(values[1:].tolist())
    exceeding = sum(other >= value for other in null)
    return MMDTest(value, (1 + exceeding) / (1 + len(null)), null, (len(x), len(y)), kernels)


def _values(forms: Tensor, sums: Tensor, sides: Tensor) -> Tensor:
    """MMD^2 [P] of each column z of `sides` [N, P] (1: in the first set), from z'Kz and K1."""
    sides = sides.to(sums.dtype)
    m = sides.sum(0)
    n = len(sides) - m
    across = sums @ sides - forms
    within = sums.sum() - forms - 2 * across
    return forms / (m * (m - 1)) + within / (n * (n - 1)) - 2 * across / (m * n)


def _permuted_sides(m: int, n: int, count: int, seed: int, documents: Documents | None) -> Tensor:
    """[m + n, 1 + count]: 1 for a row of the first set; the first column as it is, the others permuted."""
    names: list[Any] = list(range(m + n))
    if documents is not None:
        sizes = tuple(map(len, documents))
        if sizes != (m, n):
            raise ValueError(f"documents: got {sizes[0]} and {sizes[1]} names, expected {m} and {n}")
        names = [(side, _plain(name)) for side, side_names in enumerate(documents) for name in side_names]
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_row = torch.tensor([index[name] for name in names])
    first = len({index[name] for name in names[:m]})
    if min(first, len(index) - first) < 2:
        raise ValueError("documents: got a side with fewer than 2 documents, expected at least 2 on each")
    is_first = torch.zeros(len(index))
    is_first[:first] = 1
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(index), generator=generator) for _ in range(count)]
    return torch.stack([is_first[of_row], *(is_first[order][of_row] for order in orders)], dim=1)


def _plain(name: Any) -> Any:
    """A name that compares by value: numbers out of tensors and arrays."""
    return name.item() if hasattr(name, "item") else name


def _subsample(features: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` rows, the same ones for the same seed, in fp32 or fp64."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if len(features) <= count:
        return features
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count]
    return features[chosen.to(features.device)]


def _check(x: Tensor, y: Tensor) -> None:
    for name, features in (("x", x), ("y", y)):
        shape = tuple(features.shape)
        if len(shape) != 2 or not features.is_floating_point():
            raise ValueError(f"{name}: got {features.dtype} of shape {shape}, expected features [rows, D]")
        if len(features) < 2:
            raise ValueError(f"{name}: got {len(features)} row(s), expected at least 2 to compare")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: got features that are NaN or infinite: look at the model")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x, y: got widths {x.shape[1]} and {y.shape[1]}, expected one width")
    if x.device != y.device:
        raise ValueError(f"x, y: got features on {x.device} and {y.device}, expected one device")
