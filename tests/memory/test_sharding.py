"""DDP and FSDP2 with 4-bit weights: gradients are those of one process on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkern.memory import ddp, ignore_frozen, shard

from ..patching import models
from ..processes import run_processes
from . import sharded

NEAR = 1e-5  # fp32 sums in another order: 1.1e-6 measured
PIECES = ("", "patched", "patched checkpoints", "patched loss tiles checkpoints")

integers = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="FSDP2 shards integers from torch 2.12",
)


def assert_sharded(found: list[dict[str, Any]], pieces: tuple[str, ...]) -> None:
    for errors in found:
        assert all(errors[names] < NEAR and errors[f"{names}: bytes"] is True for names in pieces), errors


def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    for errors in run_processes(sharded.ddp_errors, 2, tmp_path, PIECES[-1:]):
        assert errors.keys() == set(PIECES[-1:]) and all(error < NEAR for error in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ddp_with_each_piece(count: int, tmp_path: Path) -> None:
    for errors in run_processes(sharded.ddp_errors, count, tmp_path, PIECES):
        assert errors.keys() == set(PIECES) and all(error < NEAR for error in errors.values()), errors


@integers
def test_fsdp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    pieces = PIECES[-1:]
    found = run_processes(sharded.fsdp_errors, 2, tmp_path, pieces, {})
    assert_sharded(found, pieces)
    reports = [errors[f"{pieces[0]}: report"] for errors in found]
    whole = reports[0][0]
    assert sum(here for _, here, _ in reports) == whole  # nothing twice: every size here is even
    # Of each of 14 weights two codebooks of 16 and 256, an offset and the maxima of at most 20 blocks stay
    # whole.
    assert all(replicated <= 14 * 4 * (16 + 256 + 1 + 1) for _, _, replicated in reports)


@integers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options", "absmax"),
    [
        (2, {}, True),
        (4, {}, True),
        (4, {}, False),
        (2, {"nested": False}, True),
        (4, {"quant_type": "fp4", "bias": True}, True),
    ],
)
def test_fsdp_with_each_piece(count: int, options: dict[str, Any], absmax: bool, tmp_path: Path) -> None:
    assert_sharded(run_processes(sharded.fsdp_errors, count, tmp_path, PIECES, options, absmax), PIECES)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_fsdp_of_float_storage_keeps_the_bytes(storage: torch.dtype, tmp_path: Path) -> None:
    found = run_processes(sharded.fsdp_errors, 2, tmp_path, PIECES, {"storage": storage}, False)
    assert_sharded(found, PIECES)


def test_averages_are_averages(tmp_path: Path) -> None:
    for found in run_processes(sharded.averages, 2, tmp_path):
        assert found["shard"] == [1.5] * 4  # of 1 and 2
        # gloo has had no average, and one that was a sum; whichever it is, `shard` does not use it.
        assert isinstance(found["gloo"], str) or found["gloo"] in ([1.5] * 2, [3.0] * 2)


def test_what_is_trained_alone_is_broadcast(tmp_path: Path) -> None:
    assert run_processes(sharded.after_ddp, 2, tmp_path) == [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


def test_frozen_weights_are_left_out() -> None:
    model = models.lora(models.llama())
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert ignore_frozen(model) == total - trained + buffers
    ignored = model._ddp_params_and_buffers_to_ignore
    assert not any("lora_" in name for name in ignored) and any(
        "q_proj.base_layer.weight" in n for n in ignored
    )


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.lora(models.llama())
    with pytest.raises(ValueError, match="torchrun"):
        shard(model)
    with pytest.raises(ValueError, match="torchrun"):
        ddp(model)
    monkeypatch.setattr("peftkern.memory.sharding._require_group", lambda: None)
    with pytest.raises(ValueError, match="add an adapter first"):
        ddp(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="pass `layers`"):
        shard(nn.Linear(2, 2))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "2.11.0+cu128")
        with pytest.raises(ValueError, match=r"torch 2\.11\.0\+cu128 cannot shard.*2\.12.*bfloat16"):
            shard(model)
    monkeypatch.setattr("peftkern.memory.sharding._INTEGERS_FROM", (2, 0))
    next(p for p in model.parameters() if p.requires_grad).data = torch.zeros(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float32; FSDP2 wants one dtype"):
        shard(model)
