"""The GPU launches of a group, and of a decoder layer made of groups, with the bytes and operations of each:
what `gpu.py` does, as data.

A test runs `gpu.py` under Triton's interpreter and compares. Bytes are counted as in `qlora_linear/plan.py`:
those of device memory, once each. A tile of x or dy that neighbouring programs of one launch read comes from
memory once, the other times from L2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..qlora_linear import plan as single
from ..qlora_linear.config import Choice
from ..qlora_linear.plan import Launch, Shape

__all__ = [
    "LLAMA_8B",
    "Layer",
    "batches",
    "decoder_layer_plan",
    "group_backward_plan",
    "group_forward_plan",
    "merges",
]


def batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of `sizes`, in order, in runs that sum up to at most `limit`, or are single."""
    out: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if not out or total + size > limit:
            out.append([])
            total = 0
        out[-1].append(i)
        total += size
    return out


def slab_launches(s: Shape) -> int:
    """Bytes of the decoded weight."""
    return s.n * s.k * s.itemsize


def merges(shapes: Sequence[Shape], choice: Choice) -> bool:
    """Whether members of these sizes, at most one adapter each, on all rows, run in merged launches."""
    return (
        choice.regime == "slab"
        and len(shapes) > 1
        and all(s.dense or slab_launches(s) <= choice.slab_bytes for s in shapes)
    )


def _batches(shapes: Sequence[Shape], choice: Choice) -> list[list[Shape]]:
    found = batches([0 if s.dense else slab_launches(s) for s in shapes], choice.slab_bytes)
    return [[shapes[i] for i in batch] for batch in found]


def _merged(name: str, launches: Sequence[Launch]) -> Launch:
    """Side by side in one launch."""
    sums = (sum(getattr(one, key) for one in launches) for key in ("reads", "writes", "flops", "ops"))
    return Launch(name, *sums)


def _decoding(batch: Sequence[Shape], beside: Launch | None) -> list[Launch]:
    """What a batch begins with: its members decoded, beside a pass over an activation; dense ones need
    nothing."""
    found = [one for s in batch for one in single.slab_launches(s, s.n * s.k, None)]
    parts = ([_merged("slab", found)] if found else []) + ([] if beside is None else [beside])
    return [_merged("+".join(one.name for one in parts), parts)] if parts else []


def _mask(shapes: Iterable[Shape]) -> int:
    return sum(single.PHILOX_OPS * s.m * s.k for s in shapes if s.r and s.dropout)


def group_forward_plan(shapes: Sequence[Shape], choice: Choice) -> list[Launch]:
    """The launches of the forward pass of members that share x; r = 0: without an adapter."""
    if not merges(shapes, choice):
        return [one for s in shapes for one in single.forward_plan(s, choice)]
    low, first = [s for s in shapes if s.r], shapes[0]
    adapters = sum(s.adapter(s.k) for s in low)
    xa = (
        Launch(
            "xa", first.x + adapters, sum(s.xa for s in low), sum(s.gemm(s.r, s.k) for s in low), _mask(low)
        )
        if low
        else None
    )
    out: list[Launch] = []
    for index, batch in enumerate(_batches(shapes, choice)):
        out += _decoding(batch, xa if index == 0 else None)
        if choice.gemm == "triton":
            reads = first.x + sum(slab_launches(s) + _low_reads(s) for s in batch)
            out.append(
                Launch("matmul", reads, sum(s.y for s in batch), sum(s.gemm(s.n, s.k + s.r) for s in batch))
            )
            continue
        if index == 0 and low:
            flops = sum(s.gemm(s.n, s.r) for s in low)
            out.append(Launch("y_epilogue", sum(_low_reads(s) for s in low), sum(s.y for s in low), flops))
        out += [
            Launch("mm", s.x + slab_launches(s) + (s.y if s.r else 0), s.y, s.gemm(s.n, s.k)) for s in batch
        ]
    return out


def _low_reads(s: Shape) -> int:
    return (s.xa + s.adapter(s.n) if s.r else 0) + (s.itemsize * s.n if s.bias else 0)


def group_backward_plan(shapes: Sequence[Shape], choice: Choice) -> list[Launch]:
    """The launches of the backward pass that gives dx and every gradient of adapters and biases."""
    if not merges(shapes, choice):
        return _composed_backward(shapes, choice)
    low, first, out = [s for s in shapes if s.r], shapes[0], []
    dy = _dy_pass([s for s in shapes if s.r or s.bias])
    to_dx = sum(s.xa + s.adapter(s.k) for s in low)
    partials = sum(single.partial_sums(s, s.k) for s in low)
    d_lora_a = Launch(
        "x_pass", first.x + sum(s.xa for s in low), partials, sum(s.gemm(s.k, s.r) for s in low), _mask(low)
    )
    for index, batch in enumerate(_batches(shapes, choice)):
        out += _decoding(batch, dy if index == 0 else None)
        if index == 0 and low:
            out.append(
                Launch(
                    "x_pass", d_lora_a.reads + to_dx, partials + first.x, 2 * d_lora_a.flops, 2 * d_lora_a.ops
                )
            )
        if choice.gemm == "triton":
            reads = sum(s.y + slab_launches(s) for s in batch) + (first.x if low or index else 0)
            out.append(Launch("matmul", reads, first.x, sum(s.gemm(s.k, s.n) for s in batch)))
            continue
        for at, s in enumerate(batch):
            added = first.x if low or index or at else 0
            out.append(Launch("mm", s.y + slab_launches(s) + added, first.x, s.gemm(s.k, s.n)))
    return out + _reduce([s for s in shapes if s.r or s.bias])


def _dy_pass(shapes: Sequence[Shape]) -> Launch | None:
    if not shapes:
        return None
    each = [
        Launch(
            "",
            s.y + (s.xa + s.adapter(s.n) if s.r else 0),
            s.xa + single.partial_sums(s, s.n),
            2 * s.gemm(s.n, s.r),
        )
        for s in shapes
    ]
    return _merged("dy_pass", each)


def _reduce(shapes: Sequence[Shape]) -> list[Launch]:
    each = [
        Launch(
            "",
            single.partial_sums(s, s.n) + (single.partial_sums(s, s.k) if s.r else 0),
            s.adapter(s.n) + s.adapter(s.k) + (4 * s.n if s.bias else 0),
        )
        for s in shapes
    ]
    return [_merged("reduce", each)] if each else []


def _composed_backward(shapes: Sequence[Shape], choice: Choice) -> list[Launch]:
    """Member by member, each further dx added by a pass of its own."""
    out: list[Launch] = []
    for at, s in enumerate(shapes):
        out += single.backward_plan(s, choice)
        out += [Launch("add", 2 * s.x, s.x)] if at else []
    return out


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
    shape: Shape, forward: Choice, backward: Choice, layer: Layer = LLAMA_8B, *, seq: int = 2048
) -> list[Launch]:
    """Every launch of one patched decoder layer, forward then backward; `shape` gives m and the options, its
    n and k are not used.

    q/k/v and gate/up are groups, o and down single linears. Norms (whose weights are frozen), RoPE and the
    gated product are ours, a launch a direction; the backward of the MLP forms its product again, beside
    cuBLAS in a launch of its own. The residual addition before the second norm and the two in backward, where
    a branch's gradient meets the stream's, are inside the norms; the last one is torch's. Attention is
    torch's SDPA by FlashAttention 2, causal: one launch; backward three (rows of dO * O, the gradients, dq to
    16 bits), and with fewer kv heads than heads the sums of dk and of dv (read in its source).
    """
    h, i, kv = layer.hidden, layer.intermediate, layer.kv_heads * layer.dim
    q = layer.heads * layer.dim
    of = lambda n, k: replace(shape, n=n, k=k)  # noqa: E731
    qkv, o, gate_up, down = [of(q, h), of(kv, h), of(kv, h)], of(h, q), [of(i, h)] * 2, of(h, i)
    stream, angles = of(h, h).x, 2 * 4 * seq * layer.dim
    heads, hidden = of(q + kv, h).y, of(i, h).y
    one = lambda name, reads, writes: Launch(name, reads * stream, writes * stream)  # noqa: E731
    norm, add_norm, d_norm, add = (
        one("rms_norm", 1, 1),
        one("add_rms_norm", 2, 2),
        one("d_add_rms_norm", 3, 1),
        one("add", 2, 1),
    )
    rope = Launch("rope", heads + angles, heads)
    glu, d_glu = Launch("glu", 2 * hidden, hidden), Launch("d_glu", 3 * hidden, 2 * hidden)
    attention = _attention(shape, layer, seq)
    first = [norm, *group_forward_plan(qkv, forward), rope, attention[0], *single.forward_plan(o, forward)]
    second = [add_norm, *group_forward_plan(gate_up, forward), glu, *single.forward_plan(down, forward), add]
    back = [*_down_backward(down, backward, glu, d_glu), *group_backward_plan(gate_up, backward), d_norm]
    back += [
        *single.backward_plan(o, backward),
        *attention[1:],
        rope,
        *group_backward_plan(qkv, backward),
        d_norm,
    ]
    return [*first, *second, *back]


def _down_backward(s: Shape, choice: Choice, glu: Launch, d_glu: Launch) -> list[Launch]:
    """The MLP's last linear and its input's gradients. dA reads that input again: it is formed with its
    gradient, where dx comes first."""
    launches = single.backward_plan(s, choice)
    if not s.r:
        return [*launches, d_glu]
    at = next(i for i, one in enumerate(launches) if one.name == "x_pass")
    if choice.gemm == "cublas":  # whose plan begins dx there
        return [*launches[:at], glu, *launches[at:], d_glu]
    return [*launches[:at], replace(d_glu, writes=d_glu.writes + glu.writes), *launches[at:]]


def _attention(s: Shape, layer: Layer, seq: int) -> list[Launch]:
    """Forward, then the backward's launches. FLOPs of a causal product are half of the square's."""
    q, kv = s.m * layer.heads * layer.dim * s.itemsize, s.m * layer.kv_heads * layer.dim * s.itemsize
    product, sums = s.m * seq * layer.heads * layer.dim, 4 * s.m * layer.heads
    wide = 2 * q // s.itemsize * 2  # dq's fp32 sums
    out = [
        Launch("flash_fwd", q + 2 * kv, q + sums, 2 * product),
        Launch("flash_bwd_dot", 2 * q, sums + wide),
        Launch("flash_bwd", 2 * q + 2 * kv + 2 * sums + wide, 2 * q + wide, 5 * product),
        Launch("flash_bwd_convert", wide, q),
    ]
    return out + ([Launch("sum", q, kv)] * 2 if layer.kv_heads < layer.heads else [])
