"""The launches of a patched decoder layer: the ops' own plans, and torch's attention from its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkern.ops.linear.group.plan import backward_arguments, group_backward_plan, group_forward_plan
from peftkern.ops.linear.plan import Shape, backward_plan, forward_plan
from peftkern.runtime.plan import INTERPRETED, Device, Launch, planning

__all__ = ["LLAMA_8B", "Layer", "decoder_layer_plan"]


@dataclass(frozen=True)
class Layer:
    """A Llama decoder layer's widths, and the numbers of its heads."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int


LLAMA_8B = Layer(4096, 14336, 32, 8, 128)


def decoder_layer_plan(
    shape: Shape, device: Device = INTERPRETED, layer: Layer = LLAMA_8B, *, seq: int = 2048
) -> list[Launch]:
    """Every launch of one patched decoder layer, forward then backward; `shape` gives m and the options, its
    n and k are not used.

    q/k/v and gate/up are groups, o and down single linears. Norms (whose weights are frozen), RoPE and the
    gated product are ours, a launch a direction. The residual addition before the second norm and the two in
    backward, where a branch's gradient meets the stream's, are inside the norms; the last one is torch's.
    """
    h, i, kv = layer.hidden, layer.intermediate, layer.kv_heads * layer.dim
    q = layer.heads * layer.dim
    qkv, o = [_of(shape, q, h), _of(shape, kv, h), _of(shape, kv, h)], _of(shape, h, q)
    gate_up, down = [_of(shape, i, h)] * 2, _of(shape, h, i)
    norm, add_norm, d_norm, add = _stream(shape, h, device)
    rotate, attention = _rope(shape, layer, seq, device), _attention(shape, layer, seq)
    launches = [*norm, *group_forward_plan(qkv, device), *rotate, attention[0], *forward_plan(o, device)]
    launches += [*add_norm, *group_forward_plan(gate_up, device), *_product(shape, i, device)]
    launches += [*forward_plan(down, device), *add, *_down_backward(down, device)]
    launches += [*group_backward_plan(gate_up, device), *d_norm, *backward_plan(o, device), *attention[1:]]
    return [*launches, *rotate, *group_backward_plan(qkv, device), *d_norm]


def _of(shape: Shape, n: int, k: int) -> Shape:
    return replace(shape, n=n, k=k)


def _planned(device: Device, call: Callable[..., Any], *args: Any) -> list[Launch]:
    with planning(device) as launches:
        call(*args)
    return launches


def _stream(shape: Shape, h: int, device: Device) -> list[list[Launch]]:
    """The first norm, the second with the stream's addition, a norm's backward with one, an addition."""
    from peftkern.ops.rms_norm import triton as rms_norm

    x, weight = (torch.empty(size, dtype=shape.dtype, device="meta") for size in ((shape.m, h), (h,)))
    rstd = torch.empty(shape.m, dtype=torch.float32, device="meta")
    return [
        _planned(device, rms_norm.forward, x, weight, 1e-5, 0.0, "llama"),
        _planned(device, rms_norm.add_forward, x, x, weight, 1e-5, 0.0, "llama"),
        _planned(device, rms_norm.add_backward, x, x, x, weight, rstd, 0.0, "llama", False),
        _planned(device, torch.add, x, x),
    ]


def _rope(shape: Shape, layer: Layer, seq: int, device: Device) -> list[Launch]:
    """q and k rotated; backward the same the other way."""
    from peftkern.ops.rope.triton import rope

    def heads(count: int) -> torch.Tensor:
        size = (shape.m // seq, seq, count, layer.dim)
        return torch.empty(size, dtype=shape.dtype, device="meta").transpose(1, 2)

    q, k = heads(layer.heads), heads(layer.kv_heads)
    angles = torch.empty((1, seq, layer.dim), dtype=shape.dtype, device="meta")
    return _planned(device, rope, q, k, angles, angles, False, q, k)


def _product(shape: Shape, width: int, device: Device) -> list[Launch]:
    from peftkern.ops.glu import triton as glu

    gate = torch.empty((shape.m, width), dtype=shape.dtype, device="meta")
    return _planned(device, glu.forward, gate, gate, "silu")


def _down_backward(s: Shape, device: Device) -> list[Launch]:
    """The MLP's last linear and its input's gradients."""
    from peftkern.ops.linear.glu import gpu

    (dy,), _, *linear = backward_arguments([s])
    gate = torch.empty((s.m, s.k), dtype=s.dtype, device="meta")
    return _planned(device, gpu.backward, dy, gate, gate, "silu", gate, gate, *linear)


def _attention(s: Shape, layer: Layer, seq: int) -> list[Launch]:
    """torch's SDPA by FlashAttention 2, causal, read in its source: one launch forward; backward three (rows
    of dO * O, the gradients, dq to 16 bits), and with fewer kv heads than heads the sums of dk and of dv.
    FLOPs of a causal product are half of the square's."""
    itemsize = s.dtype.itemsize
    q, kv = s.m * layer.heads * layer.dim * itemsize, s.m * layer.kv_heads * layer.dim * itemsize
    product, sums = s.m * seq * layer.heads * layer.dim, 4 * s.m * layer.heads
    wide = 2 * q // itemsize * 2  # dq's fp32 sums
    out = [
        Launch("flash_fwd", q + 2 * kv, q + sums, 2 * product),
        Launch("flash_bwd_dot", 2 * q, sums + wide),
        Launch("flash_bwd", 2 * q + 2 * kv + 2 * sums + wide, 2 * q + wide, 5 * product),
        Launch("flash_bwd_convert", wide, q),
    ]
    return out + ([Launch("sum", q, kv)] * 2 if layer.kv_heads < layer.heads else [])
