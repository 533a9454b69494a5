"""The launches of a whole decoder layer: counted on the benchmarks' plan, which is compared with what a
patched layer launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import peftkern
from benchmarks.layer_plan import LLAMA_8B, Layer, decoder_layer_plan
from peftkern.ops.linear import tuned
from peftkern.ops.linear.config import GPU_TABLE
from peftkern.ops.linear.plan import Shape
from peftkern.runtime.plan import Device, Launch

from ..patching import models
from .conftest import Launched, kernels
from .test_gpu_linear import SLAB

MIB = 1 << 20
TARGET = 40
# 128 MiB is the table's buffer with cuBLAS, which gate and up do not share, 256 MiB with our own GEMM, which
# they do.
COUNTS = {
    ("cublas", 128 * MIB): 52,
    ("cublas", 256 * MIB): 50,
    ("triton", 128 * MIB): 43,
    ("triton", 256 * MIB): 39,
}


def _layer(gemm: str, slab_bytes: int, layer: Layer = LLAMA_8B) -> list[Launch]:
    with tuned.use_row(replace(SLAB[gemm], slab_bytes=slab_bytes)):
        return decoder_layer_plan(Shape(8192, 1, 1, 16, dropout=True), layer=layer)


@pytest.mark.parametrize("gemm, slab_bytes", COUNTS)
def test_the_launches_of_a_decoder_layer(gemm: str, slab_bytes: int) -> None:
    assert len(_layer(gemm, slab_bytes)) == COUNTS[gemm, slab_bytes]


@pytest.mark.parametrize("arch", [89, 120])
def test_the_table_reaches_the_target_with_our_own_gemm(arch: int) -> None:
    device = Device(arch, 128, 72 * MIB, cuda=True)
    with tuned.use_row(GPU_TABLE[arch]):
        launches = decoder_layer_plan(Shape(8192, 1, 1, 16, dropout=True), device)
    assert len(launches) <= TARGET


def test_a_small_l2_costs_a_launch_a_sum_of_dyb() -> None:
    """Of each single linear, o and down: an RTX 3090 takes two launches more."""
    shape = Shape(8192, 1, 1, 16, dropout=True)
    with tuned.use_row(GPU_TABLE[86]):
        launches = decoder_layer_plan(shape, Device(86, 82, 6 * MIB, cuda=True))
    assert Counter(one.name for one in launches)["reduce"] == 4 + 2 and len(launches) == TARGET + 1


def test_what_a_decoder_layer_below_the_target_consists_of() -> None:
    """Linears 24; what is not a linear 15: attention 6, norms with the stream's additions 4, the product 2,
    RoPE 2, the last addition."""
    launches = _layer("triton", 256 * MIB)
    linear = [
        one for one in launches if one.name in ("slab+xa", "slab+dy_pass", "matmul", "x_pass", "reduce")
    ]
    rest = Counter(one.name.removeprefix("d_") for one in launches if one not in linear)
    assert len(linear) == 24 and rest.total() == 15 and len(launches) == TARGET - 1
    assert (rest["rms_norm"], rest["add_rms_norm"], rest["add"], rest["glu"], rest["rope"]) == (1, 3, 1, 2, 2)
    assert (
        rest.total() - 9 == 6
        and len(_layer("triton", 256 * MIB, replace(LLAMA_8B, kv_heads=32))) == TARGET - 3
    )


@pytest.mark.parametrize("gemm", SLAB)
@pytest.mark.parametrize("slab_bytes", [1 << 27, 80 * 64 * 2], ids=["one slab", "gate and up apart"])
def test_a_patched_layer_launches_what_the_plan_lists(launched: Launched, gemm: str, slab_bytes: int) -> None:
    """Triton's launches alone: torch's are made below the mode that would name them."""
    model = models.lora(models.llama(torch.bfloat16, layers=1))
    peftkern.patch(model)
    layer = next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")
    # So many rows that there are partial sums to add.
    x, angles = torch.randn(2, 300, 64, dtype=torch.bfloat16, requires_grad=True), torch.rand(1, 300, 16)
    with peftkern.use_backend("triton"), tuned.use_row(replace(SLAB[gemm], slab_bytes=slab_bytes)):
        layer(x, position_embeddings=(angles.cos().bfloat16(), angles.sin().bfloat16())).sum().backward()
        listed = decoder_layer_plan(Shape(600, 1, 1, 4), layer=Layer(64, 80, 4, 2, 16), seq=300)
    assert launched.names == kernels([one for one in listed if one.call is not None])
