"""Linear + cross-entropy without the logits: one op that gives each row's loss and, a block of rows at a
time, the gradients already."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...formats.nf4 import NF4Weight, operands
from .. import LIBRARY, accumulation, autocast_off, backend, serving, transformed
from ..derivatives import twice_differentiable
from ..flops import observe
from ..linear import QUANT_SCHEMA
from . import reference

__all__ = ["linear_cross_entropy"]

LIBRARY.define(
    f"linear_cross_entropy(Tensor x, Tensor weight, {QUANT_SCHEMA}, SymInt n, Tensor labels, Tensor? bias, "
    "Tensor? lora_a, Tensor? lora_b, "
    "float scaling, int ignore_index, float label_smoothing, float z_loss, float? softcap, Tensor? "
    "row_scale, bool[5] needs) "
    "-> (Tensor loss, Tensor dx, Tensor d_bias, Tensor d_lora_a, Tensor d_lora_b, Tensor d_weight)"
)


@library.impl(LIBRARY, "linear_cross_entropy", "CompositeExplicitAutograd")
def _run(x, weight, *args):
    quant, rest = args[:8], args[8:]
    with torch.no_grad(), autocast_off(x):
        out = backend("linear_cross_entropy", _backend(x, weight)).linear_cross_entropy(
            x, weight, quant, *rest
        )
    return tuple(x.new_empty(0) if t is None else t for t in out)


def _backend(x: Tensor, weight: Tensor) -> str:
    """The CUDA kernels have no part in this op: on a GPU it is Triton's."""
    name = serving(x, weight)
    return "triton" if name == "cuda" else name


@library.register_fake("peftkern::linear_cross_entropy", lib=LIBRARY)
def _(x, weight, *args):
    n, lora_a, lora_b, needs = args[8], args[11], args[12], args[-1]
    wide = accumulation(x)
    shapes = (
        x.shape,
        (n,),
        () if lora_a is None else lora_a.shape,
        () if lora_b is None else lora_b.shape,
        (n, x.shape[1]),
    )
    dtypes = (x.dtype, wide, wide, wide, wide)
    grads = (
        x.new_empty(shape, dtype=dtype) if need else x.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    return x.new_empty(x.shape[0], dtype=wide), *grads


def _again(ctx, d_loss):
    raise RuntimeError(
        "linear_cross_entropy: its gradients cannot be differentiated again (create_graph=True), as "
        "they are made in forward; compute the "
        "logits, and torch's cross_entropy of them, where second derivatives are wanted (of a patched "
        "model: patch it without fused_loss)"
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses over `divisor`, or with `by_row` each row's. Gradients are made in forward,
    while a block's logits are
    there, and scaled in backward: of the sum all of them, by row that of x. Those of the parameters mix the
    rows, so that by row they are made in backward, in a second pass.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        bias,
        lora_a,
        lora_b,
        weight,
        quant,
        n,
        labels,
        scaling,
        options,
        divisor,
        by_row,
        needs,
        row_losses,
    ):
        now = [need and (not by_row or not any(needs[1:])) for need in needs]
        loss, *grads = torch.ops.peftkern.linear_cross_entropy(
            x, weight, *quant, n, labels, bias, lora_a, lora_b, scaling, *options, None, now
        )
        grads = [g if need else None for g, need in zip(grads, now, strict=True)]
        if row_losses is not None:
            row_losses.copy_(loss)
        ctx.later = any(needs) and not any(now)
        code, *absmax, blocksize, nested_blocksize = quant
        inputs = (x, weight, code, *absmax, labels, bias, lora_a, lora_b) if ctx.later else (None,) * 12
        count = None if by_row else (labels != options[0]).sum()
        ctx.save_for_backward(*grads, count, divisor, *inputs)
        ctx.rest = (blocksize, nested_blocksize, n, scaling, options, by_row)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, lora_a, lora_b, weight)]
        return loss if by_row else _reduced(loss, divisor)

    @staticmethod
    @twice_differentiable(_again)
    def backward(ctx, d_loss):
        return _backward(ctx, d_loss)


def _reduced(loss: Tensor, divisor: Tensor | None) -> Tensor:
    """In fp64, where the device has it: a mean of a thousand fp32 losses then errs by its last rounding
    alone."""
    total = loss.sum(dtype=loss.dtype if loss.device.type == "mps" else torch.float64)
    return (total if divisor is None else total / divisor).to(loss.dtype)


def _backward(ctx, d_loss):
    saved = ctx.saved_tensors
    *grads, count, divisor = saved[:7]
    if ctx.later:
        grads, factor = _gradients(ctx, saved[7:], d_loss), None
    elif ctx.rest[-1]:
        factor = d_loss[:, None]
    else:  # without a label nothing has a gradient, also where the divisor is zero
        factor = torch.where(count > 0, d_loss if divisor is None else d_loss / divisor, 0).reshape(1)
    last = _last_use(d_loss)
    needed = zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return (*(_scaled(g, factor, dtype, last) if need else None for g, dtype, need in needed), *(None,) * 9)


def _last_use(d_loss: Tensor) -> bool:
    """Whether this backward frees the graph: what forward made for it alone is then scaled in place and
    handed out. A copy of a trained head's gradient (49,152 x 576, fp32) is 113 MB and 57 of 1,145 ms. Not
    where vmap batches d_loss; a traced graph has its own passes.
    """
    if torch.compiler.is_compiling() or not torch._C._has_storage(d_loss):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _scaled(grad: Tensor | None, factor: Tensor | None, dtype: torch.dtype, in_place: bool) -> Tensor | None:
    """`factor` [1] or [M, 1]. Without a dimension it would be rounded to the dtype of a 16-bit gradient
    first."""
    if grad is None or factor is None:
        return None if grad is None else grad.to(dtype)
    return (grad.mul_(factor) if in_place else grad * factor).to(dtype)


def _gradients(ctx, inputs: tuple[Tensor | None, ...], row_scale: Tensor) -> list[Tensor | None]:
    """By row, with parameters to train: everything once more, each row's part weighted."""
    x, weight, *quant, labels, bias, lora_a, lora_b = inputs
    blocksize, nested_blocksize, n, scaling, options, _ = ctx.rest
    needs = list(ctx.needs_input_grad[:5])
    _, *grads = torch.ops.peftkern.linear_cross_entropy(
        x,
        weight,
        *quant,
        blocksize,
        nested_blocksize,
        n,
        labels,
        bias,
        lora_a,
        lora_b,
        scaling,
        *options,
        row_scale.contiguous(),
        needs,
    )
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def linear_cross_entropy(
    x: Tensor,
    weight: NF4Weight | Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    options: tuple[int, float, float, float | None],
    divisor: Tensor | None,
    by_row: bool,
    row_losses: Tensor | None = None,
) -> Tensor:
    """x [M, K] -> the loss; `functional.linear_cross_entropy` has checked the arguments. options:
    ignore_index, label_smoothing, z_loss, softcap.
    """
    (data, quant), n = operands(weight), weight.shape[0]
    if transformed():
        loss = reference.losses(x, data, quant, n, labels, bias, lora_a, lora_b, scaling, options)
        if row_losses is not None:
            row_losses.copy_(loss.detach())
        return loss if by_row else _reduced(loss, divisor)
    observe()
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b, data)]
    args = (x.contiguous(), bias, lora_a, lora_b, data, quant, n, labels.contiguous())
    return _LinearCrossEntropy.apply(*args, scaling, options, divisor, by_row, needs, row_losses)
