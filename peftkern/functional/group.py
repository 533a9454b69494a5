"""Linears on one input as one op, and what describes them: `Adapter` is a low-rank branch, `Member` a frozen
linear with its adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight, operands
from ..ops.linear import group as _op
from . import checks

__all__ = ["Adapter", "Member", "at_rows", "described", "few_rows", "prepare", "prepared", "qlora_group"]


@dataclass(frozen=True)
class Adapter:
    """A low-rank branch: scaling * drop(x) A^T B^T on rows [begin, end) of the flattened x.

    lora_a: [R, K]; lora_b: [N, R]; one dtype, fp32, bf16 or fp16, R from 1 to 256. rows: None for all of
    them; disjoint ranges of several adapters make a batch of mixed adapters, equal ones add up. dropout_p,
    seed as in `qlora_linear`; row 0 of the mask is `rows[0]`.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Member:
    """A frozen linear of a group. weight: NF4Weight of shape [N, K] or dense [N, K]; bias: [N] or None, may
    require grad."""

    weight: NF4Weight | Tensor
    bias: Tensor | None = None
    adapters: Sequence[Adapter] = ()


def qlora_group(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """Frozen linears that share their input, each with its low-rank branches: y_i = x W_i^T + bias_i + sum of
    their adapters.

    One read of x for all products and adapters, one dx, no partial sum of it rounded. For q, k, v; for gate
    and up; for one linear with several active adapters; for a batch whose rows belong to different adapters.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        members: one or more; their weights share K and x's device.
    Returns: a tuple of y_i [..., N_i] in x's dtype. Saved for backward: x, the packed weights, A, B, xa =
    drop(x) A^T of each adapter.
    Raises: TypeError, ValueError naming the member, the argument, what was got and what was expected.
    Source: LoRA (Hu et al., 2021), section 4.1; batches of mixed adapters: Punica (Chen et al., 2023), here
    for training too.

    >>> from peftkern.functional import quantize_4bit
    >>> q, k = quantize_4bit(torch.randn(64, 32)), quantize_4bit(torch.randn(16, 32))
    >>> a, b = torch.randn(4, 32, requires_grad=True), torch.zeros(64, 4, requires_grad=True)
    >>> members = [Member(q, adapters=[Adapter(a, b)]), Member(k)]
    >>> [tuple(y.shape) for y in qlora_group(torch.randn(2, 5, 32), members)]
    [(2, 5, 64), (2, 5, 16)]
    """
    if not members:
        raise ValueError("members: is empty, expected at least one Member")
    flat, spec, trainable = prepare(x, members, [f"members[{i}]" for i in range(len(members))])
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in _op.qlora_group(flat, spec, trainable))


def few_rows(x: Tensor, members: Sequence[Member]) -> Callable[[Tensor], list[Tensor]] | None:
    """`qlora_group` for repeated calls with tensors of x's shape and dtype, on the CPU, few rows, no
    gradients: everything is checked and described now. None where the kernel for few rows does not serve. The
    members' tensors are held; they must stay where they are.
    """
    if any(
        len(m.adapters) > 1 or any(a.dropout_p or a.rows is not None for a in m.adapters) for m in members
    ):
        return None
    flat, spec, trainable = prepare(x, members, [f"members[{i}]" for i in range(len(members))])
    return _op.few_rows(flat, spec, trainable)


def prepared(x: Tensor, members: Sequence[Member]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """`qlora_group` for repeated calls with tensors of x's dtype, device and last size: all else is checked
    and described now. The members' tensors are held; their shapes, dtypes and devices must stay. No adapter
    may name rows or a seed: both belong to one call."""
    spec, trainable = described(x, members, [f"members[{i}]" for i in range(len(members))])
    adapters = [adapter for member in members for adapter in member.adapters]
    call = _op.prepared(spec, x.shape[-1], trainable)
    if not any(adapter.dropout_p for adapter in adapters):
        return call
    return lambda x: call(x, _seeds(adapters, x.device))


def described(
    x: Tensor, members: Sequence[Member], names: Sequence[str]
) -> tuple[_op.Spec, tuple[Tensor | None, ...]]:
    """As `prepare`, of calls to come; ValueError for an adapter that names what belongs to one of them."""
    for name, member in zip(names, members, strict=True):
        for j, adapter in enumerate(member.adapters):
            if adapter.rows is not None or adapter.seed is not None:
                raise ValueError(
                    f"{name}.adapters[{j}]: got rows {adapter.rows}, seed {adapter.seed}, which belong to "
                    "one call; call the function itself"
                )
    return _described(x, members, names)[1:]


def at_rows(spec: _op.Spec, m: int, adapters: Sequence[Adapter], device: torch.device) -> _op.Spec:
    """What `described` has described, in a call on m rows, with the seeds of its dropout."""
    seeds = _seeds(adapters, device) if any(spec.dropout_ps) else (None,) * len(adapters)
    return spec._replace(rows=(0, m) * len(adapters), seeds=seeds)


def prepare(
    x: Tensor, members: Sequence[Member], names: Sequence[str]
) -> tuple[Tensor, _op.Spec, tuple[Tensor | None, ...]]:
    """Checks all; x flattened, the op's description of the members, and the tensors that autograd sees:
    biases, A's, B's."""
    flat, spec, trainable = _described(x, members, names)
    seeds = _seeds([adapter for member in members for adapter in member.adapters], x.device)
    return flat, spec._replace(seeds=seeds), trainable


def _described(
    x: Tensor, members: Sequence[Member], names: Sequence[str]
) -> tuple[Tensor, _op.Spec, tuple[Tensor | None, ...]]:
    """As `prepare`, without seeds: nothing is drawn."""
    shapes = [_check_member(x, name, member) for name, member in zip(names, members, strict=True)]
    flat = checks.flat(x)
    pairs = [(i, adapter) for i, member in enumerate(members) for adapter in member.adapters]
    rows = [_rows(adapter, flat.shape[0]) for _, adapter in pairs]
    weights = [operands(m.weight) for m in members]
    spec = _op.Spec(
        tuple(data for data, _ in weights),
        tuple(part for _, quant in weights for part in quant[:6]),
        tuple(size for _, quant in weights for size in quant[6:]),
        tuple(n for n, _ in shapes),
        tuple(i for i, _ in pairs),
        tuple(bound for span in rows for bound in span),
        tuple(float(a.scaling) for _, a in pairs),
        tuple(float(a.dropout_p) for _, a in pairs),
        (),
    )
    return (
        flat,
        spec,
        (*(m.bias for m in members), *(a.lora_a for _, a in pairs), *(a.lora_b for _, a in pairs)),
    )


def _check_member(x: Tensor, name: str, member: Member) -> tuple[int, int]:
    where = name
    try:
        shape, device = checks.weight_shape(member.weight)
        checks.activation(x, shape, device)
        checks.vector("bias", member.bias, shape[0], device)
        for j, adapter in enumerate(member.adapters):
            where = f"{name}.adapters[{j}]"
            checks.adapter(adapter.lora_a, adapter.lora_b, *shape, device)
            checks.dropout(adapter.dropout_p, adapter.seed, x.device)
            _rows(adapter, math.prod(x.shape[:-1]))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}.{error}") from None
    return shape


def _rows(adapter: Adapter, m: int) -> tuple[int, int]:
    if adapter.rows is None:
        return 0, m
    begin, end = adapter.rows
    if not 0 <= begin <= end <= m:
        raise ValueError(
            f"rows: got {adapter.rows}, expected 0 <= begin <= end <= {m}, the rows of the flattened x"
        )
    return begin, end


def _seeds(adapters: Sequence[Adapter], device: torch.device) -> tuple[Tensor | None, ...]:
    """The given ones; the missing ones drawn from torch's generator in one launch."""
    missing = [j for j, a in enumerate(adapters) if a.dropout_p and a.seed is None]
    drawn = (
        torch.randint(0, 2**63 - 1, (len(missing),), dtype=torch.int64, device=device).split(1)
        if missing
        else ()
    )
    new = dict(zip(missing, drawn, strict=True))
    return tuple(new.get(j, a.seed) if a.dropout_p else None for j, a in enumerate(adapters))
