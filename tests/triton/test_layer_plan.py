"""The launches of a whole decoder layer: counted on the plan, which is compared with what a patched layer
really launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern.ops.qlora_group import plan
from peftkern.ops.qlora_linear import tuned
from peftkern.ops.qlora_linear.config import Choice, choose_gpu
from peftkern.ops.qlora_linear.plan import Shape

from ..patching import models
from . import test_group_plan
from .test_gpu_plan import SLAB

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


def _layer(gemm: str, slab_bytes: int, layer: plan.Layer = plan.LLAMA_8B) -> list[plan.Launch]:
    choice = Choice("slab", "", gemm, slab_bytes)
    return plan.decoder_layer_plan(Shape(8192, 1, 1, 16, dropout=True), choice, choice, layer)


@pytest.mark.parametrize("gemm, slab_bytes", COUNTS)
def test_the_launches_of_a_decoder_layer(gemm: str, slab_bytes: int) -> None:
    assert len(_layer(gemm, slab_bytes)) == COUNTS[gemm, slab_bytes]


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_the_table_reaches_the_target_with_our_own_gemm(arch: int) -> None:
    choices = [
        choose_gpu(arch=arch, dtype="bfloat16", m=8192, forward=forward, cuda=True)
        for forward in (True, False)
    ]
    assert len(plan.decoder_layer_plan(Shape(8192, 1, 1, 16, dropout=True), *choices)) <= TARGET


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
        and len(_layer("triton", 256 * MIB, replace(plan.LLAMA_8B, kv_heads=32))) == TARGET - 3
    )


_BLOCKS = {"_glu_fwd_kernel": "glu", "_glu_bwd_kernel": "d_glu", "_rope_kernel": "rope"}


def _name(kernel: str, arguments: dict) -> str:
    """The plan's name of a launch of a norm or another small op too."""
    if kernel == "_rms_norm_fwd_kernel":
        return "rms_norm" if arguments["residual_ptr"] is None else "add_rms_norm"
    if kernel == "_rms_norm_bwd_kernel":
        return "d_rms_norm" if arguments["ds_ptr"] is None else "d_add_rms_norm"
    return _BLOCKS.get(kernel) or test_group_plan._name(kernel, arguments)


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch of the test, by the plan's names; none is run, as here only their order counts."""
    if device != "cpu":
        pytest.skip("the interpreter counts launches here")
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, **arguments: names.append(_name(self.fn.__name__, arguments))
    )
    return names


_TORCHS = ("add", "sum", "mm")  # and attention: the interpreter sees our launches alone


@pytest.mark.parametrize("gemm", SLAB)
@pytest.mark.parametrize("slab_bytes", [1 << 27, 80 * 64 * 2], ids=["one slab", "gate and up apart"])
def test_a_patched_layer_launches_what_the_plan_lists(
    launches: list[str], gemm: str, slab_bytes: int
) -> None:
    model = models.lora(models.llama(torch.bfloat16, layers=1))
    peftkern.patch(model)
    layer = next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")
    # So many rows that there are partial sums to add.
    x, angles = torch.randn(2, 300, 64, dtype=torch.bfloat16, requires_grad=True), torch.rand(1, 300, 16)
    with peftkern.use_backend("triton"), tuned.use_row(replace(SLAB[gemm], slab_bytes=slab_bytes)):
        layer(x, position_embeddings=(angles.cos().bfloat16(), angles.sin().bfloat16())).sum().backward()
    choice = Choice("slab", "", gemm, slab_bytes)
    listed = plan.decoder_layer_plan(
        Shape(600, 1, 1, 4), choice, choice, plan.Layer(64, 80, 4, 2, 16), seq=300
    )
    assert launches == [
        one.name for one in listed if one.name not in _TORCHS and not one.name.startswith("flash")
    ]
