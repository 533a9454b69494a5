"""Tiles beside what watches gradients or moves weights: DDP, FSDP, checkpoints in a store, layers on the
host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern import memory
from peftkern.memory.tiled_mlp import TiledMLP

from ..patching import models, zoo


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, whose hooks are those of a large one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiled(name: str = "llama", *, four_bit: bool = True) -> nn.Module:
    model = zoo.build(name, four_bit=four_bit)
    peftkern.patch(model)
    memory.tile_mlps(model, tile=7)
    return model


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=zoo.TEXT, labels=zoo.TEXT, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return models.grads(model)


@pytest.mark.parametrize("static", [False, True])
def test_ddp_marks_each_parameter_ready_once(group: None, static: bool) -> None:
    model = tiled()
    expected = gradients(model)
    parallel = DistributedDataParallel(
        model, init_sync=False, static_graph=static, gradient_as_bucket_view=True
    )
    for _ in range(2):
        parallel.zero_grad(set_to_none=False)
        loss(parallel).backward()
    got = models.grads(model)
    assert got.keys() == expected.keys() and len(got) == 28
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_gathers_and_reduces_each_layer_once(group: None, reshard: bool) -> None:
    model = tiled(four_bit=False)
    expected = gradients(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        got = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)
    tiles = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), TiledMLP)]
    assert len(tiles) == 2


@pytest.mark.parametrize("on_host", [False, True])
def test_everything_together_has_the_gradients_of_nothing(tmp_path: Path, on_host: bool) -> None:
    """Checkpoints in a store, attention by groups, norms computed again, layers on the host: bit for bit."""
    model = tiled()
    expected = gradients(model)
    memory.attention_by_groups(model)
    memory.rebuild_norms(model)
    options = {"min_tokens": 1, "min_elements": 1, "block_bytes": 4096}
    store = memory.CheckpointStore(
        memory.Budgets(pinned=0, host=1 << 20), device="cpu", directory=tmp_path, **options
    )
    if on_host:
        memory.layers_on_host(model, device="cpu", min_bytes=1)
    with memory.checkpoint_layers(model, store=store):
        got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
