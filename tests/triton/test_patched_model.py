"""A patched PEFT model on the GPU's kernels: within the bounds of the patching tests, stock against fp64."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from peftkern.ops.linear import low_rank_calls, tuned
from peftkern.patching import linears

from ..ops.bounds import FACTOR, assert_as_accurate
from ..patching import models
from .test_gpu_linear import FUSED, SLAB


def _on(device: str, **results: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in results.items()}


@pytest.mark.parametrize("row", [FUSED, SLAB["cublas"], SLAB["triton"]], ids=["fused", "cublas", "triton"])
def test_gradients_of_a_llama(device: str, row) -> None:
    model = models.lora(models.llama(torch.float32, layers=1, bias=True))
    exact = models.run(models.in_fp64(model))
    stock = models.errors(
        _on("cpu", **models.run(copy.deepcopy(model).to(device), models.IDS.to(device))), exact
    )
    patched = model.to(device)
    report = peftkern.patch(patched)
    with peftkern.use_backend("triton"), tuned.use_row(row):
        ours = models.errors(_on("cpu", **models.run(patched, models.IDS.to(device))), exact)
    assert sum(entry.got == "qlora_linear" for entry in report.rows) == 7
    rounding = torch.finfo(torch.float32).eps
    for name, error in ours.items():
        assert error <= FACTOR * stock[name] + rounding, f"{name}: {error:.3e}, stock {stock[name]:.3e}"
    assert peftkern.unpatch(patched)


@pytest.mark.parametrize(
    ("rounded_from", "modes"), [(1, {"native"}), (1 << 20, {"split"})], ids=["many rows", "few rows"]
)
def test_autocast_rounds_fp32_adapters_as_stock_does(
    device: str, rounded_from: int, modes: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows; either way the result is as accurate as autocast's products in bf16 are."""
    monkeypatch.setattr(linears, "_ROUNDED_FROM", rounded_from)
    used, mode_of = set(), low_rank_calls.dot_mode
    monkeypatch.setattr(low_rank_calls, "dot_mode", lambda *args: (used.add(mode := mode_of(*args)), mode)[1])
    layer = models.first(models.lora(models.llama(torch.float32, layers=1))).to(device)
    x, dy = torch.randn(40, 64, device=device), torch.randn(40, 64, device=device)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = layer(leaf)
        return [t.detach().float() for t in (y, *torch.autograd.grad(y, [leaf, *trained], dy.to(y.dtype)))]

    holder = torch.nn.ModuleList([layer])
    peftkern.patch(holder)
    with peftkern.use_backend("triton"), tuned.use_row(SLAB["cublas"]):
        ours = run(x)
    assert used == modes
    with peftkern.use_backend("reference"):
        dense = peftkern.NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32)
    scaling = layer.scaling["default"]
    rounded = _linear(
        x.bfloat16(), dense.bfloat16(), *(t.detach().bfloat16() for t in trained), scaling, dy.bfloat16()
    )
    exact = _linear(x.double(), dense.double(), *(t.detach().double() for t in trained), scaling, dy.double())
    for name, got, plain, true in zip(("y", "dx", "d_lora_a", "d_lora_b"), ours, rounded, exact, strict=True):
        assert_as_accurate(name, got, plain, true)
    assert peftkern.unpatch(holder)


def _linear(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dy: torch.Tensor
) -> list[torch.Tensor]:
    """y and its gradients in plain PyTorch, all in the operands' dtype."""
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = leaves[0] @ w.t() + scaling * (leaves[0] @ leaves[1].t() @ leaves[2].t())
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
