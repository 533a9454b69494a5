"""Error bounds that come from plain PyTorch at the same dtype, never from what our kernels happen to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 1.5  # the contract: our error against fp64 is at most 1.5 times plain PyTorch's


def relative_norm(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| over all elements, in fp64."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_accurate(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, others: Sequence[Tensor] = ()
) -> None:
    """`ours` errs, against fp64, by at most FACTOR times what `plain` errs: in the norm, and at the worst
    element.

    The worst of n errors is a noisy figure, so the elementwise bound takes plain PyTorch's own worst or six
    times its root mean square, whichever is more (a Gaussian's worst of 10^5 draws is 4.4). No method avoids
    two roundings, the scaling's and the result's.

    others: plain PyTorch's results with its sums in other orders (`in_other_orders`), for what is computed by
    torch's own products on both sides: an element that is hard to compute has one error in either, in an
    order that is the CPU's choice, and plain's worst is then the worst over all orders.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return
    roundings = torch.finfo(ours.dtype).eps
    norm, allowed = relative_norm(ours, exact), max(FACTOR * relative_norm(plain, exact), roundings)
    assert norm <= allowed, f"{name}: relative error {norm:.3e}, plain PyTorch's allows {allowed:.3e}"
    error, plain_error, *more = ((each.double() - exact).abs() for each in (ours, plain, *others))
    worst = max(plain_error.max().item(), 6 * plain_error.square().mean().sqrt().item())
    worst = max(worst, *(each.max().item() for each in more)) if more else worst
    elementwise = max(FACTOR * worst, roundings * exact.abs().max().item())
    assert error.max().item() <= elementwise, (
        f"{name}: worst element off by {error.max():.3e}, plain PyTorch's allows {elementwise:.3e}"
    )


def products_of_many_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of plain PyTorch's side of a comparison, forward and backward: its fp32 matrix products are
    torch's own, computed as a part of a product of many rows and columns.

    Of few rows torch sums in an order that depends on the CPU: on one in one go, on another in many partial
    sums, which err a third as much, so that the same kernels of ours would pass here and fail there. Of many
    rows it sums much alike everywhere. A GPU's library cuts the contraction of small products among the warps
    of a block, and needs more of them to sum in one go.
    """

    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        with _ProductsOfManyRows():
            return function(*args, **kwargs)

    return decorated


class _ProductsOfManyRows(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten.mm.default and _fp32(*args):
            return _product(*args)
        if func is aten.addmm.default and _fp32(*args) and not kwargs:
            return args[0] + _product(*args[1:])
        if func is aten.bmm.default and _fp32(*args):
            return torch.stack([_product(a, b) for a, b in zip(*args, strict=True)])
        return func(*args, **(kwargs or {}))


def in_other_orders(function: Callable[..., Any], times: int = 8) -> Callable[..., list[Any]]:
    """A decorator of plain PyTorch's side of a comparison, forward and backward: its results with the terms
    of each matrix product summed in an order drawn anew, `times` times."""

    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> list[Any]:
        with _Reordered():
            return [function(*args, **kwargs) for _ in range(times)]

    return decorated


class _Reordered(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            *added, a, b = args
            order = torch.randperm(a.shape[-1], device=a.device)
            args = (*added, a[..., order], b[..., order, :])
        return func(*args, **(kwargs or {}))


def _fp32(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors)


_MANY = {"cpu": 64, "cuda": 1024}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] with rows of a and columns of b repeated until there are many."""
    (m, _), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return a @ b
    many = _MANY[a.device.type]
    return (a.repeat(-(-many // m), 1) @ b.repeat(1, -(-many // n)))[:m, :n].contiguous()
