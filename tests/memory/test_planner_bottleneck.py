"""The planner's formulas for bottleneck adapters against a count of the library's own training steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.__main__ import main
from peftkern.adapters.bottleneck import get_bottleneck_model
from peftkern.errors import InputError
from peftkern.finetune import FinetuneConfig
from peftkern.finetune.adapters import planned_adapter
from peftkern.memory import Budgets, CheckpointStore, attention_by_groups, checkpoint_layers, tile_mlps
from peftkern.memory.planner.bottleneck import Bottlenecks
from peftkern.memory.planner.budgets import Limits
from peftkern.memory.planner.cards import CPU, card_of
from peftkern.memory.planner.choose import changes, choose
from peftkern.memory.planner.ledger import Ledger
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.parts import adapter_elements, fixed_parts
from peftkern.memory.planner.plan import plan
from peftkern.memory.planner.schedule import run_step
from peftkern.memory.planner.shapes import shape_of
from peftkern.memory.planner.step import Step

from .build import SHAPES, build, config, transformers
from .test_planner_count import PHASES, assert_slope_and_intercept, checkpointed, counted, predicted

SIZES = {"num_hidden_layers": 3}
WIDER = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 448}
# How --adapter names them. The width of the base is 64: the widest bottleneck is as wide.
KINDS = {
    "both": "double_seq_bn[size=8]",
    "wide": "double_seq_bn[size=64]",
    "dropout": "double_seq_bn[size=16,scaling=channel,dropout=0.1]",
    "no bias": "double_seq_bn[size=16,bias=False]",
    "the MLP": "seq_bn[size=8,original_ln_before=False]",
    "the stream": "seq_bn[size=8]",
    "the stream, wide": "seq_bn[size=64]",
    "parallel": "par_bn[size=16]",
    "parallel, both": "scaled_par_bn[size=16,mh_adapter=True]",
}
NIGHTLY = ("no bias", "dropout", "the stream, wide", "the MLP", "wide")


def adapted(settings: Any, kind: str, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A patched model with these adapters alone."""
    base = build(settings, dtype=dtype, patch=False).unload()
    model = get_bottleneck_model(base.requires_grad_(False), kind, task_type="CAUSAL_LM")
    peftkern.patch(model, fused_loss=True)
    return model.train()


def options_of(settings: Any, kind: str) -> dict[str, Any]:
    """The planner's, as the recipe gives them."""
    return planned_adapter(FinetuneConfig(adapter=kind), shape_of(settings))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in NIGHTLY else n for n in KINDS]
)
def test_the_plan_is_what_is_counted(name: str, checkpointing: bool) -> None:
    settings = config(**SIZES)
    model, shape = adapted(settings, KINDS[name]), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"checkpointing": checkpointing} | options_of(settings, KINDS[name])
    assert_slope_and_intercept(model, shape, 1, options)


@pytest.mark.parametrize("family", ["Qwen3Config", pytest.param("Phi3Config", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_families(family: str, checkpointing: bool) -> None:
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=320, pad_token_id=0)
    more = {"head_dim": 16} if family == "Qwen3Config" else {"bos_token_id": 1, "eos_token_id": 2}
    settings = getattr(transformers, family)(**sizes | more)
    model, shape = adapted(settings, KINDS["both"]), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"checkpointing": checkpointing} | options_of(settings, KINDS["both"])
    count, plan = counted(model, 384, 2).peaks, predicted(shape, 384, 2, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["both", pytest.param("parallel", marks=pytest.mark.slow), "the stream"])
def test_with_the_mlp_in_tiles_and_attention_by_groups(name: str, checkpointing: bool) -> None:
    """In fp32, for which a CPU has torch's kernel alone."""
    settings = config(**WIDER)
    model, shape = adapted(settings, KINDS[name], dtype=torch.float32), shape_of(settings)
    tile_mlps(model, tile=64)
    attention_by_groups(model)
    if checkpointing:
        checkpointed(model)
    counted(model, 64)  # the first call learns the output's width
    options = {"checkpointing": checkpointing, "mlp_tile": 64, "kv_groups": True, "dtype_bytes": 4}
    options |= options_of(settings, KINDS[name])
    for length in (384, 768):
        count, plan = counted(model, length).peaks, predicted(shape, length, 1, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)


@pytest.mark.parametrize("name", ["both", pytest.param("parallel, both", marks=pytest.mark.slow)])
def test_with_checkpoints_on_the_host(name: str) -> None:
    settings = config(**WIDER | {"num_hidden_layers": 5})
    model, shape = adapted(settings, KINDS[name]), shape_of(settings)
    length = 384
    budgets = Budgets(device=0, host=8 * length * 128 * 2)
    store = CheckpointStore(budgets, device="cpu", block_bytes=1 << 12, min_tokens=1, min_elements=1)
    with checkpoint_layers(model, store=store):
        counted(model, length)  # the pool's blocks are there then
        count = counted(model, length).peaks
    plan = predicted(shape, length, 1, {"keep_layers": 1} | options_of(settings, KINDS[name]))
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


@pytest.mark.parametrize("name", ["both", "dropout", "no bias", "the stream", "parallel, both"])
def test_trained_elements_and_their_states(name: str) -> None:
    settings = config(**SIZES)
    model, shape = adapted(settings, KINDS[name]), shape_of(settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    elements = sum(parameter.numel() for parameter in trained)
    options = RunOptions(optimizer="adamw", **options_of(settings, KINDS[name]))
    assert adapter_elements(shape, options) == elements
    sizes = {part.name: part.nbytes for part in fixed_parts(Step(shape, options, CPU))}
    assert sizes["adapters"] == sum(parameter.nbytes for parameter in trained)
    assert sizes["optimizer state (adamw)"] == 8 * elements
    eight_bit = options.but(optimizer="adamw_8bit")
    sizes = {part.name: part.nbytes for part in fixed_parts(Step(shape, eight_bit, CPU))}
    small = sum(parameter.numel() for parameter in trained if parameter.numel() < 4096)
    assert sizes["optimizer state (adamw_8bit)"] == pytest.approx(
        8 * small + (elements - small) * (2 + 8 / 256), abs=8
    )


def test_gradients_of_all_layers_are_there_at_the_end() -> None:
    settings = config(**SIZES)
    shape = shape_of(settings)
    options = RunOptions(**options_of(settings, KINDS["both"]))
    ledger = run_step(Step(shape, options, CPU), Ledger())
    assert ledger.bytes_of("gradients") == 4 * adapter_elements(shape, options)
    assert ledger.bytes_of("y_mlp") == ledger.bytes_of("z_mlp") == ledger.bytes_of("d_mlp") == 0


def test_a_plan_says_what_reads_what_and_what_it_cannot_do() -> None:
    settings = config(**SHAPES["8b"])
    shape, card, limits = shape_of(settings), card_of("24"), Limits(23 << 30, 64 << 30, 48 << 30, 0)
    stream = RunOptions(length=16_384, **options_of(settings, "seq_bn"))
    chosen = choose(shape, stream, limits, card)
    assert chosen.away(32) == 0 and not chosen.layers_on_host and not chosen.rebuild_norms
    for change in changes(shape, stream, limits, card):
        assert "checkpoints to" not in change.text and "streamed" not in change.text
    away = plan(shape, stream.but(keep_layers=1), limits, card)
    assert not away.fits and any("stand around it" in text for text in away.refusals)
    output = RunOptions(length=16_384, **options_of(settings, KINDS["the MLP"]))
    assert not plan(shape, output.but(keep_layers=1), limits, card).refusals
    shards = plan(shape, output.but(cards=2, optimizer="adamw"), limits, card)
    assert any(
        "bottlenecks and prefixes are not served for a model in shards" in text for text in shards.refusals
    )
    with pytest.raises(InputError, match="rank: got 16 beside bottlenecks"):
        RunOptions(bottleneck=Bottlenecks(size=8))


@pytest.mark.parametrize(
    ("adapter", "how"),
    [
        ("seq_bn[leave_out=[0]]", "drop leave_out"),
        ("double_seq_bn[reduction_factor={'0': 8, 'default': 16}]", "give one reduction_factor"),
        ("seq_bn[mh_adapter=True]", "drop mh_adapter, or write original_ln_before=False"),
        ("prefix[init=gate]", "init=gate puts one beside attention's output: drop --fit"),
    ],
)
def test_adapters_that_no_formula_knows(adapter: str, how: str) -> None:
    with pytest.raises(InputError, match=how):
        options_of(config(), adapter)


def test_the_command_plans_for_bottlenecks(tmp_path: Any, capsys: pytest.CaptureFixture) -> None:
    config(**SHAPES["8b"]).save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--gpu", "24", "--ram", "64GB", "--adapter"]
    assert main([*line, "bottleneck", "--rank", "48"]) == 0
    text = capsys.readouterr().out
    assert "bottlenecks of width 48" in text
    assert "adapters of each layer's attention and mlp, which read its output" in text
    assert main([*line, "par_bn[reduction_factor=8]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["options"]
    assert found["rank"] == 0
    assert found["bottleneck"] == {
        "size": 512,
        "places": ["mlp"],
        "reads": "input",
        "bias": True,
        "scaling": 0,
        "dropout": False,
    }
    assert main([*line, "lora", "--rows", "padded", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["options"]
    assert (found["rows"], found["rank"], found["bottleneck"]) == ("padded", 16, None)
    assert main([*line, "prefix[tokens=48]"]) == 0
    assert "a prefix of 48 tokens" in capsys.readouterr().out
    assert main([*line, "prefix[init=gate]"]) == 2
    assert "choose another --adapter" in capsys.readouterr().err
