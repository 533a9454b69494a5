"""The plans of a linear and of a group: what the ops launch on tensors without storage, and its bytes."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import peftkern.ops
from peftkern.ops.linear import plan, tuned
from peftkern.ops.linear.config import GPU_TABLE
from peftkern.ops.linear.group import gpu
from peftkern.ops.linear.group.plan import (
    backward_arguments,
    forward_arguments,
    group_backward_plan,
    group_forward_plan,
)
from peftkern.ops.linear.plan import Shape, backward_plan, forward_plan
from peftkern.runtime.plan import Device, Launch, states
from peftkern.runtime.targets import CARDS

from .conftest import Launched, kernels
from .test_gpu_linear import FUSED, SLAB

MIB = 1 << 20
CUBLAS, TRITON = (SLAB[gemm] for gemm in ("cublas", "triton"))


def _device(card: str) -> Device:
    return Device(CARDS[card].sm, CARDS[card].sms, CARDS[card].l2, cuda=True)


def _both(shapes: list[Shape], device: Device) -> list[Launch]:
    return [*group_forward_plan(shapes, device), *group_backward_plan(shapes, device)]


QKV = [(96, 8), (33, 4), (32, 1)]
LAYOUTS = {
    "linear": [(192, 4)],
    "bare linear": [(192, 0)],
    "qkv": QKV,
    "partly": [(64, 0), (90, 4), (16, 0)],
    "bare": [(64, 0), (40, 0)],
}
LIMITS = {
    "fused": FUSED,
    "cublas": CUBLAS,
    "triton": TRITON,
    "cublas, batches": replace(CUBLAS, slab_bytes=96 * 256 * 2),
    "triton, batches": replace(TRITON, slab_bytes=96 * 256 * 2),
    "triton, composed": replace(TRITON, slab_bytes=1 << 14),
}


@pytest.mark.parametrize("dense", [False, True], ids=["nf4", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limits", LIMITS)
def test_tensors_without_storage_launch_what_others_launch(
    launched: Launched, layout: str, limits: str, dense: bool
) -> None:
    shapes = [
        Shape(600, n, 256, r, torch.float16, dense=dense, nested=i % 2 == 0)
        for i, (n, r) in enumerate(LAYOUTS[layout])
    ]
    with tuned.use_row(LIMITS[limits]):
        with launched:
            gpu.forward(*forward_arguments(shapes, "cpu"))
            gpu.backward(*backward_arguments(shapes, "cpu"))
        planned = [*group_forward_plan(shapes), *group_backward_plan(shapes)]
    assert kernels(planned) == launched.names


def test_the_bytes_of_a_linear_by_hand() -> None:
    m, n, k, r = 8192, 4096, 14336, 16
    s = Shape(m, n, k, r, bias=True)
    blocks = n * k // 64
    packed = n * k // 2 + blocks + 4 * blocks // 256
    x, y, dense, a, b, low, bias = (2 * m * k, 2 * m * n, 2 * n * k, 2 * r * k, 2 * n * r, 4 * m * r, 2 * n)
    with tuned.use_row(replace(TRITON, slab_bytes=256 * MIB)):
        decode, product = forward_plan(s)
        first, d_x, d_a, sums = backward_plan(s)
    assert (decode.name, decode.reads, decode.writes) == ("slab+xa", packed + x + a, dense + low)
    assert (product.name, product.reads, product.writes) == ("matmul", x + dense + low + b + bias, y)
    assert (product.flops, decode.flops) == (2 * m * n * (k + r), 2 * m * k * r)
    partial_b, partial_a = first.writes - dense - low, d_a.writes
    assert (first.name, first.reads) == ("slab+dy_pass", packed + y + low + b)
    assert (d_x.reads, d_x.writes, d_x.flops) == (y + dense + low + a, x, 2 * m * k * (n + r))
    assert (d_a.name, d_a.reads) == ("x_pass", x + low)
    assert partial_b % (4 * n * (r + 1)) == 0 and partial_a % (4 * r * k) == 0
    assert (sums.reads, sums.writes) == (partial_a + partial_b, a + b + 4 * n)


@pytest.mark.parametrize("limits", ["cublas", "triton"])
@pytest.mark.parametrize("m", [512, 8192])
def test_nothing_of_the_size_of_an_activation_is_copied(limits: str, m: int) -> None:
    """Forward writes y, with cuBLAS twice, one slab and xa; backward dx likewise and partial sums."""
    s, passes = Shape(m, 4096, 4096, dropout=True, bias=True), 2 if limits == "cublas" else 1
    with tuned.use_row(replace(LIMITS[limits], slab_bytes=128 * MIB)):
        forward, backward = forward_plan(s), backward_plan(s)
    known = {"slab+xa", "slab+dy_pass", "y_epilogue", "x_pass", "matmul", "mm", "reduce"}
    assert {one.name for one in (*forward, *backward)} <= known
    activation, slab, low = 2 * m * 4096, 2 * 4096 * 4096, 4 * m * 16
    assert sum(one.writes for one in forward) == passes * activation + slab + low
    sums = sum(one.reads + one.writes for one in backward if one.name == "reduce")
    assert sums and sum(one.writes for one in backward) == passes * activation + slab + low + sums


def test_a_fused_product_reads_the_packed_weight_and_writes_no_slab() -> None:
    s = Shape(64, 4096, 4096)
    launches = forward_plan(s, _device("RTX 4090"))
    assert plan.choices(s, _device("RTX 4090"))[0].regime == "mma"
    assert [one.name for one in launches] == ["xa", "mma"]
    assert launches[-1].writes == 2 * 64 * 4096 and launches[-1].reads < 2 * 4096 * 4096 // 3
    without = replace(_device("RTX 4090"), cuda=False)
    assert plan.choices(s, without)[0].regime == "fused"
    assert sum(one.writes for one in forward_plan(s, without)) < 2 * 4096 * 4096


@pytest.mark.parametrize(
    ("card", "m", "regimes"),
    [
        ("RTX 4090", 1, ("gemv", "fused")),
        ("RTX 4090", 256, ("mma", "fused")),
        ("RTX 4090", 257, ("slab", "slab")),
        ("H100", 32, ("mma", "fused")),
        ("H100", 64, ("fused", "fused")),
        ("H100", 512, ("slab", "slab")),
        ("T4", 16, ("gemv", "slab")),
    ],
)
def test_where_a_card_fuses_and_where_it_decodes_a_slab(card: str, m: int, regimes: tuple[str, str]) -> None:
    s = Shape(m, 4096, 4096, dtype=torch.float16)
    assert tuple(choice.regime for choice in plan.choices(s, _device(card))) == regimes
    plans = [direction(s, _device(card)) for direction in (forward_plan, backward_plan)]
    slabs = [any("slab" in one.name for one in launches) for launches in plans]
    assert slabs == [regime == "slab" for regime in regimes]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("n", [1024, 4096, 14336])
def test_at_most_seven_launches_of_many_rows(card: str, n: int) -> None:
    """And one more that adds dyb's partial sums, where the L2 does not hold a chunk of dy's rows."""
    for m in (2048, 8192):
        shape = Shape(m, n, 4096, dropout=True, dtype=torch.float16)
        names = [one.name for one in _both([shape], _device(card))]
        assert names.count("reduce") <= 2
        assert len(names) - (names.count("reduce") == 2) <= 7


@pytest.mark.parametrize(
    ("card", "n", "sums"), [("RTX 4090", 4096, 1), ("RTX 3090", 4096, 2), ("H100", 14336, 2)]
)
def test_parts_of_dyb_are_added_where_the_l2_is_too_small_for_one_part(card: str, n: int, sums: int) -> None:
    names = [one.name for one in backward_plan(Shape(8192, n, 4096), _device(card))]
    assert names.count("reduce") == sums


@pytest.mark.parametrize("gemm", SLAB)
def test_merging_saves_launches_and_bytes_for_the_same_products(gemm: str) -> None:
    with tuned.use_row(replace(SLAB[gemm], slab_bytes=256 * MIB)):
        for ns in ((4096, 1024, 1024), (14336, 14336)):
            shapes = [Shape(8192, n, 4096, 16, bias=True) for n in ns]
            ours = [*group_forward_plan(shapes), *group_backward_plan(shapes)]
            theirs = [one for s in shapes for one in (*forward_plan(s), *backward_plan(s))]
            assert len(ours) < len(theirs)
            assert sum(one.flops for one in ours) == sum(one.flops for one in theirs)
            assert sum(one.reads + one.writes for one in ours) < sum(one.reads + one.writes for one in theirs)


def test_dropout_costs_operations_and_no_bytes() -> None:
    plain, dropped = (_both([Shape(2048, 4096, 4096, dropout=on)], _device("L4")) for on in (False, True))
    assert [one.reads + one.writes for one in dropped] == [one.reads + one.writes for one in plain]
    assert sum(one.ops for one in dropped) > sum(one.ops for one in plain)


def test_every_planned_launch_can_be_compiled() -> None:
    from peftkern.runtime.launch import specialization

    for one in _both([Shape(512, n, 4096, dropout=True) for n in (4096, 1024)], _device("RTX 4090")):
        made = specialization("planned", one.call)
        assert set(made.signature) | set(made.constexprs) == set(one.call.arguments)


@pytest.mark.parametrize("arch", [75, 89])
def test_every_kernel_states_its_bytes(arch: int) -> None:
    found = set()
    for info in pkgutil.walk_packages(peftkern.ops.__path__, "peftkern.ops."):
        if info.name.rpartition(".")[2].startswith("triton"):
            module = importlib.import_module(info.name)
            found |= {spec.kernel for spec in getattr(module, "specializations", lambda arch: ())(arch)}
    missing = {kernel.fn.__name__ for kernel in found if not states(kernel)}
    assert len(found) > 15
    assert missing == {"_quantize_kernel"}, "which is not launched by `run`"


def test_an_explanation_lists_the_plan() -> None:
    s = Shape(512, 4096, 4096)
    text = plan.explain(torch.empty(512, 4096, dtype=torch.bfloat16), 512, 4096, 4096, 16)
    for direction in (forward_plan, backward_plan):
        assert ", ".join(one.name for one in direction(s)) in text
    assert text.startswith("forward slab with triton (M = 512 > 256 on sm_89")
    assert GPU_TABLE[89].measured in text
