"""The planner's formulas with the pieces of peftkern.memory in use: the MLP in tiles, checkpoints on the
host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftkern.memory import (
    Budgets,
    CheckpointStore,
    Tier,
    attention_by_groups,
    checkpoint_layers,
    layers_on_host,
    rebuild_norms,
    tile_mlps,
)
from peftkern.memory.count import MemoryCount
from peftkern.memory.planner.budgets import Limits
from peftkern.memory.planner.cards import CPU, card_of
from peftkern.memory.planner.choose import changes, choose
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.parts import fixed_parts, host_parts
from peftkern.memory.planner.plan import longest, plan
from peftkern.memory.planner.shapes import shape_of
from peftkern.memory.planner.step import Step
from peftkern.memory.planner.table import lines

from .build import SHAPES, build, config, transformers
from .test_planner_count import PHASES, checkpointed, counted, counted_rows, predicted, quantization_tensors


def nightly(value: Any) -> Any:
    """A parameter of the nightly suite."""
    return pytest.param(value, marks=pytest.mark.slow)


BF16 = torch.bfloat16
SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 448}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "lora", [{}, *(nightly(lora) for lora in ({"use_dora": True}, {"lora_dropout": 0.1, "r": 8}))], ids=str
)
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


PIECES = {
    "groups": {"kv_groups": True},
    "norms": {"rebuild_norms": True},
    "all": {"kv_groups": True, "rebuild_norms": True, "mlp_tile": 64},
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", [nightly("groups"), nightly("norms"), "all"])
def test_attention_by_groups_and_norms_again(name: str, checkpointing: bool) -> None:
    """In fp32, for which a CPU has torch's kernel alone."""
    settings, options = config(**SIZES), PIECES[name] | {"rank": 4, "checkpointing": checkpointing}
    options |= {"dtype_bytes": 4}
    model, shape = build(settings, dtype=torch.float32), shape_of(settings)
    if "rebuild_norms" in options:
        rebuild_norms(model)
    if "mlp_tile" in options:
        tile_mlps(model, tile=options["mlp_tile"])
    if "kv_groups" in options:
        attention_by_groups(model)
    if checkpointing:
        checkpointed(model)
    counted(model, 64)
    count, plan = counted(model, 768).peaks, predicted(shape, 768, 1, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.02), phase


GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "attn_implementation": "eager"}


@pytest.mark.parametrize("checkpointing", [True, nightly(False)])
@pytest.mark.parametrize(
    ("by_tiles", "batch", "dtype"),
    [
        (True, 1, BF16),
        (False, 1, BF16),
        pytest.param(True, 3, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_attention_with_a_soft_cap(
    by_tiles: bool, batch: int, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tiles with a slope of its own; eager, with scores and masks that grow with the square."""
    if batch == 1:
        monkeypatch.setattr("peftkern.memory.tiles._SCORES", 1)  # tiles of 64 rows, heads one by one
    sizes = SIZES | dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=320, pad_token_id=0)
    settings = transformers.Gemma2Config(**sizes | GEMMA2)
    model, shape = build(settings, dtype=dtype), shape_of(settings)
    if by_tiles:
        assert attention_by_groups(model).masks == ("base_model.model.model",)
    if checkpointing:
        checkpointed(model)
    counted(model, 64)
    options = {
        "rank": 4,
        "checkpointing": checkpointing,
        "kv_groups": by_tiles,
        "dtype_bytes": dtype.itemsize,
    }
    slopes: list[list[int]] = []
    for length in (384, 640):
        count, plan = counted(model, length, batch).peaks, predicted(shape, length, batch, options)
        if by_tiles and checkpointing:  # a tile's forward is not told from its backward when computed again
            for peaks in (count, plan):
                peaks["mlp_backward"] = max(peaks["mlp_backward"], peaks["attention_backward"])
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)
        slopes.append([count["attention_backward"], plan["attention_backward"]])
    count, plan = (after - before for before, after in zip(*slopes, strict=True))
    if batch == 1:  # else tiles have fewer rows at the greater length
        assert plan == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("by_tiles", [True, nightly(False)])
def test_packed_samples_under_a_soft_cap(by_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tiles masks are made a tile at a time; eager attention is given one of the whole row a kind of
    layer."""
    monkeypatch.setattr("peftkern.memory.tiles._SCORES", 1)
    sizes = SIZES | dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=320, pad_token_id=0)
    settings = transformers.Gemma2Config(**sizes | GEMMA2)
    model, shape = build(settings), shape_of(settings)
    if by_tiles:
        attention_by_groups(model)
    checkpointed(model)
    counted(model, 64)
    options = {"rank": 4, "kv_groups": by_tiles, "rows": "packed"}
    for length in (200, 328):  # tiles of 64 rows reach from one document into the next
        count = counted_rows(model, "packed", 2, length, documents=1)  # the longest that there can be
        plan = predicted(shape, length, 2, options)
        if by_tiles:
            for peaks in (count, plan):
                peaks["mlp_backward"] = max(peaks["mlp_backward"], peaks["attention_backward"])
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)


def test_a_plan_of_packed_samples_grows_with_the_square_of_the_batch() -> None:
    shape, card = shape_of(config(**SHAPES["8b"])), card_of("24")
    limits = Limits(23 << 30, 64 << 30, 48 << 30, 0)
    asked = RunOptions(length=8192, batch=2, rows="packed", keep_layers=1, mlp_tile=2048)
    found = plan(shape, asked, limits, card)
    (masks,) = [part for part in found.peaks[1].parts if part.name == "masks"]
    assert masks.nbytes == 16_384**2
    one = plan(shape, asked.but(batch=1, accumulation=2), limits, card)
    (masks,) = [part for part in one.peaks[1].parts if part.name == "masks"]
    assert masks.nbytes == 8192**2
    (padded,) = [
        p for p in plan(shape, asked.but(rows="padded"), limits, card).peaks[1].parts if "masks" in p.name
    ]
    assert padded.nbytes == 2 * 8192**2
    assert any("rows of several documents are given a mask of 256.00 MiB" in text for text in found.warnings)
    assert not any("which is not counted here" in text for text in found.warnings)
    text = "\n".join(lines(found))
    assert "rows of several documents, the batch as one row" in text and "attention's masks" in text
    whole = plan(shape, asked.but(rows="whole"), limits, card)
    assert whole.longest > 1.5 * found.longest > 0


def test_a_plan_of_a_soft_cap_is_by_tiles_and_refused_without() -> None:
    shape = shape_of(transformers.Gemma2Config(num_hidden_layers=2, attn_implementation="eager"))
    card, limits = card_of("24"), Limits(23 << 30, 64 << 30, 48 << 30, 0)
    asked = RunOptions(length=32768)
    whole = plan(shape, asked, limits, card)
    assert any("eager attention at 32,768 tokens" in text for text in whole.refusals) and not whole.fits
    chosen = plan(shape, choose(shape, asked, limits, card), limits, card)
    assert chosen.options.kv_groups and chosen.fits and not chosen.refusals
    text = "\n".join(lines(chosen))
    assert "eager attention, for a soft cap on its scores, by key/value heads and tiles of queries" in text
    assert "no fused kernel of PyTorch has a soft cap" in text and "padded batches" not in text
    assert any(
        one.text == "attention by key/value heads and tiles of queries"
        for one in changes(shape, asked, limits, card)
    )
    grows = [longest(shape, chosen.options, Limits(n << 30, 64 << 30, 48 << 30, 0), card) for n in (12, 23)]
    assert grows[1] > grows[0] > 8192


@pytest.mark.parametrize("kept", [1, nightly(2)])
@pytest.mark.parametrize("tile", [nightly(None), 64])
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


@pytest.mark.parametrize(
    "made",
    [{}, nightly({"nested": False}), {"use_dora": True, "r": 8}, nightly({"four_bit": False})],
    ids=str,
)
@pytest.mark.parametrize("tied", [nightly(True), False])
def test_weights_that_are_always_there(made: dict, tied: bool) -> None:
    settings = config(**SIZES, vocab_size=1000, tie_word_embeddings=tied)
    model, shape = build(settings, **made), shape_of(settings)
    held = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
    total = sum(held.values()) + sum(tensor.nbytes for tensor in quantization_tensors(model))
    options = RunOptions(
        rank=made.get("r", 4),
        nested=made.get("nested", True),
        dora="use_dora" in made,
        four_bit=made.get("four_bit", True),
        optimizer="adamw",
    )
    parts = fixed_parts(Step(shape, options, CPU))
    weights = [part for part in parts if part.group in ("weights", "embedding, head", "adapters")]
    assert sum(part.nbytes for part in weights) == pytest.approx(total, rel=0.005)


def test_the_states_of_torch_adamw() -> None:
    settings = config(**SIZES)
    model, shape = build(settings), shape_of(settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    with MemoryCount() as count, count.enter("optimizer"):
        optimizer.step()
    options = RunOptions(rank=4, optimizer="adamw")
    (states,) = [part for part in fixed_parts(Step(shape, options, CPU)) if "state" in part.name]
    assert states.nbytes == pytest.approx(count.current, rel=0.01)


def test_slots_of_streamed_layers() -> None:
    settings = config(**SIZES | {"num_hidden_layers": 3})
    model, shape = build(settings), shape_of(settings)
    with layers_on_host(model, device="cpu", min_bytes=1) as handle:
        slots = sum(slot.nbytes for slot in handle._slots)
    options = RunOptions(rank=4, layers_on_host=True)
    (part,) = [part for part in fixed_parts(Step(shape, options, CPU)) if part.name == "streamed layers"]
    (host,) = [
        part for part in host_parts(Step(shape, options, CPU), Limits(0)) if part.name == "packed layers"
    ]
    assert part.nbytes == pytest.approx(slots, rel=0.05)
    assert host.nbytes == pytest.approx(1.5 * slots, rel=0.05)
