"""Frozen linears on one input, each with a DoRA adapter, on the CPU: their norms included, one op per
direction. On a GPU `dora.py` composes it of others."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ....runtime.backends import forced
from ... import LIBRARY, accumulation, autocast_off, backend, serving, transformed
from ...derivatives import derived, known_input, stand_in, twice_differentiable
from ...flops import observe
from . import reference
from .spec import Spec, split_needs

__all__ = ["Spec", "dora_group", "served", "split_needs"]

# Lists run over members; of quants six a member, of blocksizes two, as in qlora_group's schema.
_OPERANDS = (
    "Tensor[] weights, Tensor?[] quants, int[] blocksizes, Tensor[] lora_a, Tensor[] lora_b, float[] "
    "scalings, Tensor[] magnitudes"
)
LIBRARY.define(
    f"dora_group_fwd(Tensor x, Tensor?[] biases, {_OPERANDS}, Tensor[] squares, bool[] with_u) -> "
    "(Tensor[] y, Tensor[] u, Tensor[] xa, Tensor[] norm)"
)
LIBRARY.define(
    f"dora_group_bwd(Tensor?[] dy, Tensor? x, {_OPERANDS}, Tensor[] norms, Tensor?[] u, Tensor?[] xa, "
    "bool[] needs) -> "
    "(Tensor dx, Tensor[] d_bias, Tensor[] d_lora_a, Tensor[] d_lora_b, Tensor[] d_magnitude)"
)


def served(x: Tensor) -> bool:
    """Whether this op runs for tensors like x. Of no native function, which torch.compile could not trace."""
    return x.device.type == "cpu" and forced() in (None, "cpu", "reference")


@library.impl(LIBRARY, "dora_group_fwd", "CompositeExplicitAutograd")
def _fwd(x, biases, weights, *args):
    with autocast_off(x):
        y, u, xa, norm = backend("linear.dora", serving(x, *weights)).forward(x, biases, weights, *args)
    return y, [x.new_empty(0) if part is None else part for part in u], xa, norm


@library.impl(LIBRARY, "dora_group_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, weights, *args):
    first = next(g for g in dy if g is not None)
    with autocast_off(first):
        dx, *lists = backend("linear.dora", serving(first, *weights)).backward(dy, x, weights, *args)
    empty = first.new_empty
    return empty(0) if dx is None else dx, *([empty(0) if g is None else g for g in grads] for grads in lists)


@library.register_fake("peftkern::dora_group_fwd", lib=LIBRARY)
def _(x, biases, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, squares, with_u):
    wide, shapes = accumulation(x), [(x.shape[0], b.shape[0]) for b in lora_b]
    u = [x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, with_u, strict=True)]
    xa = [x.new_empty((x.shape[0], a.shape[0]), dtype=wide) for a in lora_a]
    return [x.new_empty(shape) for shape in shapes], u, xa, [x.new_empty(n, dtype=wide) for _, n in shapes]


@library.register_fake("peftkern::dora_group_bwd", lib=LIBRARY)
def _(dy, x, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, norms, u, xa, needs):
    first = next(g for g in dy if g is not None)
    need_x, *lists = split_needs(needs, len(weights))
    wide = accumulation(first)
    results = [
        [(b.shape[:1], wide) for b in lora_b],
        *([(t.shape, t.dtype) for t in low] for low in (lora_a, lora_b)),
    ]
    results.append(results[0])
    grads = [
        [
            first.new_empty(shape, dtype=dtype) if need and g is not None else first.new_empty(0)
            for (shape, dtype), need, g in zip(kind, wanted, dy, strict=True)
        ]
        for kind, wanted in zip(results, lists, strict=True)
    ]
    return first.new_empty((first.shape[0], lora_a[0].shape[1]) if need_x else 0), *grads


def _split(tensors: tuple, count: int) -> tuple[tuple, ...]:
    return tuple(tensors[i : i + count] for i in range(0, len(tensors), count))


def _forward(
    spec: Spec, x: Tensor, trainable: tuple[Tensor | None, ...], with_u: list[bool]
) -> tuple[list[Tensor], ...]:
    biases, lora_a, lora_b, magnitudes = _split(trainable, len(spec.weights))
    args = (biases, *spec[:3], lora_a, lora_b, spec.scalings, magnitudes, spec.squares, with_u)
    return torch.ops.peftkern.dora_group_fwd(x, *args)


def _plain(
    operands: tuple, norms: tuple[Tensor, ...], x: Tensor, trainable: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """[y_i] with the norms as the constants that they are; operands: weights, quants, blocksizes,
    scalings."""
    return reference.scaled(x, *operands, norms, *_split(trainable, len(norms)))


def _again(ctx, *dy):
    count, blocksizes, scalings = ctx.rest
    needs, first = ctx.needs_input_grad[1:], next(g for g in dy if g is not None)
    x, *saved = ctx.saved_tensors
    lora_a, lora_b, magnitudes, norms, _, _ = _split(saved[7 * count :], count)
    x = known_input("dora_group", x, first, (len(first), lora_a[0].shape[1]), any(needs[1 + 2 * count :]))
    dtypes = zip(lora_b, ctx.dtypes[0], needs[1:], strict=False)
    biases = [stand_in(first, b.shape[:1], dtype) if need else None for b, dtype, need in dtypes]
    operands = saved[:count], saved[count : 7 * count], blocksizes, scalings

    def plain(x: Tensor, *trainable: Tensor | None) -> list[Tensor]:
        return _plain(operands, norms, x, trainable)

    return (None, *derived(plain, (x, *biases, *lora_a, *lora_b, *magnitudes), needs, dy))


class _DoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, *trainable):
        ctx.set_materialize_grads(False)
        count = len(spec.weights)
        biases, lora_a, lora_b, magnitudes = _split(trainable, count)
        trained = [m.requires_grad for m in magnitudes]
        y, u, xa, norms = _forward(spec, x, trainable, trained)
        u = [part if wanted else None for part, wanted in zip(u, trained, strict=True)]
        xa = [part if b.requires_grad else None for part, b in zip(xa, lora_b, strict=True)]
        x = x if any(a.requires_grad for a in lora_a) else None
        ctx.save_for_backward(x, *spec.weights, *spec.quants, *lora_a, *lora_b, *magnitudes, *norms, *u, *xa)
        ctx.rest = count, spec.blocksizes, spec.scalings
        ctx.dtypes = [None if bias is None else bias.dtype for bias in biases], [m.dtype for m in magnitudes]
        return tuple(y)

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, *dy):
        count, blocksizes, scalings = ctx.rest
        needs = list(ctx.needs_input_grad[1:])
        if not any(needs) or all(g is None for g in dy):
            return (None, *(None for _ in needs))
        x, *saved = ctx.saved_tensors
        lora_a, lora_b, magnitudes, norms, u, xa = _split(saved[7 * count :], count)
        dy = [None if g is None else g.contiguous() for g in dy]
        operands = (saved[:count], saved[count : 7 * count], blocksizes, lora_a, lora_b, scalings, magnitudes)
        dx, d_bias, d_a, d_b, d_magnitude = torch.ops.peftkern.dora_group_bwd(
            dy, x, *operands, norms, u, xa, needs
        )
        bias_dtypes, magnitude_dtypes = ctx.dtypes
        d_bias = [g if dtype is None else g.to(dtype) for g, dtype in zip(d_bias, bias_dtypes, strict=True)]
        d_magnitude = [g.to(dtype) for g, dtype in zip(d_magnitude, magnitude_dtypes, strict=True)]
        grads, live = (dx, *d_bias, *d_a, *d_b, *d_magnitude), [True, *[g is not None for g in dy] * 4]
        return (
            None,
            *(g if need and used else None for g, need, used in zip(grads, needs, live, strict=True)),
        )


def dora_group(x: Tensor, spec: Spec, trainable: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """x [M, K] -> y_i [M, N_i]; trainable: biases, A's, B's, magnitudes. `functional.dora_group` has checked
    the arguments."""
    if transformed():
        operands = spec.weights, spec.quants, spec.blocksizes, spec.scalings
        _, lora_a, lora_b, _ = _split(trainable, len(spec.weights))
        norms = tuple(norm.detach() for norm in reference.norms(*operands, lora_a, lora_b))
        return tuple(_plain(operands, norms, x, trainable))
    observe()
    if not torch.is_grad_enabled():
        return tuple(_forward(spec, x.contiguous(), trainable, [False] * len(spec.weights))[0])
    return _DoraGroup.apply(spec, x.contiguous(), *trainable)
