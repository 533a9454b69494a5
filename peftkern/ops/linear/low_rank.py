"""The low-rank passes of one linear, launched: groups of one of `low_rank_calls`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...runtime.launch import run
from ...runtime.plan import device_of
from . import low_rank_calls as calls
from .low_rank_calls import DyMember, DyPartials, Low, config_for
from .low_rank_config import LowRankConfig

__all__ = [
    "dy_member",
    "dy_pass",
    "reduce_partials",
    "summed",
    "x_pass",
    "xa_forward",
    "y_epilogue",
]


def _run_sums(sums: Sequence[tuple[Tensor | None, torch.dtype]]) -> list[Tensor | None]:
    launches, outs = calls.reduce_calls(sums)
    for call in launches:
        run(call)
    return outs


def xa_forward(
    x: Tensor,
    lora_a: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LowRankConfig | None = None,
) -> Tensor:
    """x [M, K], lora_a [R, K] -> xa = drop(x) A^T, fp32 [M, R]; two launches where the contraction is split
    (few rows), else one."""
    config = config or config_for(x, lora_a, x.shape[0], x.shape[1], x.shape[1], lora_a.shape[0])
    low = Low(lora_a, dropout_p=dropout_p, seed=seed)
    call, (xa,) = calls.xa_call(x, [low], config, arch=device_of(x).arch)
    run(call)
    return _run_sums([(xa, torch.float32)])[0]


def dy_pass(
    dy: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
    *,
    config: LowRankConfig | None = None,
) -> DyPartials:
    """dy [M, N], xa fp32 [M, R] -> dyb = s dy B, partial sums of dB = s dy^T xa and d_bias, `needs` as the
    op's: (dx, d_bias, dA, dB); one launch, and one that adds the dyb of the column chunks where the
    configuration says so."""
    config = config or config_for(
        dy, lora_b, *dy.shape, dy.shape[1], 1 if lora_b is None else lora_b.shape[1]
    )
    member = dy_member(dy, xa, lora_b, scaling, needs)
    call, (partials,) = calls.dy_call([member], config, arch=device_of(dy).arch)
    run(call)
    return replace(partials, dyb=summed(partials.dyb, config))


def dy_member(
    dy: Tensor, xa: Tensor | None, lora_b: Tensor | None, scaling: float, needs: Sequence[bool]
) -> DyMember:
    """What the op's `needs`, (dx, d_bias, dA, dB), want of a single linear's dy."""
    low = None if lora_b is None else Low(None, lora_b, scaling)
    need_dyb, need_b = (low is not None and need for need in (needs[0] or needs[2], needs[3]))
    return DyMember(dy, low, xa, need_dyb, need_b, needs[1])


def summed(dyb: Tensor | None, config: LowRankConfig) -> Tensor | None:
    """dyb [chunks, M, R], added up to one chunk by a launch of its own: of a split contraction, or where the
    configuration says so."""
    apart = (
        dyb is not None and dyb.shape[0] > 1 and (config.sum_dyb or not config.fused or config.xa_splits > 1)
    )
    return _run_sums([(dyb, torch.float32)])[0][None] if apart else dyb


def x_pass(
    x: Tensor | None,
    dyb: Tensor,
    lora_a: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dx: Tensor | None = None,
    need_a: bool = True,
    accumulate: bool = True,
    config: LowRankConfig | None = None,
) -> Tensor | None:
    """dyb fp32 [chunks, M, R] -> partial sums [row chunks, R, K] of dA = dyb^T drop(x) where needed (in
    lora_a's dtype where there is one chunk, else fp32); where dx [M, K] is given also, in place, dx +=
    drop(dyb A), or dx = that without `accumulate`. One launch; x is read for dA alone."""
    wide = x if need_a else dx
    config = config or config_for(wide, lora_a, dyb.shape[1], lora_a.shape[1], lora_a.shape[1], dyb.shape[2])
    low, arch = Low(lora_a, None, 1.0, dropout_p, seed), device_of(dyb).arch
    call, (d_lora_a,) = calls.x_call(x, dx, [low], [dyb], [need_a], config, arch=arch, accumulate=accumulate)
    run(call)
    return d_lora_a


def y_epilogue(
    y: Tensor,
    xa: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    accumulate: bool = True,
    config: LowRankConfig | None = None,
) -> None:
    """y [M, N] += s xa B^T + bias in place, or y = without `accumulate`; columns contiguous, rows any stride;
    one launch."""
    config = config or config_for(y, lora_b, *y.shape, y.shape[1], 1 if lora_b is None else lora_b.shape[1])
    operands = calls.y_operands(y, xa, lora_b, scaling, bias)
    run(calls.y_call([operands], config, arch=device_of(y).arch, accumulate=accumulate))


def reduce_partials(
    d_lora_a: Tensor | None, d_lora_b: Tensor | None, d_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Partials of `x_pass` and `dy_pass` -> dA [R, K], dB [N, R] in `dtype`, the adapters', d_bias fp32 [N];
    at most one launch."""
    a, b, bias = _run_sums([(d_lora_a, dtype), (d_lora_b, dtype), (d_bias, torch.float32)])
    return a, b, bias
