"""The planner's formulas against a count of the library's own training steps, phase by phase."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.memory.count import MemoryCount, SavedCount
from peftkern.memory.planner.cards import CPU
from peftkern.memory.planner.ledger import Ledger
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.schedule import run_step
from peftkern.memory.planner.shapes import Shape, shape_of
from peftkern.memory.planner.step import Step
from peftkern.ops import attention as attention_op
from peftkern.ops.linear import cpu_rows
from peftkern.runtime.backends import native

from .build import SHAPES, build, config, transformers

PHASES = ("forward", "loss", "mlp_backward", "attention_backward")


class Nothing:
    """Operators that allocate nothing inside themselves: what a count from outside sees."""

    logit_bytes = 2

    def zero(self, *args: Any) -> int:
        return 0

    forward = backward = glu_backward = loss = prefix_forward = prefix_backward = zero


class SeenFromOutside(Step):
    ops = Nothing()


def counted(model: Any, length: int, batch: int = 1, *, fake: bool = False) -> MemoryCount:
    """One step's forward, loss and backward."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext(),
        MemoryCount() as count,
    ):
        ids = torch.zeros((batch, length), dtype=torch.int64)
        labels, positions = ids.clone(), torch.arange(length)[None]
        output = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
        output.loss.backward()
        del output
    for parameter in model.parameters():
        parameter.grad = None
    return count


def predicted(shape: Shape, length: int, batch: int, options: dict[str, Any]) -> dict[str, int]:
    step = SeenFromOutside(shape, RunOptions(length=length, batch=batch, **options), CPU, native().isa())
    ledger = run_step(step, Ledger())
    return {phase: ledger.peaks[phase].nbytes for phase in PHASES}


def assert_slope_and_intercept(model: Any, shape: Shape, batch: int, options: dict[str, Any]) -> None:
    """The plan against the count, by phase, at two lengths and in what a token adds."""
    found: list[tuple[dict, dict]] = []
    for length in (192, 384):
        count, plan = counted(model, length, batch).peaks, predicted(shape, length, batch, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)
        found.append((count, plan))
    for phase in PHASES:
        count, plan = (found[1][i][phase] - found[0][i][phase] for i in (0, 1))
        assert plan == pytest.approx(count, rel=0.05), f"bytes a token in {phase}"


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


BF16 = torch.bfloat16
# sizes of the model, of its adapters and base, batch, checkpointed, options of the plan beside these
CONFIGURATIONS: dict[str, tuple[dict, dict, int, bool, dict]] = {
    "plain": ({}, {}, 1, False, {}),
    "checkpointed": ({}, {}, 1, True, {}),
    "batch": ({"num_hidden_layers": 3}, {"r": 16}, 3, True, {"rank": 16}),
    "all heads": ({"num_key_value_heads": 4}, {"r": 8}, 2, False, {"rank": 8}),
    "one kv head": ({"num_key_value_heads": 1}, {"r": 8}, 2, True, {"rank": 8}),
    "tied": ({"tie_word_embeddings": True}, {}, 1, True, {}),
    "dropout": ({"num_hidden_layers": 4}, {"lora_dropout": 0.1}, 1, False, {}),
    "not nested": ({}, {"nested": False}, 2, True, {"nested": False}),
    "bias": ({"attention_bias": True, "mlp_bias": True}, {"r": 32}, 1, False, {"rank": 32}),
    "dora": ({"num_hidden_layers": 3}, {"use_dora": True}, 2, False, {"dora": True}),
    "dora checkpointed": ({}, {"use_dora": True}, 2, True, {"dora": True}),
    "dense base": ({}, {"four_bit": False}, 1, True, {"four_bit": False}),
    "16-bit adapters": ({}, {"adapter_dtype": BF16}, 2, False, {"adapter_bytes": 2}),
    "queries and values": (
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        1,
        False,
        {"targets": ("q_proj", "v_proj")},
    ),
    "attention alone": (
        {},
        {"target_modules": ["q_proj", "o_proj"]},
        2,
        True,
        {"targets": ("q_proj", "o_proj")},
    ),
    "the MLP alone": (
        {"num_hidden_layers": 3},
        {"target_modules": ["up_proj", "down_proj"]},
        1,
        True,
        {"targets": ("up_proj", "down_proj")},
    ),
    "fp32": ({"num_hidden_layers": 3}, {"dtype": torch.float32}, 1, True, {"dtype_bytes": 4}),
}


NIGHTLY = (
    "tied",
    "not nested",
    "bias",
    "16-bit adapters",
    "dora checkpointed",
    "all heads",
    "attention alone",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in NIGHTLY else n for n in CONFIGURATIONS]
)
def test_the_plan_is_what_is_counted(name: str) -> None:
    sizes, made, batch, checkpointing, options = CONFIGURATIONS[name]
    settings = config(**sizes)
    model, shape = build(settings, **made), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 4, "checkpointing": checkpointing} | options
    assert_slope_and_intercept(model, shape, batch, options)


FAMILIES = {
    "Qwen3Config": {"head_dim": 16},
    "Phi3Config": {"bos_token_id": 1, "eos_token_id": 2},
    "Qwen2Config": {},
    "MistralConfig": {"sliding_window": None},
}


@pytest.mark.parametrize(
    "family", [*list(FAMILIES)[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in list(FAMILIES)[1:])]
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_other_families(family: str, checkpointing: bool) -> None:
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=320, pad_token_id=0)
    settings = getattr(transformers, family)(**sizes | FAMILIES[family])
    model, shape = build(settings), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    count = counted(model, 384).peaks
    plan = predicted(shape, 384, 1, {"rank": 4, "checkpointing": checkpointing})
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.02), phase


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", ["MistralConfig", pytest.param("Gemma3TextConfig", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("own", [True, False], ids=["native attention", "torch's"])
def test_the_mask_of_a_window_is_counted(family: str, checkpointing: bool, own: bool) -> None:
    """Ours, where this CPU has it, and torch's, which makes a mask of numbers of it."""
    row = cpu_rows.row(native().isa())
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=320, pad_token_id=0, head_dim=16, sliding_window=256)
    if family == "Gemma3TextConfig":
        sizes |= dict(layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
    settings = getattr(transformers, family)(**sizes)
    model, shape = build(settings), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 4, "checkpointing": checkpointing}
    for length in (192, 768) if family == "MistralConfig" else (768,):  # within the window there is none
        with cpu_rows.use_row(native().isa(), replace(row, attention=own and row.attention)):
            count, plan = counted(model, length).peaks, predicted(shape, length, 1, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length)


def batch_of(rows: str, batch: int, length: int, documents: int = 4) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of packed samples of so many documents, or of samples of several lengths."""
    trl = pytest.importorskip("trl.trainer.sft_trainer", reason="trl is not installed")
    sizes = [length] + [length // 2 + 1] * (batch - 1)
    samples = [{"input_ids": [1] * (length if rows == "packed" else size)} for size in sizes]
    if rows == "packed":
        sizes = [length // documents - 1] * (documents - 1)
        samples = [sample | {"seq_lengths": [*sizes, length - sum(sizes)]} for sample in samples]
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=rows == "packed")
    return collate(samples)


def counted_rows(model: Any, rows: str, batch: int, length: int, documents: int = 4) -> dict[str, int]:
    with MemoryCount() as count:
        inputs = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in batch_of(rows, batch, length, documents).items()
        }
        model(**inputs, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return count.peaks


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["native attention", "torch's"])
def test_the_mask_of_rows_that_are_not_whole_is_counted(rows: str, checkpointing: bool, own: bool) -> None:
    row = cpu_rows.row(native().isa())
    settings = config(num_hidden_layers=3)
    model, shape = build(settings), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options, found = {"rank": 4, "checkpointing": checkpointing, "rows": rows}, []
    for length, batch in ((192, 2), (384, 2), (384, 3)):
        with cpu_rows.use_row(native().isa(), replace(row, attention=own and row.attention)):
            count = counted_rows(model, rows, batch, length)
            plan = predicted(shape, length, batch, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.05), (phase, length, batch)
        found.append((count, plan))
    whole = predicted(shape, 384, 3, options | {"rows": "whole"})
    assert all(found[2][1][phase] > 1.1 * whole[phase] for phase in PHASES)  # the mask is what is tested
    for phase in PHASES:
        count, plan = (found[1][i][phase] - found[0][i][phase] for i in (0, 1))
        assert plan == pytest.approx(count, rel=0.05), phase


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_masks_of_two_kinds_of_layers_are_counted(rows: str, checkpointing: bool) -> None:
    """Gemma 3: full attention has a mask of its own then, and a window one that is shorter than the row."""
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=320, pad_token_id=0, head_dim=16, sliding_window=512)
    sizes |= dict(layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
    settings = transformers.Gemma3TextConfig(**sizes)
    model, shape = build(settings), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 4, "checkpointing": checkpointing, "rows": rows}
    count, plan = counted_rows(model, rows, 2, 384), predicted(shape, 384, 2, options)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(count[phase], rel=0.05), phase


def test_saved_bytes_of_a_layer_are_what_hooks_count() -> None:
    settings = config(num_hidden_layers=3)
    model, shape = build(settings), shape_of(settings)
    ids = torch.zeros((1, 256), dtype=torch.int64)
    with SavedCount(model) as saved:
        model(input_ids=ids, labels=ids, use_cache=False)
    step = SeenFromOutside(shape, RunOptions(length=256, rank=4, checkpointing=False), CPU)
    per_layer = predicted_saved(step)
    # Beside the layers: the last norm's input and factor, the loss's dx, the rotary tables.
    rest = 2 * step.h + step.rstd + step.rope
    weights = sum(p.nbytes for p in quantization_tensors(model))
    # The first layer's input has no gradient; a layer that runs whole keeps it, for second derivatives.
    first = 0 if attention_op.config.available() else -step.h
    expected = 3 * per_layer + first + rest
    assert saved.bytes - weights == pytest.approx(expected, rel=0.01)


def predicted_saved(step: Step) -> int:
    from peftkern.memory.planner.bottleneck import Branches
    from peftkern.memory.planner.mlp import MLP
    from peftkern.memory.planner.schedule import _Walk

    branches = Branches(step, Ledger())
    return _Walk(step, Ledger(), MLP(step, Ledger(), branches), branches).saved_of_layer()


def quantization_tensors(model: Any) -> list[torch.Tensor]:
    """absmax and codes, which are no parameters."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for tensor in _tensors(state):
            found[tensor.untyped_storage()._cdata] = tensor
    return list(found.values())


def _tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [state.absmax, state.code, state.offset]
    return [tensor for tensor in own if tensor is not None] + _tensors(state.state2)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="the fake tensors of torch 2.11 know no parameter of a class of its own",
)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ["8b", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SHAPES)[1:])])
def test_large_shapes_on_fake_tensors(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake mask cannot be seen to be causal, so that transformers would build it: S^2 bytes that a run has
    # not.
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "create_causal_mask", lambda *a, **k: None)
    settings = config(**SHAPES[name] | {"num_hidden_layers": 2})
    model, shape = build(settings, r=32), shape_of(settings)
    if checkpointing:
        checkpointed(model)
    options = {"rank": 32, "checkpointing": checkpointing}
    for length in (2048, 32768):
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=checkpointing
        ):  # as trainers do: it changes nothing
            count = counted(model, length, fake=True).peaks
        plan = predicted(shape, length, 1, options)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(count[phase], rel=0.01), (phase, length)
