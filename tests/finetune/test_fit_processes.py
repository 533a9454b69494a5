"""`--fit` in several processes: one choice for all, of the least that any has; gradients and losses of one
process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from peftkern.finetune import FinetuneConfig, finetune, fitting
from peftkern.finetune.agreement import Need, least_of
from peftkern.finetune.errors import InputError
from peftkern.memory.planner.budgets import Limits, limits_of
from peftkern.memory.planner.cards import CARDS, CPU
from peftkern.memory.planner.choose import choose, minimum
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.plan import predict
from peftkern.memory.planner.shapes import read_shape, shape_of

from ..memory.build import SHAPES, config
from ..memory.test_planner import EIGHT
from ..processes import run_processes
from . import fitted
from .test_processes import ADAPTER, column, command, run

pytestmark = pytest.mark.any_isa

NEAR = 1e-5  # fp32 sums in another order
RUN = {"patch": True, "seq_length": 128, "batch_size": 1}
integers = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="FSDP2 shards integers from torch 2.12",
)


def asked(options: dict[str, Any], **changes: Any) -> RunOptions:
    """The run of one of two processes that train on sequences of 128 tokens."""
    settings = FinetuneConfig(**options | RUN).resolved()
    return fitting.run_options(settings, read_shape(options["model"]), 128).but(**changes)


def needed(options: dict[str, Any], **changes: Any) -> int:
    """Bytes of its plan."""
    return predict(read_shape(options["model"]), asked(options, **changes), CPU)


@pytest.mark.parametrize("tight", [0, 1])
def test_all_processes_choose_for_the_least_of_them(
    tight: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """One has the smaller budget, the other the longer batch: what both get fits the one and the other."""
    whole = needed(options, checkpointing=False, replicas=2)
    least = needed(options, checkpointing=True, replicas=2)
    assert least < whole - 1
    of_ranks = [{"fit": f"{whole + 1}B", "length": 128}, {"fit": f"{whole + 1}B", "length": 32}]
    of_ranks[tight]["fit"] = f"{least}B"
    first, second = run_processes(fitted.choices, 2, tmp_path, options | RUN, of_ranks)
    assert first[:2] == second[:2]
    chosen, limits, told = first
    assert chosen["checkpointing"] and chosen["length"] == 128 and chosen["replicas"] == 2
    assert limits["gpu"] == least
    assert "planned for 1 × 128 tokens in each of 2 processes: gradient checkpointing" in told
    assert second[2] == ""


def test_a_refusal_is_that_of_all(options: dict[str, Any], tmp_path: Path) -> None:
    of_ranks = [{"fit": "1GB", "length": 128}, {"fit": "100KB", "length": 128}]
    found = run_processes(fitted.choices, 2, tmp_path, options | RUN, of_ranks)
    for chosen, refusal, _ in found:
        assert chosen is None and "needs" in refusal and "97.66 KiB may be used" in refusal


def test_the_least_of_all_is_taken_of_each() -> None:
    run, short = RunOptions(length=256), RunOptions(length=64, attention="math", dtype_bytes=4)
    limits = Limits(8, 9, 7, 3), Limits(9, 8, 6, 4)
    least = least_of([Need(run, limits[0], CPU), Need(short, limits[1], CARDS["t4"])])
    assert least == Need(run.but(attention="math", dtype_bytes=4), Limits(8, 8, 6, 3), CPU)
    both = least_of([Need(run, limits[0], CPU)] * 2)
    assert both.options.attention == "flash"


def test_a_choice_fits_cards_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.finetune import agreement

    options, kinds = RunOptions(length=16_384, rank=32), (CARDS["rtx 4090"], CARDS["rtx 3090"])
    least = Need(options, limits_of(kinds[1], ram=64 << 30, pinned=48 << 30, disk=0), kinds[0])
    chosen = agreement._chosen(EIGHT, least, kinds)
    assert chosen in [choose(EIGHT, options, least.limits, card) for card in kinds]
    monkeypatch.setattr(agreement, "fits", lambda shape, options, limits, card: card is kinds[0])
    with pytest.raises(InputError, match="no choice fits RTX 3090 and RTX 4090 alike"):
        agreement._chosen(EIGHT, least, kinds)


def test_a_machine_s_memory_is_divided_among_its_processes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sized = FinetuneConfig(**options | {"fit": "4GiB", "fit_ram": "64GiB", "fit_disk": "8GiB"})
    one = fitting._limits(sized, CPU)
    assert one == Limits(4 << 30, 64 << 30, one.pinned, 8 << 30)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fitting._limits(sized, CPU) == Limits(4 << 30, 16 << 30, one.pinned // 4, 2 << 30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # then all may be on one machine
    assert fitting._limits(sized, CPU).host == 8 << 30
    assert limits_of(CPU, ram=6 << 30, processes=3).gpu == 2 << 30


def test_ddp_with_what_is_chosen_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    names = ["whole", "tiers", "host"]
    for errors in run_processes(fitted.gradient_errors, 2, tmp_path, names, "ddp"):
        assert all(errors[name] < NEAR for name in names), errors
        assert errors["tiers: file"] > 0


@integers
def test_shards_with_what_is_chosen_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    names = ["whole", "tiers"]
    for errors in run_processes(fitted.gradient_errors, 2, tmp_path, names, "shard"):
        assert all(errors[name] < NEAR for name in names), errors
        assert errors["tiers: file"] > 0


@integers
def test_shards_refuse_what_is_on_the_host(tmp_path: Path) -> None:
    for layers, embedding in run_processes(fitted.refused_in_shards, 2, tmp_path):
        assert "was put on the host by layers_on_host" in layers and "with ddp(model)" in layers
        assert "was put on the host by embedding_on_host" in embedding


def test_nothing_goes_to_the_host_of_a_model_in_shards() -> None:
    shape, card = shape_of(config(**SHAPES["70b"])), CARDS["rtx 4090"]
    options = RunOptions(length=4096, rank=8, optimizer="adamw", replicas=2)
    limits = limits_of(card, ram=256 << 30, processes=2)
    assert choose(shape, options, limits, card).layers_on_host
    with pytest.raises(InputError, match="on the card at the least"):
        choose(shape, options.but(replicas=1, cards=2), limits, card)
    four = choose(shape, options.but(replicas=1, cards=4), limits_of(card, ram=256 << 30, processes=4), card)
    assert not four.layers_on_host and not four.embedding_on_host
    with pytest.raises(InputError, match="divided among the processes or whole in each of them"):
        RunOptions(cards=2, replicas=2)


def test_the_buckets_of_ddp_are_counted(tmp_path: Path) -> None:
    for count, plan in run_processes(fitted.bucket_bytes, 2, tmp_path):
        assert plan == pytest.approx(count, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=integers)])
def test_the_recipe_fits_two_processes_and_trains_as_one(
    shard: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= RUN | {"steps": 6, "save_steps": 3}
    alone = options | {"batch_size": 2, "output": str(tmp_path / "one")}
    one = finetune(FinetuneConfig(**alone), quiet=True)
    processes = {"cards": 2} if shard else {"replicas": 2}
    least, _ = minimum(read_shape(options["model"]), asked(options, **processes), CPU)
    assert least < needed(options, checkpointing=False, **processes)
    run(2, command(options, shard=shard, fit=f"{least}B", fit_disk="1GB"), tmp_path)
    said = (tmp_path / "messages-0").read_text()
    assert "in each of 2 processes: gradient checkpointing" in said and "on disk" in said
    assert ("divided among 2 cards" if shard else "whole model in each of 2 processes") in said
    assert "--fit" not in (tmp_path / "messages-1").read_text()
    assert column(options["output"]) == pytest.approx(column(one.output), rel=1e-5)
    assert column(options["output"], "grad_norm") == pytest.approx(column(one.output, "grad_norm"), rel=1e-4)
    result = json.loads(Path(options["output"], "result.json").read_text())
    for name in ("perplexity_before", "perplexity_after"):
        assert result[name] == pytest.approx(getattr(one, name), rel=1e-5)
    adapters = [load_file(Path(folder, ADAPTER)) for folder in (options["output"], one.output)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, expected in adapters[1].items():
        assert adapters[0][name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
