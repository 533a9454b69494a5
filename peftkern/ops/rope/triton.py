"""Rotary position embedding of q and k in one launch: a program turns a few heads of one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import Launch, nbytes, work
from ...runtime.replay import replayed
from ...runtime.specialization import Specialization
from ..sizes import next_power_of_2
from ..triton_numerics import round_to, to_fp32

__all__ = ["call", "rope", "specializations"]

HEADS, WARPS = 8, 4  # heads of a program. Not measured.


@triton.jit
def _rope_tile(
    x_ptr,  # the token's heads, x_head apart
    y_ptr,
    cos_ptr,  # [2 * HALF], the token's
    sin_ptr,
    head,  # [HEADS]
    heads,
    x_head,
    y_head,
    dim,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: everything is turned
    INVERSE: tl.constexpr,
):
    inside = (head < heads)[:, None]
    # [HEADS, 1]
    from_ptr, to_ptr = (
        x_ptr + head.to(tl.int64)[:, None] * x_head,
        y_ptr + head.to(tl.int64)[:, None] * y_head,
    )
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    if HALF > 0:
        i = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
        mask = inside & (i < HALF)
        c1, c2 = (
            to_fp32(tl.load(cos_ptr + i, mask=i < HALF)),
            to_fp32(tl.load(cos_ptr + HALF + i, mask=i < HALF)),
        )
        s1, s2 = (
            to_fp32(tl.load(sin_ptr + i, mask=i < HALF)),
            to_fp32(tl.load(sin_ptr + HALF + i, mask=i < HALF)),
        )
        x1, x2 = to_fp32(tl.load(from_ptr + i, mask=mask)), to_fp32(tl.load(from_ptr + HALF + i, mask=mask))
        y1 = x1 * c1 + x2 * s2 if INVERSE else x1 * c1 - x2 * s1
        y2 = x2 * c2 - x1 * s1 if INVERSE else x2 * c2 + x1 * s2
        tl.store(to_ptr + i, round_to(y1, DTYPE), mask=mask)
        tl.store(to_ptr + HALF + i, round_to(y2, DTYPE), mask=mask)
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]  # [1, BLOCK_REST]
        tl.store(
            to_ptr + rest, tl.load(from_ptr + rest, mask=inside & (rest < dim)), mask=inside & (rest < dim)
        )


class Turned(NamedTuple):
    """q or k [batch, heads, seq, dim] and what it becomes, with their strides."""

    x: Any
    out: Any
    heads: Any
    batch: Any
    head: Any
    seq: Any
    out_batch: Any
    out_head: Any
    out_seq: Any


@triton.jit
def _turn(
    t,  # `Turned`
    b,
    s,
    first,  # of the program's heads
    cos_ptr,  # [2 * HALF], the token's
    sin_ptr,
    dim,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    x_ptr, y_ptr = t.x + b * t.batch + s * t.seq, t.out + b * t.out_batch + s * t.out_seq
    head = first + tl.arange(0, HEADS)
    args = (x_ptr, y_ptr, cos_ptr, sin_ptr, head, t.heads, t.head, t.out_head, dim)
    _rope_tile(*args, HALF, BLOCK_HALF, BLOCK_REST, INVERSE)


@triton.jit
def _rope_kernel(
    q,  # `Turned`
    k,
    cos_ptr,  # [batch or 1, seq, 2 * HALF]
    sin_ptr,
    seq,
    dim,
    angle_batch,  # 0: one for all
    q_groups,  # programs of a token for q, and for q and k
    groups,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) // groups
    group = tl.program_id(0) % groups
    b, s = token // seq, token % seq
    angle = b * angle_batch + s * (2 * HALF)
    cos, sin = cos_ptr + angle, sin_ptr + angle
    if group < q_groups:
        _turn(q, b, s, group * HEADS, cos, sin, dim, HEADS, HALF, BLOCK_HALF, BLOCK_REST, INVERSE)
    else:
        first = (group - q_groups) * HEADS
        _turn(k, b, s, first, cos, sin, dim, HEADS, HALF, BLOCK_HALF, BLOCK_REST, INVERSE)


@work(_rope_kernel)
def _rope_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["q"].x, a["k"].x, a["cos_ptr"], a["sin_ptr"])
    return Launch("rope", reads, nbytes(a["q"].out, a["k"].out))


def _turned(x: Tensor, out: Tensor) -> Turned:
    return Turned(x, out, x.shape[1], *x.stride()[:3], *out.stride()[:3])


def call(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor
) -> Call:
    """The op's arguments, each with a contiguous last dimension, cos and sin contiguous."""
    (b, q_heads, s, d), k_heads, rotary = q.shape, k.shape[1], cos.shape[2]
    q_groups = -(-q_heads // HEADS)
    groups = q_groups + -(-k_heads // HEADS)
    arguments: dict[str, Any] = {
        "q": _turned(q, rotated_q),
        "k": _turned(k, rotated_k),
        "cos_ptr": cos,
        "sin_ptr": sin,
        "seq": s,
        "dim": d,
        "angle_batch": cos.stride(0) if cos.shape[0] > 1 else 0,
        "q_groups": q_groups,
        "groups": groups,
        "HEADS": HEADS,
        "HALF": rotary // 2,
        "BLOCK_HALF": next_power_of_2(max(rotary // 2, 1)),
        "BLOCK_REST": next_power_of_2(d - rotary) if d > rotary else 0,
        "INVERSE": inverse,
    }
    return Call(_rope_kernel, b * s * groups, arguments, WARPS, 1)


@replayed()
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor
) -> None:
    """As the reference."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    launch = call(q, k, cos.contiguous(), sin.contiguous(), inverse, rotated_q, rotated_k)
    if launch.programs and q.shape[-1]:
        run(launch)


def specializations(arch: int) -> Iterator[Specialization]:
    """Both directions and each dtype: whole and partial rotation, a head that is no power of two."""
    dtypes = (
        (torch.float16, torch.bfloat16, torch.float32)
        if arch < 80
        else (torch.bfloat16, torch.float16, torch.float32)
    )
    for dtype in dtypes:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for dim, rotary in ((128, 128), (64, 64), (256, 256), (96, 72), (80, 20)):
            q = torch.empty(2, 64, 32, dim, dtype=dtype, device="meta").transpose(1, 2)
            k = torch.empty(2, 64, 8, dim, dtype=dtype, device="meta").transpose(1, 2)
            angles = torch.empty(1, 64, rotary, dtype=dtype, device="meta")
            for inverse in (False, True):
                name = f"rope-{short}-{dim}-{rotary}-{'bwd' if inverse else 'fwd'}"
                yield specialization(name, call(q, k, angles, angles, inverse, q, k))
