"""DoRA without a dense product: the norm of the updated weight's rows in closed form, and the linear it
scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight, operands
from ..ops.linear import dora as _op
from ..ops.row_squares import row_squares as _squares
from ..ops.scale_columns import scale_columns
from . import checks
from .group import Adapter, Member, prepare, qlora_group

__all__ = ["dora_group", "dora_linear", "dora_norm", "row_squares"]


@torch.no_grad()
def row_squares(weight: NF4Weight | Tensor) -> Tensor:
    """||W||^2 of each row, fp32 [N], for `dora_norm`; of a 4-bit weight, without a decoded copy of it."""
    return _squares(*operands(weight), *weight.shape)


@torch.no_grad()
def dora_norm(
    weight: NF4Weight | Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, squares: Tensor | None = None
) -> Tensor:
    """||W + s B A|| of each row, fp32 [N], without B A: sqrt(||W||^2 + 2 s rowsum((W A^T) o B) + s^2
    rowsum((B A A^T) o B)).

    Args:
        weight: NF4Weight or dense [N, K]; lora_a: [R, K]; lora_b: [N, R].
        squares: `row_squares(weight)`, kept by a caller who needs the norm again and knows that the weight is
            as it was.
    Source: DoRA (Liu et al., 2024), section 4.3 for the norm as a constant; the closed form is ||W + s B
    A||^2 multiplied out.
    """
    shape, device = checks.weight_shape(weight)
    checks.adapter(lora_a, lora_b, *shape, device)
    squares = row_squares(weight) if squares is None else squares
    a, b = lora_a.float(), lora_b.float()
    operand = lora_a.to(weight.dtype) if isinstance(weight, Tensor) else a
    cross = qlora_group(operand, [Member(weight)])[0].float().t()  # W A^T [N, R]: R rows of activations
    total = squares + 2 * scaling * (cross * b).sum(1) + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
    return total.clamp_min(0).sqrt()


def dora_linear(
    x: Tensor, member: Member, magnitude: Tensor, squares: Tensor | None = None, dropped: Tensor | None = None
) -> Tensor:
    """A frozen linear with a DoRA adapter: y = (magnitude / ||W + s B A||) (x W^T + s x A^T B^T) + bias, the
    norm taken as a constant.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        member: the weight, its bias and exactly one adapter, without dropout of its own.
        magnitude: [N], trainable.
        squares: `row_squares(member.weight)`.
        dropped: dropout(x), [..., K]: PEFT's DoRA drops the input of the base product too, so that
            y = x W^T + bias + (g - 1) dropped W^T + g s dropped A^T B^T, computed as (x - dropped) W^T + g
            (dropped W^T + ...) + bias: the base product runs twice, as there.
    Returns: [..., N] in x's dtype.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: DoRA (Liu et al., 2024), equation 5 and section 4.3.

    >>> from peftkern.functional import Adapter
    >>> adapter = Adapter(torch.randn(4, 32, requires_grad=True), torch.zeros(48, 4, requires_grad=True))
    >>> weight = torch.randn(48, 32)
    >>> magnitude = weight.norm(dim=1).requires_grad_()
    >>> y = dora_linear(torch.randn(2, 32), Member(weight, adapters=[adapter]), magnitude)
    >>> y.shape
    torch.Size([2, 48])
    """
    if dropped is None:
        return _dora_group(x, [member], [magnitude], None if squares is None else [squares], [""])[0]
    adapter = _check(x, "", member, magnitude, squares)
    (scale,) = _scales([member], [magnitude], None if squares is None else [squares])
    n, (first, last) = member.weight.shape[0], (checks.flat(x - dropped), checks.flat(dropped))
    m, both = first.shape[0], torch.cat([first, last])
    second = type(adapter)(adapter.lora_a, adapter.lora_b, adapter.scaling, rows=(m, 2 * m))
    product = qlora_group(both, [Member(member.weight, None, [second])])[0]
    rest, u = product[:m], product[m:]
    return (rest + scale_columns(u, scale, member.bias)).reshape(*x.shape[:-1], n)


def dora_group(
    x: Tensor,
    members: Sequence[Member],
    magnitudes: Sequence[Tensor],
    squares: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Frozen linears that share their input, each with a DoRA adapter: `dora_linear` of each, without
    `dropped`. One read of x, one dx.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        members: as of `qlora_group`, each with exactly one adapter, without dropout of its own.
        magnitudes: [N_i], trainable. squares: `row_squares` of each weight.
    Returns: a tuple of y_i [..., N_i] in x's dtype. Saved for backward: x, the packed weights, A, B, xa, and
    x W^T + s x A^T B^T of each
        member whose magnitude is trained.
    Raises: TypeError, ValueError naming the member, the argument, what was got and what was expected.
    Source: DoRA (Liu et al., 2024), equation 5 and section 4.3.
    """
    if (
        not members
        or len(magnitudes) != len(members)
        or (squares is not None and len(squares) != len(members))
    ):
        counts = (
            f"{len(members)} members, {len(magnitudes)} magnitudes, "
            f"{'no' if squares is None else len(squares)} squares"
        )
        raise ValueError(f"members: got {counts}; expected as many of each, and at least one")
    return _dora_group(x, members, magnitudes, squares, [f"s[{i}]" for i in range(len(members))])


def _dora_group(x: Tensor, members, magnitudes, squares, places: list[str]) -> tuple[Tensor, ...]:
    """places: what stands behind `member` and `magnitude` in the names of arguments."""
    known = [None] * len(members) if squares is None else squares
    adapters = [_check(x, *item) for item in zip(places, members, magnitudes, known, strict=True)]
    if _op.served(x) and all(adapter.rows is None for adapter in adapters):
        squares = [row_squares(member.weight) for member in members] if squares is None else squares
        flat, found, trainable = prepare(x, members, [f"member{place}" for place in places])
        spec = _op.Spec(*found[:3], found.scalings, tuple(squares))
        return tuple(
            y.reshape(*x.shape[:-1], y.shape[1])
            for y in _op.dora_group(flat, spec, (*trainable, *magnitudes))
        )
    products = qlora_group(x, [Member(member.weight, None, member.adapters) for member in members])
    scales = _scales(members, magnitudes, squares)
    return tuple(
        scale_columns(checks.flat(u), scale, member.bias).reshape(u.shape)
        for u, scale, member in zip(products, scales, members, strict=True)
    )


def _check(x: Tensor, place: str, member: Member, magnitude: Tensor, squares: Tensor | None) -> Adapter:
    """The member's adapter."""
    if len(member.adapters) != 1 or member.adapters[0].dropout_p:
        raise ValueError(
            f"member{place}: got {len(member.adapters)} adapters, expected one, without dropout_p "
            "(pass `dropped`)"
        )
    for name, value in ((f"magnitude{place}", magnitude), (f"squares{place.removeprefix('s')}", squares)):
        checks.vector(name, value, member.weight.shape[0], x.device)
    return member.adapters[0]


def _scales(
    members: Sequence[Member], magnitudes: Sequence[Tensor], squares: Sequence[Tensor] | None
) -> list[Tensor]:
    """magnitude / norm, fp32 [N_i]."""
    found = []
    for i, (member, magnitude) in enumerate(zip(members, magnitudes, strict=True)):
        (adapter,) = member.adapters
        norm = dora_norm(
            member.weight,
            adapter.lora_a,
            adapter.lora_b,
            adapter.scaling,
            None if squares is None else squares[i],
        )
        found.append(magnitude.float() / norm)
    return found
