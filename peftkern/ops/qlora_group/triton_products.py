"""A group's products with decoded slabs in our own GEMM: every y in one launch; dx over all members'
contractions in one, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, specialization
from ...runtime.plan import Launch, nbytes, work
from ...runtime.specialization import Specialization
from ..qlora_linear.triton_matmul import MatmulConfig, block_r, default_config, low_mode
from ..qlora_linear.triton_matmul_bodies import finish, matmul_tile, weight_tile
from ..sizes import ceil_div
from ..triton_numerics import dot, dot_fresh, to_fp32
from .triton_passes import Low

__all__ = ["dx_call", "specializations", "y_call"]


@triton.jit(do_not_specialize=("M",))
def _group_y_matmul_kernel(
    x_ptr,
    slabs,
    biases,
    xas,
    adapters,
    scalings,
    ys,
    M,
    N,
    K,
    split_steps,
    MEMBERS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOW: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x W^T + s xa B^T + bias, the members' tiles one after the other."""
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(MEMBERS):
        programs = tl.cdiv(M, BLOCK_M) * tl.cdiv(N[i], BLOCK_N)
        if (pid >= first) & (pid < first + programs):
            matmul_tile(
                pid - first,
                x_ptr,
                slabs[i],
                None,
                None,
                None,
                None,
                None,
                None,
                biases[i],
                xas[i],
                adapters[i],
                None,
                0,
                scalings[i],
                ys[i],
                M,
                N[i],
                K,
                K,
                K,
                RANKS[i],
                N[i],
                0,
                split_steps,
                64,
                256,
                -1,
                "PORTABLE",
                True,
                RANKS[i],
                BLOCK_R,
                1,
                LOW,
                "ieee",
                EVEN,
                1,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP_M,
            )
        first += programs


@triton.jit
def _contract(
    acc,
    dy_ptr,
    slab_ptr,
    row0,
    col0,
    M,
    K,
    N,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] + dy [M, N] W [N, K]; BLOCK_K steps over N at a time."""
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    dy_ptrs = dy_ptr + tl.minimum(row0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None] * N
    for step in range(0, N, BLOCK_K):
        steps = step + tl.arange(0, BLOCK_K)
        dy = (
            tl.load(dy_ptrs + steps[None, :])
            if EVEN
            else tl.load(dy_ptrs + steps[None, :], mask=(steps < N)[None, :], other=0.0)
        )
        weight = weight_tile(
            step,
            col0,
            N,
            K,
            slab_ptr,
            K,
            0,
            0.0,
            None,
            None,
            None,
            None,
            None,
            64,
            256,
            -1,
            "PORTABLE",
            DTYPE,
            BLOCK_K,
            BLOCK_N,
            0 if EVEN else -1,
        )
        acc = dot_fresh(dy, weight, acc, "ieee") if tl.float32 == DTYPE else dot(dy, weight, acc, "ieee")
    return acc


@work(_group_y_matmul_kernel)
def _y_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["x_ptr"], a["slabs"], a["biases"], a["xas"], a["adapters"])
    flops = sum(2 * a["M"] * n * (a["K"] + rank) for n, rank in zip(a["N"], a["RANKS"], strict=True))
    return Launch("matmul", reads, nbytes(a["ys"]), flops)


@triton.jit(do_not_specialize=("M",))
def _group_dx_matmul_kernel(
    dys,
    slabs,
    dx_ptr,
    M,
    N,
    K,
    MEMBERS: tl.constexpr,
    EVEN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dx (+)= the sum over members of dy W, a tile a program, in `matmul_tile`'s order of tiles."""
    tile, row_blocks, col_blocks = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    first_block = tile // (GROUP_M * col_blocks) * GROUP_M
    height = tl.minimum(row_blocks - first_block, GROUP_M)
    row0 = (first_block + tile % (GROUP_M * col_blocks) % height) * BLOCK_M
    col0 = tile % (GROUP_M * col_blocks) // height * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ACCUMULATE:
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        acc += to_fp32(tl.load(dx_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=mask, other=0.0))
    for i in tl.static_range(MEMBERS):
        acc = _contract(acc, dys[i], slabs[i], row0, col0, M, K, N[i], EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    finish(acc, None, dx_ptr, K, row0, col0, M, K, BLOCK_M, BLOCK_N)


@work(_group_dx_matmul_kernel)
def _dx_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["dys"], a["slabs"], a["dx_ptr"] if a["ACCUMULATE"] else None)
    return Launch("matmul", reads, nbytes(a["dx_ptr"]), 2 * a["M"] * a["K"] * sum(a["N"]))


def _config(x: Tensor, j: int, c: int, arch: int) -> MatmulConfig:
    return default_config(x.shape[0], j, c, arch=arch, dtype=x.dtype, dense=True)


def _call(
    kernel: Any, columns: Sequence[int], m: int, arguments: dict[str, Any], config: MatmulConfig
) -> Call:
    blocks = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    programs = ceil_div(m, config.block_m) * sum(ceil_div(n, config.block_n) for n in columns)
    return Call(kernel, programs, arguments | blocks, config.num_warps, config.num_stages)


def _low(x: Tensor, lows: Sequence[Low | None], arch: int) -> dict[str, Any]:
    known = [low for low in lows if low is not None]
    mode = low_mode(
        x, known[0].a if known else None, 0 if x.device.type == "cpu" else arch
    )  # 0: the interpreter
    ranks = tuple(0 if low is None else low.rank for low in lows)
    return {"RANKS": ranks or (0,), "BLOCK_R": block_r(max((1, *ranks)), mode), "LOW": mode}


def y_call(
    x: Tensor,
    slabs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Low | None],
    xas: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    *,
    arch: int,
) -> Call:
    """y [M, N] = x W^T + s xa B^T + bias of all members given; slabs [N, K] of x's dtype."""
    (m, k), ns = x.shape, tuple(y.shape[1] for y in ys)
    config = _config(x, max(ns), k, arch)
    arguments = {
        "x_ptr": x,
        "slabs": tuple(slabs),
        "biases": tuple(biases),
        "xas": tuple(xas),
        "ys": tuple(ys),
        "M": m,
        "N": ns,
        "K": k,
    }
    arguments |= {
        "adapters": tuple(None if low is None else low.b for low in lows),
        "MEMBERS": len(ys),
        **_low(x, lows, arch),
    }
    arguments |= {
        "scalings": tuple(1.0 if low is None else float(low.scaling) for low in lows),
        "EVEN": k % config.block_k == 0,
    }
    arguments |= {"split_steps": ceil_div(k, config.block_k) * config.block_k}
    return _call(_group_y_matmul_kernel, ns, m, arguments, config)


def dx_call(
    dys: Sequence[Tensor], slabs: Sequence[Tensor], dx: Tensor, *, accumulate: bool, arch: int
) -> Call:
    """dx [M, K] = the sum of dy W; `accumulate`: added to what dx holds.

    A low-rank part in here, with a mask an adapter, would hold a second accumulator, which spills on sm_86
    and sm_90.
    """
    (m, k), ns = dx.shape, tuple(dy.shape[1] for dy in dys)
    config = _config(dx, k, max(ns), arch)
    if config.block_m * config.block_n >= 128 * 128:  # with 4 warps sm_86 spills 128 bytes a thread
        config = replace(config, num_warps=8)
    arguments = {
        "dys": tuple(dys),
        "slabs": tuple(slabs),
        "dx_ptr": dx,
        "M": m,
        "N": ns,
        "K": k,
        "MEMBERS": len(dys),
    }
    arguments |= {"EVEN": all(n % config.block_k == 0 for n in ns), "ACCUMULATE": accumulate}
    return _call(_group_dx_matmul_kernel, (k,), m, arguments, config)


def specializations(arch: int) -> Iterable[Specialization]:
    """q, k and v of an 8B Llama at M = 8192 in 16 bits, both directions: bare, with dropout and biases, with
    adapters in fp32. Activations in fp32 go to cuBLAS."""
    dtype = torch.bfloat16 if arch >= 80 else torch.float16
    for low_dtype, p in ((dtype, 0.0), (dtype, 0.1), (torch.float32, 0.1)):
        m, k, ns = 8192, 4096, (4096, 1024, 1024)
        new = lambda *shape, d=dtype: torch.empty(shape, dtype=d, device="meta")  # noqa: E731
        seed = new(1, d=torch.int64) if p else None
        lows = [Low(new(16, k, d=low_dtype), new(n, 16, d=low_dtype), 0.5, p, seed) for n in ns]
        slabs, ys, low = (
            [new(n, k) for n in ns],
            [new(m, n) for n in ns],
            [new(m, 16, d=torch.float32) for _ in ns],
        )
        title = f"{str(dtype)[6:]}-{str(low_dtype)[6:]}-p{round(100 * p)}"
        promises = {"expects_mma": arch >= 80, "wide_loads": ("weight_ptrs",) if arch >= 80 else ()}
        biases = [new(n) if p else None for n in ns]
        yield specialization(
            f"y-{title}", y_call(new(m, k), slabs, biases, lows, low, ys, arch=arch), **promises
        )
    for accumulate in (True, False):
        call = dx_call(ys, slabs, new(m, k), accumulate=accumulate, arch=arch)
        yield specialization(f"dx-{str(dtype)[6:]}-{'onto' if accumulate else 'bare'}", call, **promises)
