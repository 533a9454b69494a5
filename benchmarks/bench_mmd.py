"""The MMD of two sets of features, loss and gradients: in tiles against dense Gram matrices, where those fit.

Dense is plain PyTorch through autograd on the whole [m + n, m + n] matrix: distances by one product, one
exponential that is squared (as ours), or an exponential for each kernel. Rows are of one set; the other has
as many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkern.transfer.mmd import GaussianKernels, mmd2
from peftkern.transfer.mmd_reference import mmd2_reference

from .harness import OURS, Provider, Spec, main

__all__ = ["build", "specs"]

# A dense one keeps about 11 matrices for its gradients: 2 x 5,000 rows take 4 GB, 2 x 20,000 would take 70.
MOST_DENSE = 6000
# The definition itself is computed in fp64 only up to here; beyond it ours is checked against the dense one.
MOST_EXACT = 500


def specs(small: bool) -> list[Spec]:
    """Rows x width of features such as MiniLM's."""
    rows = (200,) if small else (256, 2000, 5000, 20_000)
    return [Spec("mmd", "loss and gradients", "float32", n, 16 if small else 384) for n in rows]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    x, y = torch.randn(spec.n, spec.k), torch.randn(spec.n, spec.k) + 0.1
    kernels = GaussianKernels.fit(x, y)
    dense = spec.n <= MOST_DENSE
    check = _check(x, y, kernels) if dense else lambda _: None
    providers = [Provider(OURS, _run(x, y, lambda a, b: mmd2(a, b, kernels)), check)]
    if dense:
        squared = _run(x, y, lambda a, b: _dense(a, b, kernels, True))
        single = _run(x, y, lambda a, b: _dense(a, b, kernels, False))
        providers += [
            Provider("dense, squared", squared, check),
            Provider("dense, an exp each", single, check),
        ]
    return providers


def _run(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        x_, y_ = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = loss(x_, y_)
        value.backward()
        return {"value": value.detach(), "dx": x_.grad, "dy": y_.grad}

    return run


def _dense(x: Tensor, y: Tensor, kernels: GaussianKernels, squared: bool) -> Tensor:
    m, n = len(x), len(y)
    rows = torch.cat([x, y])
    rows = rows - rows.detach().mean(0)
    norms = rows.square().sum(1)
    distances = (norms[:, None] + norms - 2 * rows @ rows.t()).clamp(min=0)
    if squared:
        power = torch.exp(-distances / (2 * max(kernels.variances)))
        gram = power
        for _ in kernels.variances[1:]:
            power = power * power
            gram = gram + power
    else:
        gram = sum(torch.exp(-distances / (2 * variance)) for variance in kernels.variances)
    gram = gram / len(kernels.variances)
    within_x = (gram[:m, :m].sum() - gram[:m, :m].diagonal().sum()) / (m * (m - 1))
    within_y = (gram[m:, m:].sum() - gram[m:, m:].diagonal().sum()) / (n * (n - 1))
    return within_x + within_y - 2 * gram[:m, m:].mean()


def _check(x: Tensor, y: Tensor, kernels: GaussianKernels) -> Callable[[dict[str, Tensor]], None]:
    if len(x) <= MOST_EXACT:
        exact = _run(x.double(), y.double(), lambda a, b: mmd2_reference(a, b, kernels.variances))()
    else:
        exact = _run(x, y, lambda a, b: _dense(a, b, kernels, True))()

    def check(found: dict[str, Tensor]) -> None:
        assert abs(found["value"] - exact["value"]) < 1e-5, (found["value"], exact["value"])
        for name in ("dx", "dy"):
            error = (found[name] - exact[name]).norm() / exact[name].norm()
            assert error < 1e-3, (name, error)

    return check


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
