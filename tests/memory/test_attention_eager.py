"""Models whose attention transformers runs eager, for a soft cap on scores: by tiles, the same numbers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.memory import attention_tiles
from peftkern.memory.attention_groups import attention_by_groups, attention_whole
from peftkern.memory.attention_masks import LazyMask
from peftkern.memory.count import MemoryCount
from peftkern.memory.tiles import Tiling

from ..ops.bounds import assert_as_accurate
from ..patching import models, zoo

TEXT = torch.randint(1, zoo.WORDS, (2, 30), generator=torch.Generator().manual_seed(2))


def gemma2(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A Gemma 2 of a sliding layer and a full one, whose caps bend most of its scores."""
    sizes = zoo.GEMMA | dict(attn_logit_softcapping=1.5, final_logit_softcapping=None) | options
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, attn_implementation="eager")  # 5.17 has another default
    model = transformers.Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows, so that 30 tokens have several."""
    monkeypatch.setattr("peftkern.memory.attention_masks.ROWS", 4)
    monkeypatch.setattr(attention_tiles, "fitted_tiling", lambda *a, **k: (Tiling(1, 1, 8), 30))


def step(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(**{"input_ids": TEXT, "use_cache": False} | inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights.to(logits.dtype)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def padded() -> Tensor:
    """The first sample is padded on the left, the second on the right: rows that read no key at all."""
    mask = torch.ones_like(TEXT)
    mask[0, :11], mask[1, 25:] = 0, 0
    return mask


def packed() -> Tensor:
    return torch.cat([torch.arange(7), torch.arange(19), torch.arange(4)]).repeat(2, 1)


def custom() -> Tensor:
    """A mask of four dimensions, as it is given."""
    hidden = torch.ones(30, 30).triu(1).bool() | (torch.arange(30) == 3)
    return torch.zeros(1, 1, 30, 30).masked_fill(hidden, torch.finfo(torch.float32).min)


INPUTS = {
    "plain": lambda: {},
    "padded": lambda: {"attention_mask": padded()},
    "packed": lambda: {"position_ids": packed()},
    "custom": lambda: {"attention_mask": custom()},
    "cached": lambda: {"use_cache": True},
}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert torch.allclose(got[name], value, rtol=1e-9, atol=1e-11 * max(scale, 1)), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("inputs", INPUTS)
def test_every_mask_gives_what_eager_attention_gives(inputs: str) -> None:
    model = gemma2(torch.float64)
    with zoo.NoRounding([]):
        expected = step(model, **INPUTS[inputs]())
        report = attention_by_groups(model)
        got = step(model, **INPUTS[inputs]())
    assert_close(got, expected)
    assert len(report.tiled) == 2 and report.masks == ("model",) and not report.whole
    assert attention_whole(model) == 2
    assert all("forward" not in module.__dict__ for module in model.modules())
    with zoo.NoRounding([]):
        again = step(model, **INPUTS[inputs]())
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patched", [False, True])
def test_a_model_errs_no_more_than_eager_attention_does(patched: bool, dtype: torch.dtype) -> None:
    model = models.lora(gemma2(dtype))
    with zoo.NoRounding([]):
        exact = step(copy.deepcopy(model).double())
    if patched:
        peftkern.patch(model, dense=True)
    plain = step(model)
    attention_by_groups(model)
    ours = step(model)
    assert len(ours) > 20 and ours.keys() == exact.keys()
    for name, value in exact.items():
        assert_as_accurate(name, ours[name], plain[name], value)


def test_it_stays_through_patch_unpatch_and_checkpointing_and_copies() -> None:
    model = models.lora(gemma2())
    expected = step(model)
    report = attention_by_groups(model)
    peftkern.patch(model, dense=True)
    for layer in model.get_base_model().model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    kinds: list[type] = []
    hook = (
        model.get_base_model()
        .model.layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: kinds.append(type(kwargs["attention_mask"])), with_kwargs=True
        )
    )
    got = step(model)
    assert all(torch.allclose(got[name], value, rtol=1e-3, atol=1e-4) for name, value in expected.items())
    for layer in model.get_base_model().model.layers:
        del layer.forward
    peftkern.unpatch(model)
    step(model)
    twin = copy.deepcopy(model)
    step(twin)
    assert kinds == [LazyMask] * 3 and not report.whole
    hook.remove()
    assert attention_whole(model) == attention_whole(twin) == 2


def peak(length: int, by_tiles: bool) -> tuple[int, int]:
    """Bytes at the most of a step, and the largest storage among them."""
    model = gemma2(max_position_embeddings=4096, num_hidden_layers=2, sliding_window=64)
    if by_tiles:
        attention_by_groups(model)
    ids = TEXT[:1].repeat(1, length // 30 + 1)[:, :length]
    step(model, input_ids=ids)  # probes
    with MemoryCount(classify=None) as count:
        step(model, input_ids=ids)
    return count.peaks["forward"], max(live.nbytes for live in count.live("forward"))


def test_no_matrix_of_queries_by_keys_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkern.memory.tiles._SCORES", 1)  # tiles of 64 rows
    small, middle, large = (peak(length, True) for length in (256, 512, 768))
    assert abs((large[0] - middle[0]) - (middle[0] - small[0])) < 0.01 * small[0]
    assert large[1] <= 2 * 64 * 768 * 4
    assert peak(512, False)[0] > 2 * middle[0]


def test_weights_that_are_asked_for_are_given() -> None:
    model = gemma2()
    expected = model(TEXT, output_attentions=True).attentions
    report = attention_by_groups(model)
    with pytest.warns(UserWarning, match="its weights are asked for"):
        got = model(TEXT, output_attentions=True).attentions
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert report.whole == {"its weights are asked for": 2}


def test_dropout_in_attention_runs_whole() -> None:
    model = gemma2(attention_dropout=0.5).train()
    torch.manual_seed(5)
    expected = step(model)
    report = attention_by_groups(model)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="attention has dropout"):
        got = step(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert sum(report.whole.values()) == 2


def test_an_eager_function_that_computes_something_else_is_left_alone() -> None:
    """gpt-oss has sinks beside the scores."""
    sizes = zoo.DECODER | zoo.EXPERTS | dict(num_local_experts=2, head_dim=16, sliding_window=8)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    model.set_attn_implementation("eager")
    expected = step(model)
    report = attention_by_groups(model)
    with pytest.warns(UserWarning, match="computes something else"):
        got = step(model)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert sum(report.whole.values()) == 2


def test_a_batch_is_generated_as_before() -> None:
    model = gemma2().eval()
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(TEXT, attention_mask=padded(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_by_groups(model)
        assert torch.equal(model.generate(TEXT, attention_mask=padded(), **options), expected)


def test_a_mask_nobody_built_is_a_tensor_to_whoever_asks() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    options = dict(batch_size=2, q_length=6, kv_length=6, q_offset=0, kv_offset=0, dtype=torch.float32)
    function = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    whole, lazy = function(**options), LazyMask(function, options)
    assert lazy.shape == whole.shape and lazy.dtype == whole.dtype and lazy.to("cpu") is lazy
    assert lazy._whole is None
    scores = torch.randn(2, 3, 6, 6)
    for got in (scores + lazy, lazy + scores, torch.add(scores, lazy)):
        assert torch.equal(got, scores + whole)
    assert torch.equal(torch.cat([lazy, whole]), torch.cat([whole, whole]))
    assert torch.equal(lazy[:, :, 1:3], whole[:, :, 1:3]) and torch.equal(lazy.clone(), whole)
    assert lazy.to(torch.float64).dtype == torch.float64
