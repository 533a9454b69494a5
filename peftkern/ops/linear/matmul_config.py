"""Tiles of the GPU's own products, and how their low-rank part is multiplied: pure functions of sizes and
dtypes, testable on any machine. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sizes import ceil_div, next_power_of_2

__all__ = ["Factors", "Form", "MatmulConfig", "default_config", "factors_of"]


@dataclass(frozen=True)
class MatmulConfig:
    """block_m rows of out by block_n columns a program, block_k contraction steps at a time; split_k programs
    share a contraction; group_m blocks of rows are walked before the next block of columns, which then is
    still in L2."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Form:
    """How a product's kernel reads its weight. forward: y = x W^T, else dx = dy W; words: 4 or 1 words of
    eight codes at a time, all of one block; 0: code by code, rows may start within a byte; -1: dense, in x's
    dtype; even: the contraction is a multiple of block_k."""

    forward: bool
    words: int
    method: str
    blocksize: int
    nested_blocksize: int
    even: bool


@dataclass(frozen=True)
class Factors:
    """The low-rank part of a product's kernel. each: the ranks of the launch's members, 0 of one without an
    adapter; step: ranks at a time; chunks: those of xa or dyb that are summed; mode: how their fp32 rows meet
    an adapter: "split" as a high and a low term of the 16-bit dtype that x and the adapter share (bf16: 16
    bits are kept, and the tile is multiplied twice); otherwise in fp32, the mode being tl.dot's
    input_precision."""

    each: tuple[int, ...]
    step: int
    chunks: int
    mode: str


def default_config(
    m: int,
    j: int,
    c: int,
    *,
    arch: int,
    dtype: torch.dtype,
    dense: bool,
    ragged: bool = False,
    programs: int = 1,
) -> MatmulConfig:
    """For out [m, j] over c contraction steps, meant to fill `programs` multiprocessors; ragged: codes come
    one by one."""
    if ragged:  # a byte and an absmax for each code: small tiles, and no asynchronous copies
        config = MatmulConfig(16 if m <= 16 else 32, 64, 32, num_stages=1)
    elif (
        dtype == torch.float32 or arch < 80
    ):  # no tensor cores: Triton has none on sm_75, nor for fp32 products without TF32
        config = MatmulConfig(16 if m <= 16 else 32, 64, 32, num_warps=8, num_stages=2)
    elif m <= 64:
        config = MatmulConfig(max(16, next_power_of_2(m)), 64, 64, num_stages=4)
    elif dense and arch // 10 in (9, 10):
        config = MatmulConfig(128, 256 if m > 256 else 128, 64, num_warps=8, num_stages=3)
    else:
        config = (
            MatmulConfig(128, 128, 32, num_stages=4) if dense else MatmulConfig(128, 128, 64, num_warps=8)
        )
    tiles = ceil_div(m, config.block_m) * ceil_div(j, config.block_n)
    most = max(
        1, min(c // (16 * config.block_k), 8)
    )  # a split is worth its partial sums where a program keeps 16 steps of its own
    return replace(config, split_k=max(1, min(most, programs // tiles)))


def factors_of(x: Tensor, adapters: list[Tensor | None], ranks: list[int], chunks: int, arch: int) -> Factors:
    """Of the products of x, whose adapters share a dtype; `arch` 0 is the interpreter."""
    adapter = next((t for t in adapters if t is not None), None)
    mode = "ieee" if arch < 80 or x.dtype == torch.float32 else "bf16x3"
    tensor_cores = arch == 0 or arch >= 80 or x.dtype == torch.float16
    if adapter is not None and adapter.dtype == x.dtype != torch.float32 and tensor_cores:
        mode = "split"
    # Few ranks of fp32, which is multiplied in three products whose terms do not fit the registers.
    step = max(16, min(64, next_power_of_2(max(1, *ranks)))) if mode == "split" else 16
    return Factors(tuple(ranks), step, chunks, mode)
