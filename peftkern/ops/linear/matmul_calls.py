"""The launches of the own products: what each kernel of `triton_matmul` is given, which bytes it moves and
what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...runtime.launch import Call, run
from ...runtime.plan import DECODE_OPS, PHILOX_OPS, Launch, device_of, nbytes, work
from ..sizes import ceil_div, weight_bytes
from ..triton_nf4 import Packed, decode_method, group_words
from .kernels.triton_matmul import DxTerm, ProductOperands, dx_sum_kernel, matmul_kernel, matmul_reduce_kernel
from .matmul_config import Form, MatmulConfig, default_config, factors_of

__all__ = ["DENSE", "Product", "dx_sum_call", "group_call", "matmul_dx", "matmul_forward", "product_calls"]

REDUCE_M, REDUCE_N = 32, 64  # a tile of the second launch; not measured
DENSE = (None,) * 6 + (64, 256)  # the op's tuple of a weight that is not packed


@dataclass(frozen=True)
class Product:
    """One output, out [M, J]: x times the weight, the low-rank rows `low` times `adapter`, the bias."""

    weight: Tensor
    quant: tuple  # the op's
    out: Tensor
    bias: Tensor | None = None
    low: Tensor | None = None
    adapter: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    first_col: int = 0

    @property
    def rank(self) -> int:
        return 0 if self.low is None else self.low.shape[-1]

    def words(self, forward: bool, contraction: int) -> int:
        """How the weight is read, `Form.words`."""
        if self.quant[0] is None:
            return -1
        return group_words(self.weight, contraction if forward else self.out.shape[1])

    def operands(self) -> ProductOperands:
        *tables, _, _ = self.quant
        dense, low = self.quant[0] is None, self.rank > 0
        return ProductOperands(
            self.weight if dense else Packed(self.weight, *tables),
            self.weight.stride(0) if dense else 0,
            self.bias,
            self.low if low else None,
            self.adapter if low else None,
            self.adapter.stride(0) if low else 0,
            float(self.scaling),
            self.seed if low else None,
            self.first_col,
            self.out,
            self.out.stride(0),
            self.out.shape[1],
        )


def product_calls(
    x: Tensor, products: Sequence[Product], config: MatmulConfig, *, forward: bool, arch: int
) -> list[Call]:
    """The products of x [M, C], of dense weights where there are several, and where the contraction is split,
    of one alone, the launch that adds up; `arch` 0 is the interpreter."""
    (m, c), one = x.shape, products[0]
    steps = max(1, ceil_div(c, config.split_k * config.block_k)) * config.block_k
    splits = max(1, ceil_div(c, steps))
    words, tiles = one.words(forward, c), replace(config, split_k=splits)
    method = decode_method(x.dtype, arch) if words > 0 else "PORTABLE"
    chunks = one.low.shape[0] if one.rank and one.low.dim() == 3 else 1
    adapters, ranks = [p.adapter for p in products], [p.rank for p in products]
    operands = [p.operands() for p in products]
    partials = one.out
    if splits > 1:
        partials = torch.empty((splits, *one.out.shape), dtype=torch.float32, device=x.device)
    thresholds = [0 if p.seed is None else round(p.dropout_p * 65536) for p in products]
    arguments = {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "members": tuple(operands) if splits == 1 else (operands[0]._replace(out=partials),),
        "thresholds": tuple(thresholds),
        "M": m,
        "C": c,
        "split_steps": steps,
        "FACTORS": factors_of(x, adapters, ranks, chunks, arch),
        "FORM": Form(forward, words, method, *one.quant[6:], c % config.block_k == 0),
        "TILES": tiles,
    }
    programs = _programs(m, [p.out.shape[1] for p in products], config) * splits
    product = Call(matmul_kernel, programs, arguments, config.num_warps, config.num_stages)
    if splits == 1:
        return [product]
    arguments = {
        "partials_ptr": partials,
        "member": operands[0],
        "threshold": thresholds[0],
        "M": m,
        "FACTORS": arguments["FACTORS"],
        "FORWARD": forward,
        "SPLIT_K": splits,
        "BLOCK_M": REDUCE_M,
        "BLOCK_N": REDUCE_N,
    }
    programs = ceil_div(m, REDUCE_M) * ceil_div(one.out.shape[1], REDUCE_N)
    return [product, Call(matmul_reduce_kernel, programs, arguments, 4, 1)]


def _programs(m: int, columns: Sequence[int], config: MatmulConfig) -> int:
    return ceil_div(m, config.block_m) * sum(ceil_div(n, config.block_n) for n in columns)


@work(matmul_kernel)
def _matmul_work(a: Mapping[str, Any]) -> Launch:
    """x is read once for all members, a 4-bit weight once and decoded for every block of rows; of a split
    contraction the second launch does the rest."""
    m, c, form, tiles = a["M"], a["C"], a["FORM"], a["TILES"]
    found = Launch("matmul" if form.words < 0 else "fused", nbytes(a["x_ptr"]), 0)
    for one, rank in zip(a["members"], a["FACTORS"].each, strict=True):
        end = _epilogue_work(one, m, rank) if tiles.split_k == 1 else Launch("", 0, nbytes(one.out))
        reads, ops, size = nbytes(one.weight), 0, one.columns * c
        if form.words >= 0:
            reads = weight_bytes(size, one.weight.absmax, form.blocksize, form.nested_blocksize)
            ops = DECODE_OPS * size * ceil_div(m, tiles.block_m)
        product = Launch("", reads, 0, 2 * m * size, ops)
        found = replace(found.beside(product).beside(end), name=found.name)
    return found


def _epilogue_work(one: ProductOperands, m: int, rank: int) -> Launch:
    """The low-rank product, its mask, the bias and the output."""
    elements, draws = m * one.columns, one.seed is not None
    reads = nbytes(one.low, one.adapter, one.bias)
    return Launch("", reads, nbytes(one.out), 2 * elements * rank, PHILOX_OPS * elements * draws)


@work(matmul_reduce_kernel)
def _matmul_reduce_work(a: Mapping[str, Any]) -> Launch:
    end = _epilogue_work(a["member"], a["M"], a["FACTORS"].each[0])
    return replace(end, name="matmul_reduce", reads=end.reads + nbytes(a["partials_ptr"]))


def group_call(x: Tensor, products: Sequence[Product], *, arch: int) -> Call:
    """y = x W^T + s xa B^T + bias of members with dense weights, in one launch."""
    columns = max(p.out.shape[1] for p in products)
    config = default_config(*(x.shape[0], columns, x.shape[1]), arch=arch, dtype=x.dtype, dense=True)
    (call,) = product_calls(x, products, config, forward=True, arch=0 if x.is_cpu else arch)
    return call


def dx_sum_call(
    dys: Sequence[Tensor], slabs: Sequence[Tensor], dx: Tensor, *, accumulate: bool, arch: int
) -> Call:
    """dx [M, K] = the sum of dy W over members' dy [M, N] and dense W [N, K]; `accumulate`: added to what dx
    holds."""
    (m, k), ns = dx.shape, [dy.shape[1] for dy in dys]
    config = default_config(m, k, max(ns), arch=arch, dtype=dx.dtype, dense=True)
    if config.block_m * config.block_n >= 128 * 128:  # with 4 warps sm_86 spills 128 bytes a thread
        config = replace(config, num_warps=8)
    arguments = {
        "terms": tuple(DxTerm(dy, slab, n) for dy, slab, n in zip(dys, slabs, ns, strict=True)),
        "dx_ptr": dx,
        "M": m,
        "K": k,
        "FORM": Form(False, -1, "PORTABLE", *DENSE[6:], all(n % config.block_k == 0 for n in ns)),
        "TILES": config,
        "ACCUMULATE": accumulate,
    }
    return Call(dx_sum_kernel, _programs(m, [k], config), arguments, config.num_warps, config.num_stages)


@work(dx_sum_kernel)
def _dx_sum_work(a: Mapping[str, Any]) -> Launch:
    reads = nbytes(a["terms"], a["dx_ptr"] if a["ACCUMULATE"] else None)
    columns = sum(term.columns for term in a["terms"])
    return Launch("matmul", reads, nbytes(a["dx_ptr"]), 2 * a["M"] * a["K"] * columns)


def _launch(x: Tensor, product: Product, forward: bool, config: MatmulConfig | None) -> Tensor:
    (m, j), c = product.out.shape, x.shape[1]
    if m == 0 or j == 0:
        return product.out
    arch, programs = (0, 1) if x.is_cpu else (device_of(x).arch, device_of(x).multiprocessors)
    if config is None:
        words = product.words(forward, c)
        form = {"dense": words < 0, "ragged": words == 0, "programs": programs}
        config = default_config(m, j, c, arch=arch or 89, dtype=x.dtype, **form)
    for call in product_calls(x, [product], config, forward=forward, arch=arch):
        run(call)
    return product.out


def matmul_forward(
    x: Tensor,
    weight: Tensor,
    quant: tuple,
    n: int,
    bias: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    scaling: float,
    out: Tensor | None = None,
    config: MatmulConfig | None = None,
) -> Tensor:
    """y [M, n] = x W^T + scaling * xa lora_b^T + bias.

    x [M, K], rows may lie apart; weight packed, or dense [n, K] of x's dtype whose rows may lie apart (code
    None in `quant`, the op's tuple); xa fp32 [M, R], or [parts, M, R] to be summed; lora_b [n, R]; out [M, n]
    of x's dtype, maybe columns of a wider tensor.
    """
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device) if out is None else out
    return _launch(x, Product(weight, quant, out, bias, xa, lora_b, scaling), True, config)


def matmul_dx(
    dy: Tensor,
    weight: Tensor,
    quant: tuple,
    k: int,
    lora_a: Tensor | None,
    dyb: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out: Tensor | None = None,
    config: MatmulConfig | None = None,
    first_col: int = 0,
) -> Tensor:
    """dx [M, k] = dy W + mask * (dyb lora_a), dyb fp32 [M, R] or [parts, M, R] with the scaling in it; the
    rest as in the forward.

    A dense slab of columns of W comes with the same columns of lora_a and of dx as `lora_a` and `out`, and
    with the first one's index within dx, a multiple of 8, as `first_col`.
    """
    out = torch.empty((dy.shape[0], k), dtype=dy.dtype, device=dy.device) if out is None else out
    product = Product(weight, quant, out, None, dyb, lora_a, 1.0, dropout_p, seed, first_col)
    return _launch(dy, product, False, config)
