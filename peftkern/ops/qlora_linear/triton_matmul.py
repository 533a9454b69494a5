"""The base product with everything that belongs to it, one launch: y = x W^T + s xa B^T + bias, or dx = dy W
+ mask * (dyb A).

W is 4-bit, decoded in the product, or a dense slab. Both directions are out [M, J] = x [M, C] times a weight
tile: forward J = N, C = K, and the tile is used transposed; dx J = K, C = N, and it is used as stored. The
low-rank product comes first: it starts the accumulator, so that dropout's mask needs no second one. Where
tiles are few the contraction is split over programs, whose fp32 partial sums a second launch adds in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.launch import Call, run, specialization
from ...runtime.plan import DECODE_OPS, PHILOX_OPS, Launch, device_of, nbytes, work
from ...runtime.specialization import Specialization
from ..sizes import next_power_of_2, weight_bytes
from ..triton_nf4 import absmax_value as absmax_value  # tests/cubins finds it here by name
from ..triton_nf4 import decode_method, group_words
from .triton_matmul_bodies import matmul_tile, reduce_tile

REDUCE_M, REDUCE_N = 32, 64  # a tile of the second launch; not measured

__all__ = ["MatmulConfig", "default_config", "matmul_dx", "matmul_forward", "specializations"]


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


@triton.jit(do_not_specialize=("M", "threshold"))
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    code_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    nested_absmax_ptr,
    absmax_offset_ptr,
    bias_ptr,
    low_ptr,
    adapter_ptr,
    seed_ptr,
    threshold,
    scaling,
    out_ptr,
    M,
    J,
    C,
    x_stride,
    weight_stride,
    adapter_stride,
    out_stride,
    first_col,
    split_steps,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    METHOD: tl.constexpr,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    matmul_tile(
        tl.program_id(0),
        x_ptr,
        weight_ptr,
        code_ptr,
        absmax_ptr,
        absmax_8bit_ptr,
        absmax_code_ptr,
        nested_absmax_ptr,
        absmax_offset_ptr,
        bias_ptr,
        low_ptr,
        adapter_ptr,
        seed_ptr,
        threshold,
        scaling,
        out_ptr,
        M,
        J,
        C,
        x_stride,
        weight_stride,
        adapter_stride,
        out_stride,
        first_col,
        split_steps,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        WORDS,
        METHOD,
        FORWARD,
        RANK,
        BLOCK_R,
        CHUNKS,
        LOW,
        PRECISION,
        EVEN,
        SPLIT_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
    )


@work(_matmul_kernel)
def _matmul_work(a: Mapping[str, Any]) -> Launch:
    """A 4-bit weight is read once and decoded for every block of rows; of a split contraction the second
    launch does the rest."""
    m, j, c, whole = a["M"], a["J"], a["C"], a["SPLIT_K"] == 1
    reads, ops, name = nbytes(a["x_ptr"]), 0, "matmul"
    if a["WORDS"] < 0:
        reads += nbytes(a["weight_ptr"])
    else:
        reads += weight_bytes(j * c, a["absmax_ptr"], a["BLOCKSIZE"], a["NESTED_BLOCKSIZE"])
        name, ops = "fused", DECODE_OPS * j * c * -(-m // a["BLOCK_M"])
    end = _epilogue_work(a) if whole else Launch("", 0, 0)
    flops = 2 * m * j * c + end.flops
    return Launch(name, reads + end.reads, nbytes(a["out_ptr"]), flops, ops + end.ops)


def _epilogue_work(a: Mapping[str, Any]) -> Launch:
    """The low-rank product, its mask and the bias."""
    reads = nbytes(a["low_ptr"], a["adapter_ptr"], a["bias_ptr"])
    elements, draws = a["M"] * a["J"], a["seed_ptr"] is not None
    return Launch("", reads, nbytes(a["out_ptr"]), 2 * elements * a["RANK"], PHILOX_OPS * elements * draws)


@triton.jit(do_not_specialize=("M", "threshold"))
def _matmul_reduce_kernel(
    partials_ptr,
    bias_ptr,
    low_ptr,
    adapter_ptr,
    seed_ptr,
    threshold,
    scaling,
    out_ptr,
    M,
    J,
    adapter_stride,
    out_stride,
    first_col,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    reduce_tile(
        tl.program_id(0),
        partials_ptr,
        bias_ptr,
        low_ptr,
        adapter_ptr,
        seed_ptr,
        threshold,
        scaling,
        out_ptr,
        M,
        J,
        adapter_stride,
        out_stride,
        first_col,
        FORWARD,
        RANK,
        BLOCK_R,
        CHUNKS,
        LOW,
        SPLIT_K,
        BLOCK_M,
        BLOCK_N,
    )


@work(_matmul_reduce_kernel)
def _matmul_reduce_work(a: Mapping[str, Any]) -> Launch:
    end = _epilogue_work(a)
    return replace(end, name="matmul_reduce", reads=end.reads + nbytes(a["partials_ptr"]))


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
    one by one. Not measured."""
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
    tiles = -(-m // config.block_m) * -(-j // config.block_n)
    most = max(
        1, min(c // (16 * config.block_k), 8)
    )  # a split is worth its partial sums where a program keeps 16 steps of its own
    return replace(config, split_k=max(1, min(most, programs // tiles)))


def low_mode(x: Tensor, adapter: Tensor | None, arch: int) -> str:
    """How xa or dyb meets an adapter in a product; see the bodies."""
    if (
        adapter is not None
        and adapter.dtype == x.dtype != torch.float32
        and (arch == 0 or arch >= 80 or x.dtype == torch.float16)
    ):
        return "split"
    return "ieee" if arch < 80 or x.dtype == torch.float32 else "bf16x3"


def block_r(rank: int, low: str) -> int:
    """Ranks at a time: few of fp32, which is multiplied in three products whose terms do not fit the
    registers."""
    return max(16, min(64, next_power_of_2(rank))) if low == "split" else 16


@dataclass(frozen=True)
class _Call:
    """What both directions share: out [M, J] = x [M, C] times the weight, and the low-rank rows `low` times
    `adapter`."""

    x: Tensor
    weight: Tensor
    quant: tuple
    out: Tensor
    contraction: int
    bias: Tensor | None
    low: Tensor | None
    adapter: Tensor | None
    scaling: float
    threshold: int
    seed: Tensor | None
    first_col: int
    forward: bool

    def words(self) -> int:
        """How the weight is read, the bodies' WORDS."""
        return (
            -1
            if self.quant[0] is None
            else group_words(self.weight, self.contraction if self.forward else self.out.shape[1])
        )

    def epilogue(self, arch: int) -> dict[str, object]:
        """Arguments of the low-rank product, the bias and the output, which both kernels take."""
        rank = 0 if self.low is None else self.low.shape[-1]
        mode = low_mode(self.x, self.adapter, arch)
        chunks = self.low.shape[0] if rank and self.low.dim() == 3 else 1
        return {
            "bias_ptr": self.bias,
            "low_ptr": self.low if rank else None,
            "adapter_ptr": self.adapter if rank else None,
            "seed_ptr": self.seed if rank else None,
            "threshold": self.threshold,
            "scaling": self.scaling,
            "out_ptr": self.out,
            "M": self.out.shape[0],
            "J": self.out.shape[1],
            "adapter_stride": self.adapter.stride(0) if rank else 0,
            "out_stride": self.out.stride(0),
            "first_col": self.first_col,
            "FORWARD": self.forward,
            "RANK": rank,
            "BLOCK_R": block_r(max(rank, 1), mode),
            "CHUNKS": chunks,
            "LOW": mode,
        }

    def weight_arguments(self, arch: int) -> dict[str, object]:
        """Pointers and constants of the weight."""
        code, *absmax, blocksize, nested_blocksize = self.quant
        words = self.words()
        names = ("absmax_ptr", "absmax_8bit_ptr", "absmax_code_ptr", "nested_absmax_ptr", "absmax_offset_ptr")
        return {
            "weight_ptr": self.weight,
            "weight_stride": self.weight.stride(0) if code is None else 0,
            "code_ptr": code,
            **dict(zip(names, absmax, strict=True)),
            "BLOCKSIZE": blocksize,
            "NESTED_BLOCKSIZE": nested_blocksize,
            "WORDS": words,
            "METHOD": decode_method(self.x.dtype, arch) if words > 0 else "PORTABLE",
        }


def _calls(call: _Call, config: MatmulConfig, arch: int) -> list[Call]:
    """The product, and where the contraction is split the launch that adds up; `arch` 0 is the
    interpreter."""
    (m, j), c = call.out.shape, call.contraction
    steps = max(1, -(-c // (config.split_k * config.block_k))) * config.block_k
    splits = max(1, -(-c // steps))
    epilogue, blocks = call.epilogue(arch), {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    partials = (
        call.out if splits == 1 else torch.empty((splits, m, j), dtype=torch.float32, device=call.out.device)
    )
    constants = {
        "x_ptr": call.x,
        "x_stride": call.x.stride(0),
        "C": c,
        "split_steps": steps,
        "out_ptr": partials,
        "PRECISION": "ieee",
        "EVEN": c % config.block_k == 0,
        "SPLIT_K": splits,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    tiles = -(-m // config.block_m) * -(-j // config.block_n) * splits
    arguments = epilogue | call.weight_arguments(arch) | constants | blocks
    product = Call(_matmul_kernel, tiles, arguments, config.num_warps, config.num_stages)
    if splits == 1:
        return [product]
    tiles = -(-m // REDUCE_M) * -(-j // REDUCE_N)
    arguments = {
        "partials_ptr": partials,
        **epilogue,
        "SPLIT_K": splits,
        "BLOCK_M": REDUCE_M,
        "BLOCK_N": REDUCE_N,
    }
    return [product, Call(_matmul_reduce_kernel, tiles, arguments, 4, 1)]


def _launch(call: _Call, config: MatmulConfig | None) -> Tensor:
    m, j = call.out.shape
    if m == 0 or j == 0:
        return call.out
    arch, programs = (0, 1) if call.x.is_cpu else (device_of(call.x).arch, device_of(call.x).multiprocessors)
    if config is None:
        words, dtype = call.words(), call.x.dtype
        form = {"dense": words < 0, "ragged": words == 0, "programs": programs}
        config = default_config(m, j, call.contraction, arch=arch or 89, dtype=dtype, **form)
    for kernel in _calls(call, config, arch):
        run(kernel)
    return call.out


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
    return _launch(
        _Call(x, weight, quant, out, x.shape[1], bias, xa, lora_b, scaling, 0, None, 0, True), config
    )


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
    threshold = 0 if seed is None else round(dropout_p * 65536)
    return _launch(
        _Call(dy, weight, quant, out, dy.shape[1], None, dyb, lora_a, 1.0, threshold, seed, first_col, False),
        config,
    )


def specializations(arch: int) -> Iterator[Specialization]:
    """Both directions in the defaults for few and many rows, fused and over a dense slab; then other formats,
    dtypes and epilogues."""
    half = torch.bfloat16 if arch >= 80 else torch.float16
    for dense, m in ((False, 256), (True, 4096), (False, 16), (False, 64)):
        for forward in (True, False):
            yield from _variants(arch, half, m, forward, dense=dense)
    for forward in (True, False):
        yield from _variants(arch, half, 16, forward, split_k=4)
        yield from _variants(arch, half, 256, forward, adapter=torch.float32, rank=256, epilogue=True)
        yield from _variants(arch, half, 256, forward, nested=False)
        yield from _variants(arch, half, 64, forward, k=4104)
        yield from _variants(arch, half, 64, forward, k=4097)
        yield from _variants(arch, torch.float16 if arch >= 80 else torch.bfloat16, 64, forward)
        yield from _variants(arch, torch.float32, 64, forward)


def _variants(
    arch: int,
    dtype: torch.dtype,
    m: int,
    forward: bool,
    *,
    dense: bool = False,
    nested: bool = True,
    adapter: torch.dtype | None = None,
    rank: int = 16,
    epilogue: bool = False,
    k: int = 4096,
    split_k: int = 1,
) -> Iterator[Specialization]:
    """epilogue: with a bias, or with dropout. Tensors without storage stand for the call's."""
    n, adapter, blocks = 4096, adapter or dtype, 4096 * k // 64
    j, c = (n, k) if forward else (k, n)

    def of(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    absmax = (
        (None, of(blocks, kind=torch.uint8), of(256), of(-(-blocks // 256)), of(1))
        if nested
        else (of(blocks), *(None,) * 4)
    )
    quant = ((None,) * 6 if dense else (of(16), *absmax)) + (64, 256)
    weight = of(n, k, kind=dtype) if dense else of((n * k + 1) // 2, kind=torch.uint8)
    low, factor = of(m, rank), of(n, rank, kind=adapter) if forward else of(rank, k, kind=adapter)
    bias, seed = (
        of(j) if epilogue and forward else None,
        of(1, kind=torch.int64) if epilogue and not forward else None,
    )
    call = _Call(
        of(m, c, kind=dtype),
        weight,
        quant,
        of(m, j, kind=dtype),
        c,
        bias,
        low,
        factor,
        0.5,
        6554,
        seed,
        0,
        forward,
    )
    config = default_config(m, j, c, arch=arch, dtype=dtype, dense=dense, ragged=call.words() == 0)
    config = replace(config, split_k=split_k)
    form = "dense" if dense else ("nested" if nested else "plain")
    parts = (
        "forward" if forward else "dx",
        form,
        str(dtype).removeprefix("torch."),
        f"m{m}",
        f"k{k}",
        f"r{rank}",
        f"split{split_k}",
    )
    calls = _calls(call, config, arch)
    mma = arch >= 80 and dtype != torch.float32
    # Without tensor cores larger tiles, whose rows of codes fill 16-byte loads, do not fit the registers.
    wide = ("words_ptrs", "weight_ptrs") if mma and (dense or k % 32 == 0) else ()
    promises = {"expects_mma": mma, "wide_loads": wide, "unfused": ("absmax_value",)}
    yield specialization("-".join(parts), calls[0], **promises)
    for reduce in calls[1:]:
        yield specialization("-".join(("reduce", *parts)), reduce)
