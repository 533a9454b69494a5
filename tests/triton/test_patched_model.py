"""A patched PEFT model on the GPU's kernels: within the bounds of the patching tests, stock against fp64."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from peftkern.ops.qlora_linear import tuned

from ..ops.bounds import FACTOR
from ..patching import models
from .test_gpu_plan import FUSED, SLAB


def _on(device: str, **results: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in results.items()}


@pytest.mark.parametrize("row", [FUSED, SLAB["cublas"], SLAB["triton"]], ids=["fused", "cublas", "triton"])
def test_gradients_of_a_llama(device: str, row) -> None:
    model = models.lora(models.llama(torch.float32, layers=1, bias=True))
    exact = models.run(models.in_fp64(model))
    stock = models.errors(_on("cpu", **models.run(copy.deepcopy(model))), exact)
    patched = model.to(device)
    report = peftkern.patch(patched)
    with peftkern.use_backend("triton"), tuned.use_row(row):
        ours = models.errors(_on("cpu", **models.run(patched, models.IDS.to(device))), exact)
    assert sum(entry.got == "qlora_linear" for entry in report.rows) == 7
    rounding = torch.finfo(torch.float32).eps
    for name, error in ours.items():
        assert error <= FACTOR * stock[name] + rounding, f"{name}: {error:.3e}, stock {stock[name]:.3e}"
    assert peftkern.unpatch(patched)
