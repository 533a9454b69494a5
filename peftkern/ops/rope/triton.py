"""Rotary position embedding of q and k in one launch: a program turns a few heads of one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


@triton.jit
def _rope_kernel(
    q_ptr,  # [batch, q_heads, seq, dim], strides below
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,  # [batch or 1, seq, 2 * HALF]
    sin_ptr,
    q_heads,
    k_heads,
    seq,
    dim,
    angle_batch,  # 0: one for all
    q_batch,
    q_head,
    q_seq,
    k_batch,
    k_head,
    k_seq,
    q_out_batch,
    q_out_head,
    q_out_seq,
    k_out_batch,
    k_out_head,
    k_out_seq,
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
    if group < q_groups:
        _rope_tile(
            q_ptr + b * q_batch + s * q_seq,
            q_out_ptr + b * q_out_batch + s * q_out_seq,
            cos_ptr + angle,
            sin_ptr + angle,
            group * HEADS + tl.arange(0, HEADS),
            q_heads,
            q_head,
            q_out_head,
            dim,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            INVERSE,
        )
    else:
        _rope_tile(
            k_ptr + b * k_batch + s * k_seq,
            k_out_ptr + b * k_out_batch + s * k_out_seq,
            cos_ptr + angle,
            sin_ptr + angle,
            (group - q_groups) * HEADS + tl.arange(0, HEADS),
            k_heads,
            k_head,
            k_out_head,
            dim,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            INVERSE,
        )


@work(_rope_kernel)
def _rope_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["q_ptr"], a["k_ptr"], a["cos_ptr"], a["sin_ptr"])
    return Launch("rope", reads, nbytes(a["q_out_ptr"], a["k_out_ptr"]))


def call(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor
) -> Call:
    """The op's arguments, each with a contiguous last dimension, cos and sin contiguous."""
    (b, q_heads, s, d), k_heads, rotary = q.shape, k.shape[1], cos.shape[2]
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "q_out_ptr": rotated_q,
        "k_out_ptr": rotated_k,
        "cos_ptr": cos,
        "sin_ptr": sin,
    }
    arguments |= {
        "q_heads": q_heads,
        "k_heads": k_heads,
        "seq": s,
        "dim": d,
        "angle_batch": cos.stride(0) if cos.shape[0] > 1 else 0,
    }
    for name, x in (("q", q), ("k", k), ("q_out", rotated_q), ("k_out", rotated_k)):
        arguments |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_seq"), x.stride()[:3], strict=True))
    q_groups = -(-q_heads // HEADS)
    groups = q_groups + -(-k_heads // HEADS)
    rest = next_power_of_2(d - rotary) if d > rotary else 0
    block_half = next_power_of_2(max(rotary // 2, 1))
    arguments |= {"q_groups": q_groups, "groups": groups, "HEADS": HEADS, "HALF": rotary // 2}
    arguments |= {"BLOCK_HALF": block_half, "BLOCK_REST": rest, "INVERSE": inverse}
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
