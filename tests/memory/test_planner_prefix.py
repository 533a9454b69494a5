"""The planner's formulas for a prefix inside attention against a count of the library's own training
steps, and of the operator from inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.adapters.prefix import prefix_model
from peftkern.errors import InputError
from peftkern.finetune import FinetuneConfig
from peftkern.finetune.adapters import planned_adapter
from peftkern.memory import Budgets, CheckpointStore, checkpoint_layers, tile_mlps
from peftkern.memory.count import MemoryCount
from peftkern.memory.planner.attention import attention_workspace, forward_workspace
from peftkern.memory.planner.budgets import Limits
from peftkern.memory.planner.cards import CPU, card_of
from peftkern.memory.planner.choose import choose
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.parts import adapter_elements, fixed_parts
from peftkern.memory.planner.plan import plan
from peftkern.memory.planner.shapes import shape_of
from peftkern.memory.planner.step import Step
from peftkern.ops import prefix_attention

from ..patching import models
from .build import SHAPES, config, peft, transformers
from .test_planner_count import (
    PHASES,
    assert_slope_and_intercept,
    checkpointed,
    counted,
    counted_rows,
    predicted,
)

SIZES = {"num_hidden_layers": 3}


def adapted(settings: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A patched model with a prefix; its weights are random numbers, as it runs to be surveyed."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(settings).to(dtype)
    models.quantize(base, compute_dtype=dtype)
    wanted = peft.PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM")
    model = prefix_model(base.requires_grad_(False), wanted, init="random")
    peftkern.patch(model, fused_loss=True)
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (8, torch.bfloat16),
        (64, torch.bfloat16),
        pytest.param(64, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_what_is_counted(tokens: int, dtype: torch.dtype, checkpointing: bool) -> None:
    settings = config(**SIZES)
    model, shape = adapted(settings, tokens, dtype), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 0, "prefix": tokens, "checkpointing": checkpointing, "dtype_bytes": dtype.itemsize}
    assert_slope_and_intercept(model, shape, 1, options)


@pytest.mark.parametrize("family", ["Qwen3Config", pytest.param("Phi3Config", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_families(family: str, checkpointing: bool) -> None:
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=320, pad_token_id=0)
    more = {"head_dim": 16} if family == "Qwen3Config" else {"bos_token_id": 1, "eos_token_id": 2}
    settings = getattr(transformers, family)(**sizes | more)
    model, shape = adapted(settings, 16), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 0, "prefix": 16, "checkpointing": checkpointing}
    count, plan = counted(model, 384, 2).peaks, predicted(shape, 384, 2, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_beside_a_mask(rows: str, checkpointing: bool) -> None:
    settings = config(**SIZES)
    model, shape = adapted(settings, 16), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 0, "prefix": 16, "checkpointing": checkpointing, "rows": rows}
    count, plan = counted_rows(model, rows, 2, 384), predicted(shape, 384, 2, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


def test_with_the_mlp_in_tiles_and_checkpoints_on_the_host() -> None:
    settings = config(num_hidden_layers=5, hidden_size=128, intermediate_size=448)
    model, shape = adapted(settings, 16), shape_of(settings)
    tile_mlps(model, tile=64)
    length = 384
    budgets = Budgets(device=0, host=8 * length * 128 * 2)
    store = CheckpointStore(budgets, device="cpu", block_bytes=1 << 12, min_tokens=1, min_elements=1)
    with checkpoint_layers(model, store=store):
        counted(model, length)
        count = counted(model, length).peaks
    plan = predicted(shape, length, 1, {"rank": 0, "prefix": 16, "keep_layers": 1, "mlp_tile": 64})
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(("batch", "heads", "kv", "tokens"), [(1, 4, 2, 8), (2, 8, 8, 64), (3, 4, 1, 16)])
def test_what_the_operator_allocates_inside(
    batch: int, heads: int, kv: int, tokens: int, masked: bool, dtype: torch.dtype
) -> None:
    """Counted from inside, its results taken off."""
    length, width = 256, 32
    sizes = dict(num_attention_heads=heads, num_key_value_heads=kv, hidden_size=heads * width)
    rows = "padded" if masked else "whole"
    options = RunOptions(
        length=length, batch=batch, rows=rows, rank=0, prefix=tokens, dtype_bytes=dtype.itemsize
    )
    step = Step(shape_of(config(**sizes)), options, CPU)
    q = torch.randn(batch, heads, length, width).to(dtype)
    k = torch.randn(batch, kv, length, width).to(dtype)
    v, dy = (
        torch.randn(batch, length, n, width).to(dtype).transpose(1, 2) for n in (kv, heads)
    )  # as projections lay them out
    prefix = torch.randn(2, kv, tokens, width)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril() if masked else None
    arguments = (*prefix, mask is None, width**-0.5)
    with MemoryCount(classify=None) as count:
        y, sums = prefix_attention._fwd(q, k, v, mask, *arguments)
    expected = count.peaks["forward"] - y.nbytes - sums.nbytes
    assert forward_workspace(step, saved=True) == pytest.approx(expected, rel=0.05)
    with MemoryCount(classify=None) as count:
        results = prefix_attention._bwd(dy, q, k, v, mask, *arguments[:2], y, sums, *arguments[2:])
    expected = count.peaks["forward"] - sum(result.nbytes for result in results)
    assert attention_workspace(step) == pytest.approx(expected, rel=0.05)


def test_trained_elements_and_their_states() -> None:
    settings = config(**SIZES)
    model, shape = adapted(settings, 16), shape_of(settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = RunOptions(
        optimizer="adamw", **planned_adapter(FinetuneConfig(adapter="prefix[tokens=16]"), shape)
    )
    assert options.prefix == 16 and options.rank == 0
    elements = sum(parameter.numel() for parameter in trained)
    assert adapter_elements(shape, options) == elements
    sizes = {part.name: part.nbytes for part in fixed_parts(Step(shape, options, CPU))}
    assert sizes["adapters"] == 4 * elements and sizes["optimizer state (adamw)"] == 8 * elements


def test_a_plan_of_a_prefix() -> None:
    shape, card, limits = (
        shape_of(config(**SHAPES["8b"])),
        card_of("24"),
        Limits(23 << 30, 64 << 30, 48 << 30, 0),
    )
    options = RunOptions(length=32_768, rank=0, prefix=32)
    chosen = choose(shape, options, limits, card)
    assert not chosen.kv_groups and not chosen.rebuild_norms and plan(shape, chosen, limits, card).fits
    inside = [attention_workspace(Step(shape, options.but(prefix=tokens), card)) for tokens in (32, 64)]
    # The weights of 32 tokens more and their gradients, fp32, of every head.
    assert inside[1] - inside[0] == 2 * 4 * 32 * 32_768 * 32
    whole = plan(shape, options.but(cards=2, optimizer="adamw"), limits, card)
    assert any("prefixes are not served for a model in shards" in text for text in whole.refusals)
    with pytest.raises(InputError, match="a run has one kind of adapter"):
        RunOptions(prefix=8)
