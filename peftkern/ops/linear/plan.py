"""The plan of one QLoRA linear on a GPU: `gpu.py` itself, run on tensors without storage of a linear's sizes.

`runtime/plan.py` says how; each kernel's bytes and operations stand beside the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...runtime.backends import use_cuda_kernels
from ...runtime.plan import INTERPRETED, Device, Launch, device_of, planning
from ..sizes import ceil_div
from .config import Choice
from .problem import Linear, Needs

__all__ = ["Operands", "Shape", "backward_plan", "choices", "device_for", "explain", "forward_plan"]


@dataclass(frozen=True)
class Shape:
    """A linear's sizes. r: 0 for no adapter; nested: of the absmax; dense: a weight of x's dtype instead."""

    m: int
    n: int
    k: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype | None = None  # None: as dtype
    blocksize: int = 64
    nested: bool = True
    dense: bool = False
    bias: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Operands:
    """The tensors of a linear: x [M, K], dy [M, N], the weight with `quant` as in the op's
    schema, bias [N], lora_a [R, K], lora_b [N, R], xa fp32 [M, R], seed [1]; None of what it lacks."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    quant: tuple
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    xa: Tensor | None
    dropout_p: float
    seed: Tensor | None

    @property
    def linear(self) -> Linear:
        n, k = self.dy.shape[1], self.x.shape[1]
        adapter = self.lora_a, self.lora_b, 1.0, self.dropout_p, self.seed
        return Linear(self.weight, self.quant, n, k, self.bias, *adapter)

    @classmethod
    def of(cls, s: Shape, place: str = "meta") -> Operands:
        """On `place`, uninitialized."""
        new = functools.partial(torch.empty, dtype=s.dtype, device=place)
        low = functools.partial(new, dtype=s.lora_dtype or s.dtype)
        single = functools.partial(new, dtype=torch.float32)
        weight, quant = new(s.n, s.k), (None,) * 6
        if not s.dense:
            weight = new((s.n * s.k + 1) // 2, dtype=torch.uint8)
            blocks, nested = ceil_div(s.n * s.k, s.blocksize), (None,) * 4
            if s.nested:
                parts = ceil_div(blocks, 256)
                nested = new(blocks, dtype=torch.uint8), single(256), single(parts), single(1)
            quant = (single(16), None if s.nested else single(blocks), *nested)
        adapter = (low(s.r, s.k), low(s.n, s.r), single(s.m, s.r)) if s.r else (None,) * 3
        dropped = s.dropout and s.r > 0
        return cls(
            new(s.m, s.k),
            new(s.m, s.n),
            weight,
            (*quant, s.blocksize, 256),
            new(s.n) if s.bias else None,
            *adapter,
            0.1 if dropped else 0.0,
            new(1, dtype=torch.int64) if dropped else None,
        )


def forward_plan(shape: Shape, device: Device = INTERPRETED) -> list[Launch]:
    """The launches of the forward pass."""
    from . import gpu

    o = Operands.of(shape)
    with planning(device) as launches:
        gpu.forward(o.x, o.linear)
    return launches


def backward_plan(shape: Shape, device: Device = INTERPRETED) -> list[Launch]:
    """The launches of the backward pass that gives dx and every gradient of the adapter and the bias."""
    from . import gpu

    o, adapter = Operands.of(shape), shape.r > 0
    with planning(device) as launches:
        gpu.backward(o.dy, o.x, o.linear, o.xa, Needs(True, shape.bias, adapter, adapter))
    return launches


def choices(shape: Shape, device: Device = INTERPRETED) -> tuple[Choice, Choice]:
    """What the forward and the backward pass choose."""
    from . import gpu

    o = Operands.of(shape)
    with planning(device):
        forward, backward = (gpu.choose(t, o.quant, shape.n, shape.k, forward=t is o.x) for t in (o.x, o.dy))
    return forward, backward


def device_for(x: Tensor) -> Device:
    """The GPU that x lies on, with the kernels that are built for it."""
    return replace(device_of(x), cuda=use_cuda_kernels(x))


def explain(x: Tensor, m: int, n: int, k: int, r: int) -> str:
    """The launches of forward and backward for x of m rows and a nested NF4 weight [n, k], and why these."""
    device = device_for(x)
    shape = Shape(m, n, k, r, dtype=x.dtype)
    plans: tuple[tuple[str, Callable], ...] = ("forward", forward_plan), ("backward", backward_plan)
    out = []
    for (name, plan), choice in zip(plans, choices(shape, device), strict=True):
        listed = ", ".join(launch.name for launch in plan(shape, device))
        gemm = f" with {choice.gemm}" if choice.gemm else ""
        out.append(f"{name} {choice.regime}{gemm} ({choice.why}): {listed}")
    return "; ".join(out)
