"""Frozen linears on one input with their low-rank branches (q, k, v; several adapters; a batch of mixed
ones), one op per direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from ....runtime.abi import addresses
from ....runtime.backends import select
from ... import LIBRARY, accumulation, autocast_off, backend, serving, transformed, undispatched, unobserved
from ...derivatives import derived, known_input, stand_in, twice_differentiable
from ...flops import observe
from . import cpu, reference
from .spec import Adapters, Spec, split, split_needs

__all__ = [
    "Spec",
    "arguments",
    "asked",
    "few_rows",
    "gradients",
    "hold",
    "kept",
    "plain",
    "prepared",
    "qlora_group",
    "run",
    "split",
    "split_needs",
    "trainable_again",
    "wants_x",
    "with_adapters",
]

# Lists run over members (weights, six quantization tensors and two block sizes each, n, biases) or adapters
# (lora_a and all after it).
WEIGHTS_SCHEMA = "Tensor[] weights, Tensor?[] quants, int[] blocksizes"
ADAPTERS_SCHEMA = (
    "Tensor[] lora_a, Tensor[] lora_b, int[] members, SymInt[] rows, float[] scalings, float[] dropout_ps, "
    "Tensor?[] seeds"
)
LIBRARY.define(
    f"qlora_group_fwd(Tensor x, {WEIGHTS_SCHEMA}, SymInt[] n, Tensor?[] biases, {ADAPTERS_SCHEMA}) -> "
    "(Tensor[] y, Tensor[] xa)"
)
LIBRARY.define(
    f"qlora_group_bwd(Tensor?[] dy, Tensor? x, {WEIGHTS_SCHEMA}, SymInt m, SymInt k, {ADAPTERS_SCHEMA}, "
    "Tensor?[] xa, bool[] needs) -> "
    "(Tensor dx, Tensor[] d_bias, Tensor[] d_lora_a, Tensor[] d_lora_b)"
)


@library.impl(LIBRARY, "qlora_group_fwd", "CompositeExplicitAutograd")
def _fwd(x, weights, *args):
    with autocast_off(x):
        y, xa = backend("linear.group", serving(x, *weights)).forward(x, weights, *args)
    return list(y), list(xa)


@library.impl(LIBRARY, "qlora_group_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, weights, *args):
    first = next(g for g in dy if g is not None)
    with autocast_off(first):
        run = backend("linear.group", serving(first, *weights)).backward
        dx, *lists = run(dy, x, weights, *with_adapters(args))
    empty = first.new_empty
    return empty(0) if dx is None else dx, *([empty(0) if g is None else g for g in grads] for grads in lists)


def with_adapters(args: tuple) -> tuple:
    """A backward op's arguments behind `weights`, its lists of adapters as one."""
    return *args[:4], Adapters(*args[4:11]), *args[11:]


@library.register_fake("peftkern::qlora_group_fwd", lib=LIBRARY)
def _(x, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, scalings, dropout_ps, seeds):
    heights = [end - begin for begin, end in zip(rows[::2], rows[1::2], strict=True)]
    xa = [
        x.new_empty((height, a.shape[0]), dtype=accumulation(x))
        for height, a in zip(heights, lora_a, strict=True)
    ]
    return [x.new_empty((x.shape[0], size)) for size in n], xa


@library.register_fake("peftkern::qlora_group_bwd", lib=LIBRARY)
def _(dy, x, weights, *args):
    _, _, m, k, (lora_a, lora_b, members, *_), _, needs = with_adapters(args)
    first = next(g for g in dy if g is not None)
    need_x, need_bias, need_a, need_b = split_needs(needs, len(weights), len(lora_a))
    empty, used = first.new_empty, [dy[member] is not None for member in members]

    def like(low, wanted):
        make = [need and use for need, use in zip(wanted, used, strict=True)]
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format) if m else empty(0)
            for t, m in zip(low, make, strict=True)
        ]

    bias = [
        empty(g.shape[1], dtype=accumulation(first)) if g is not None and need else empty(0)
        for g, need in zip(dy, need_bias, strict=True)
    ]
    return empty((m, k)) if need_x else empty(0), bias, like(lora_a, need_a), like(lora_b, need_b)


def run(spec: Spec, x: Tensor, trainable: tuple[Tensor | None, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """x [M, K] -> [y_i [M, N_i]], [xa]."""
    forward = _fwd if unobserved(x) else torch.ops.peftkern.qlora_group_fwd
    return forward(x, *spec[:4], *split(spec, trainable), *spec[4:])


def few_rows(
    x: Tensor, spec: Spec, trainable: tuple[Tensor | None, ...]
) -> Callable[[Tensor], list[Tensor]] | None:
    """The CPU's kernel for few rows, ready for x's [M, K] and dtype; None where it is not the choice for
    them."""
    return cpu.few_rows(x, spec, *split(spec, trainable))


def kept(
    spec: Spec, trainable: tuple[Tensor | None, ...], xa: list[Tensor]
) -> tuple[list[Tensor | None], tuple]:
    """What `gradients` needs besides x: tensors to save, and the rest. An xa is wanted by its dB alone."""
    biases, lora_a, lora_b = split(spec, trainable)
    wanted = [t if b.requires_grad else None for t, b in zip(xa, lora_b, strict=True)]
    dtypes = tuple(None if bias is None else bias.dtype for bias in biases)
    static = spec.blocksizes, spec.members, spec.rows, spec.scalings, spec.dropout_ps, dtypes
    return [*spec.weights, *spec.quants, *lora_a, *lora_b, *spec.seeds, *wanted], static


def wants_x(spec: Spec, trainable: tuple[Tensor | None, ...]) -> bool:
    """Whether a dA will read x."""
    return any(a.requires_grad for a in split(spec, trainable)[1])


def gradients(
    static: tuple,
    saved: list[Tensor | None],
    dy: list[Tensor | None],
    x: Tensor | None,
    shape: tuple[int, int],
    needs: list[bool],
    known: Any = None,
) -> list[Tensor | None]:
    """dx [M, K], the biases', the A's and the B's gradients; None where `needs`, in this order, does not ask
    or a member's dy [..., N_i] is None. known: what `hold` gave for the forward pass."""
    if not any(needs) or all(g is None for g in dy):
        return [None] * len(needs)
    first = next(g for g in dy if g is not None)
    low = 0 if known is None else len(known.at)
    if low and unobserved(first) and known.at == addresses(saved[:low]):
        _, members, rows, *_, dtypes = static
        xa, seeds = saved[low + len(members) :], saved[low : low + len(members)]
        dx, d_bias, d_a, d_b = known.backward(dy, x, xa, needs, rows, seeds)
        cast = (g if g is None else g.to(dtype) for g, dtype in zip(d_bias, dtypes, strict=True))
        return [dx, *cast, *d_a, *d_b]
    if known is not None:
        dy = [None if g is None else g.reshape(-1, g.shape[-1]) for g in dy]
    dy = [None if g is None else g.contiguous() for g in dy]
    backward = _bwd if unobserved(first) else torch.ops.peftkern.qlora_group_bwd
    found = backward(dy, x, *arguments(static, saved, shape, needs))
    return asked(static, [g is not None for g in dy], needs, *found)


def arguments(static: tuple, saved: list[Tensor | None], shape: tuple[int, int], needs: list[bool]) -> tuple:
    """Of a backward op, behind the gradients and the inputs: what `kept` has kept, and what is wanted."""
    blocksizes, members, rows, scalings, dropout_ps, dtypes = static
    count, adapters, at, parts = len(dtypes), len(members), 0, []
    for size in (count, 6 * count, adapters, adapters, adapters, adapters):
        parts.append(saved[at : at + size])
        at += size
    weights, quants, lora_a, lora_b, seeds, xa = parts
    return (
        weights,
        quants,
        blocksizes,
        *shape,
        lora_a,
        lora_b,
        members,
        rows,
        scalings,
        dropout_ps,
        seeds,
        xa,
        needs,
    )


def asked(
    static: tuple, used: list[bool], needs: list[bool], dx: Tensor, d_bias, d_a, d_b
) -> list[Tensor | None]:
    """A backward op's results in one list, in their dtypes; None where `needs` does not ask or a member's dy
    is None."""
    members, dtypes = static[1], static[-1]
    d_bias = [g if dtype is None else g.to(dtype) for g, dtype in zip(d_bias, dtypes, strict=True)]
    live = [True, *used, *[used[member] for member in members] * 2]
    return [
        g if need and exists else None
        for g, need, exists in zip((dx, *d_bias, *d_a, *d_b), needs, live, strict=True)
    ]


def plain(spec: Spec, x: Tensor, trainable: tuple[Tensor | None, ...]) -> list[Tensor]:
    """[y_i] by the definition, which torch differentiates and transforms."""
    return reference.forward(x, *spec[:4], *split(spec, trainable), *spec[4:])[0]


def trainable_again(
    static: tuple, saved: list[Tensor | None], needs: list[bool], n: list[int], like: Tensor
) -> tuple[Spec, tuple[Tensor | None, ...]]:
    """What `kept` has kept, as it was given: the group, and the trainable tensors; of the biases, on which no
    gradient depends, stand-ins where they are needed."""
    blocksizes, members, rows, scalings, dropout_ps, dtypes = static
    count, adapters = len(dtypes), len(members)
    weights, quants, low, seeds = (
        saved[:count],
        saved[count : 7 * count],
        saved[7 * count :][: 2 * adapters],
        saved[7 * count + 2 * adapters :],
    )
    spec = Spec(weights, quants, blocksizes, n, members, rows, scalings, dropout_ps, seeds[:adapters])
    biases = [
        stand_in(like, (size,), dtype) if need else None
        for size, dtype, need in zip(n, dtypes, needs, strict=False)
    ]
    return spec, (*biases, *low)


def _again(ctx, *dy):
    x, *saved = ctx.saved_tensors
    first, needs = next(g for g in dy if g is not None), list(ctx.needs_input_grad[3:])
    spec, trainable = trainable_again(ctx.static, saved, needs[1:], ctx.n, first)
    x = known_input("qlora_group", x, first, ctx.shape, any(needs[1 + len(ctx.n) + len(spec.members) :]))

    def outputs(x: Tensor, *trainable: Tensor | None) -> list[Tensor]:
        return [y.view(*first.shape[:-1], y.shape[1]) for y in plain(spec, x, trainable)]

    return (None, None, None, *derived(outputs, (x, *trainable), needs, dy))


class _QLoRAGroup(torch.autograd.Function):
    """described, lead: of a group that a backend has described before, and the leading sizes of its outputs,
    which are [M, N_i] without."""

    @staticmethod
    def forward(ctx, spec, described, lead, x, *trainable):
        if described is None:
            y, xa = run(spec, x, trainable)
        else:
            y, xa = described.forward(x, lead, spec.rows, spec.seeds)
        ctx.set_materialize_grads(False)
        tensors, ctx.static = kept(spec, trainable, xa)
        ctx.save_for_backward(x if wants_x(spec, trainable) else None, *tensors)
        ctx.shape, ctx.n, ctx.described = tuple(x.shape), spec.n, described
        return tuple(y)

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, *dy):
        (x, *saved), needs = ctx.saved_tensors, list(ctx.needs_input_grad[3:])
        found = gradients(ctx.static, saved, list(dy), x, ctx.shape, needs, ctx.described)
        return None, None, None, *found


def qlora_group(x: Tensor, spec: Spec, trainable: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """x [M, K] -> y_i [M, N_i]; `functional.qlora_group` has checked the arguments."""
    if transformed():
        return tuple(plain(spec, x, trainable))
    observe()
    if not torch.is_grad_enabled():
        return tuple(run(spec, x.contiguous(), trainable)[0])
    return _QLoRAGroup.apply(spec, None, None, x.contiguous(), *trainable)


def hold(name: str, spec: Spec, k: int, trainable: tuple[Tensor | None, ...]) -> Any:
    """A backend's descriptors of a group, for calls to come; None where it has none, or a call would read a
    copy. The rows and seeds of `spec` are not read."""
    if name == "reference":
        return None
    return backend("linear.group", name).held(k, spec, *split(spec, trainable))


def prepared(
    spec: Spec, k: int, trainable: tuple[Tensor | None, ...]
) -> Callable[[Tensor, tuple[Tensor | None, ...]], Sequence[Tensor]]:
    """`qlora_group` for calls to come, of x [..., K] and the adapters' seeds (none without dropout), with all
    adapters on all rows, which give y_i [..., N_i]: what a backend can say of them beforehand is said once.
    The tensors are held; they stay where and what they are. The rows and seeds of `spec` are not read."""
    before, (_, *between, _), adapters = spec[:5], spec[5:], len(spec.members)
    nothing, known = (None,) * adapters, {}  # by the backend

    def call(x: Tensor, seeds: tuple[Tensor | None, ...] = nothing) -> Sequence[Tensor]:
        lead = x.shape[:-1]
        m = lead.numel()
        flat = (x if len(lead) == 1 else x.reshape(m, k)).contiguous()
        now = Spec(*before, (0, m) * adapters, *between, seeds)
        name = select(x) if undispatched(x) else "reference"
        if name not in known:
            known[name] = hold(name, spec, k, trainable)
        described = known[name]
        if described is not None:
            if torch.is_grad_enabled():
                return _QLoRAGroup.apply(now, described, lead, flat, *trainable)
            return described.forward(flat, lead, now.rows, seeds)[0]
        return tuple(y.reshape(*lead, y.shape[1]) for y in qlora_group(flat, now, trainable))

    return call
