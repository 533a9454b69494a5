"""The planner's formulas with the pieces of peftkern.memory in use: the MLP in tiles, checkpoints on the
host."""

from __future__ import annotations

import pytest
import torch

from peftkern.memory import Budgets, CheckpointStore, Tier, checkpoint_layers, tile_mlps
from peftkern.memory.planner.shapes import shape_of

from .build import build, config
from .test_planner_count import PHASES, checkpointed, counted, predicted

SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 448}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_dropout": 0.1, "r": 8}], ids=str)
def test_the_mlp_in_tiles(checkpointing: bool, lora: dict) -> None:
    settings = config(**SIZES)
    model, shape = build(settings, **lora), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    tile_mlps(model, tile=64)
    options = {"rank": lora.get("r", 4), "checkpointing": checkpointing, "mlp_tile": 64}
    options |= {"dora": True} if "use_dora" in lora else {}
    counted(model, 64)  # the first call learns the output's width
    for length in (384, 768):
        count, plan = counted(model, length).peaks, predicted(shape, length, 1, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("tile", [None, 64])
def test_checkpoints_on_the_host(kept: int, tile: int | None) -> None:
    settings = config(**SIZES | {"num_hidden_layers": 5})
    model, shape = build(settings), shape_of(settings)
    if tile:
        tile_mlps(model, tile=tile)
    length, block = 384, 1 << 12
    nbytes = length * 128 * 2
    budgets = Budgets(device=(kept - 1) * nbytes, host=8 * nbytes)
    store = CheckpointStore(budgets, device="cpu", block_bytes=block, min_tokens=1, min_elements=1)
    with checkpoint_layers(model, store=store):
        counted(model, length)
        assert store.peak[Tier.HOST] == (5 - kept) * nbytes
        count = counted(model, length)  # the pool's blocks are there by now
    options = {"rank": 4, "keep_layers": kept, "mlp_tile": tile}
    plan = predicted(shape, length, 1, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count.peaks[phase], rel=0.05), phase


def test_nothing_is_left_behind() -> None:
    settings = config()
    model = build(settings)
    count = counted(checkpointed(model), 128)
    assert count.current <= sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert all(live.dtype == torch.float32 for live in count.live())
