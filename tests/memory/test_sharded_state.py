"""Checkpoints of several processes load in another number of them, and training goes on as if nothing was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkern.memory import adamw, load_state, newest_state, save_state

from ..patching import models
from ..processes import run_processes
from . import sharded
from .test_sharding import NEAR, integers

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def assert_same(got: dict[str, Any], expected: dict[str, Any], near: float = 0.0) -> None:
    assert got.keys() == expected.keys() and sharded.furthest(got, expected) <= near


def assert_adapter_file(folder: Path, saved: dict[str, Any]) -> None:
    """PEFT reads it, and it holds what was trained."""
    stored = safetensors.load_file(folder / "adapter_model.safetensors")
    assert {name: value.numpy() for name, value in stored.items()}.keys() == {
        name.replace(".default", "") for name in saved
    }
    assert all((stored[name.replace(".default", "")].numpy() == value).all() for name, value in saved.items())
    model = models.peft.PeftModel.from_pretrained(models.llama(layers=sharded.LAYERS), folder)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def go_on(folder: Path, before: tuple[int, str], after: tuple[int, str], dropout: float) -> None:
    """Save in one number of processes, load in the other; the same bits where both are the same."""
    (first, way), (second, other) = before, after
    state = folder / "state"
    found = run_processes(sharded.save_and_go_on, first, folder, str(state), way, dropout)
    again = run_processes(sharded.load_and_go_on, second, folder, str(state), other, dropout)
    near = 0.0 if before == after else NEAR
    for rank in range(second):
        assert_same(again[rank]["saved"], found[0]["saved"])
        assert_same(again[rank]["end"], found[0]["end"], near)
    assert sharded.furthest(found[0]["end"], found[0]["saved"]) > 10 * NEAR  # it was trained on
    assert_adapter_file(state / "adapter", found[0]["saved"])


@integers
@pytest.mark.slow
def test_in_shards_with_dropout(tmp_path: Path) -> None:
    go_on(tmp_path, (2, "shard"), (2, "shard"), 0.1)


@integers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, "shard"), (2, "shard")),
        ((2, "shard"), (1, "alone")),
        ((1, "alone"), (2, "shard")),
        ((2, "ddp"), (4, "ddp")),
        ((4, "shard"), (2, "ddp")),
        ((2, "ddp"), (1, "shard")),
    ],
)
def test_in_another_number_of_processes(
    before: tuple[int, str], after: tuple[int, str], tmp_path: Path
) -> None:
    go_on(tmp_path, before, after, 0.0)


@integers
def test_shards_are_trained_by_torchs_adamw(tmp_path: Path) -> None:
    for name, told, moved in run_processes(sharded.optimizer_in_shards, 2, tmp_path):
        assert name == "AdamW" and moved
        assert told.startswith(
            "Optimizer: torch's AdamW (foreach) in place of paged_adamw_8bit: the parameters are in"
        )


def test_optimizers_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    layer = nn.Linear(2, 2)
    assert type(adamw(layer, lr=1e-3)) is torch.optim.AdamW
    assert "in place of paged_adamw_8bit: the parameters are not on a CUDA device" in capsys.readouterr().err
    adamw(layer, lr=1e-3, kind="adamw")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="kind: got 'lion', expected one of paged_adamw_8bit"):
        adamw(layer, lr=1e-3, kind="lion")
    with pytest.raises(ValueError, match="add an adapter first"):
        adamw(layer.requires_grad_(False), lr=1e-3)


def test_one_process_without_a_group(tmp_path: Path) -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [adamw(module, lr=1e-2, kind="adamw") for module in (layer, other)]
    layer(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    (tmp_path / ".incomplete-step-9-x").mkdir()  # of a killed run
    for step in (3, 10):
        save_state(tmp_path, layer, optimizers[0], step=step)
    assert newest_state(tmp_path) == tmp_path / "step-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]
    assert load_state(tmp_path / "step-3", other, optimizers[1]) == 3
    assert torch.equal(other.weight, layer.weight)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(
        torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i]
    )
    assert newest_state(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        load_state(tmp_path, other, optimizers[1])
    wider = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"has no 0\.weight \(2 parameters are missing\)"):
        load_state(tmp_path / "step-3", wider, adamw(wider, lr=1e-2, kind="adamw"))
