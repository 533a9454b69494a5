"""Error bounds that come from plain PyTorch at the same dtype, never from what our kernels happen to do."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5  # the contract: our error against fp64 is at most 1.5 times plain PyTorch's


def relative_norm(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| over all elements, in fp64."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_accurate(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`ours` errs, against fp64, by at most FACTOR times what `plain` errs: in the norm, and at the worst element.

    The worst of n errors is a noisy figure, so the elementwise bound takes plain PyTorch's own worst or six times its root mean square,
    whichever is more (a Gaussian's worst of 10^5 draws is 4.4). No method avoids two roundings, the scaling's and the result's.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return
    roundings = torch.finfo(ours.dtype).eps
    norm, allowed = relative_norm(ours, exact), max(FACTOR * relative_norm(plain, exact), roundings)
    assert norm <= allowed, f"{name}: relative error {norm:.3e}, plain PyTorch's allows {allowed:.3e}"
    error, plain_error = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    worst = max(plain_error.max().item(), 6 * plain_error.square().mean().sqrt().item())
    elementwise = max(FACTOR * worst, roundings * exact.abs().max().item())
    assert error.max().item() <= elementwise, f"{name}: worst element off by {error.max():.3e}, plain PyTorch's allows {elementwise:.3e}"
