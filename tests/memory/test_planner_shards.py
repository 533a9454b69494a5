"""The plan of a model that is divided among cards: bytes on each as a count of the shards, and the rest by
its formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.__main__ import main
from peftkern.finetune.errors import InputError
from peftkern.memory.planner.budgets import Limits, limits_of
from peftkern.memory.planner.cards import CPU, card_of
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.parts import fixed_parts, host_parts
from peftkern.memory.planner.plan import plan
from peftkern.memory.planner.shapes import shape_of
from peftkern.memory.planner.shards import gathered_bytes
from peftkern.memory.planner.step import Step

from ..processes import run_processes
from . import sharded
from .build import SHAPES, config

integers = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="FSDP2 shards integers from torch 2.12",
)
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 448}
PER_CARD = ("weights", "embedding, head", "adapters")


def bytes_of(parts: Any, *groups: str) -> int:
    return sum(part.nbytes for part in parts if part.group in groups)


@integers
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_on_each_process_are_the_plan_s(count: int, tied: bool, tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 1000, "tie_word_embeddings": tied}
    counted = run_processes(sharded.bytes_here, count, tmp_path, sizes)
    shape = shape_of(config(**sizes))
    options = RunOptions(rank=4, optimizer="adamw", cards=count)
    parts = fixed_parts(Step(shape, options, CPU))
    for here, units in counted:
        assert bytes_of(parts, *PER_CARD) == pytest.approx(here, rel=0.01)
        (layers,) = [part for part in parts if part.name == "gathered layers"]
        (head,) = [part for part in parts if part.name == "gathered head"]
        largest_layer, root = units
        assert layers.nbytes == pytest.approx(3 * largest_layer, rel=0.01)
        assert head.nbytes == pytest.approx(root, rel=0.01)


def test_a_70b_on_two_cards_by_the_formula() -> None:
    shape = shape_of(config(**SHAPES["70b"]))
    w, head, a = shape.layer_weights, 2 * shape.embedding, 0
    options = RunOptions(length=4096, rank=16, optimizer="adamw", cards=2)
    for linear in shape.linears:
        a += 16 * (linear.n + linear.k) * linear.count * shape.layers
    expected = (w / 2 + w / 64 + 2 * head + 12 * a) / 2 + w / 4096
    step = Step(shape, options, card_of("rtx 4090"))
    parts = fixed_parts(step)
    held = [part for part in parts if part.name != "optimizer's temporaries"]
    assert bytes_of(held, *PER_CARD, "optimizer") == pytest.approx(expected, rel=1e-3)
    # Gradients, 4 bytes an element, come at the end of the backward: each card keeps its part of them.
    (optimizer,) = [peak for peak in plan(shape, options, Limits(0), step.card).peaks if "opt" in peak.phase]
    assert bytes_of(optimizer.parts, "gradients") == 4 * a // 2
    (load,) = [part for part in host_parts(step, Limits(0)) if part.phases == ("load",)]
    assert load.nbytes == pytest.approx(w / 2 + w / 64 + w / 4096 + 2 * head, rel=1e-3)
    # A layer is received twice, its half, the gradients once.
    moved = w / 2 + w / 64 + 4 * a + head
    assert gathered_bytes(step) == pytest.approx((2 * moved + 4 * a) / 2, rel=1e-3)


def test_more_cards_take_longer_sequences() -> None:
    shape, card = shape_of(config(**SHAPES["70b"])), card_of("rtx 4090")
    options = RunOptions(length=2048, rank=8, optimizer="adamw", keep_layers=1, mlp_tile=4096, kv_groups=True)
    limits = [limits_of(card, ram=256 << 30, processes=cards) for cards in (1, 2, 3, 4)]
    found = [plan(shape, options.but(cards=n + 1), limits[n], card) for n in range(4)]
    assert [one.fits for one in found] == [False, False, True, True]
    assert found[3].longest > found[2].longest > 2048
    peaks = [one.device_bytes for one in found]
    assert peaks == sorted(peaks, reverse=True)


def test_what_shards_cannot_have_is_refused() -> None:
    shape, card = shape_of(config(**SHAPES["8b"])), card_of("rtx 4090")
    options = RunOptions(cards=2, layers_on_host=True)
    refused = " ".join(plan(shape, options, limits_of(card), card).refusals)
    assert "not served for a model in shards" in refused
    assert "paged_adamw_8bit takes no parameters in shards" in refused
    with pytest.raises(InputError, match="cards: got 0, expected at least 1"):
        RunOptions(cards=0)


def test_the_command_plans_for_cards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config(**SHAPES["70b"]).save_pretrained(tmp_path)
    options = ["--gpu", "rtx 4090", "--cards", "4", "--rank", "8", "--length", "4096", "--ram", "256GB"]
    assert main(["plan", str(tmp_path), *options]) == 0
    text = capsys.readouterr().out
    assert "divided among 4 cards (FSDP2)" in text and "It fits" in text
    assert "gathered layers" in text and "from the other cards" in text
    assert main(["plan", str(tmp_path), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["cards"] == 4 and found["options"]["optimizer"] == "adamw"
    assert not found["options"]["layers_on_host"]
