"""Attention of 16-bit models in fp32, where torch's 16-bit products are slow: which calls, and that they err
no more than stock's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops import attention as attention_op
from peftkern.patching.attention import (
    AttentionForward,
    AttentionMode,
    CpuAttention,
)
from peftkern.patching.forwards import find, remove
from peftkern.patching.rotary import Rotary
from peftkern.patching.weights import slow_products
from peftkern.patching.wrappers import innermost
from peftkern.runtime import backends

from ..ops.bounds import FACTOR
from . import models, zoo
from .rewriting import installed, surveyed
from .versions import exact

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = exact

LOW = (torch.bfloat16, torch.float16)
# name: modules that attend; Falcon has functions of its own
ATTENDING = {
    "llama": 2,
    "gemma2": 2,
    "phi3": 2,
    "gpt2": 2,
    "gpt-neox": 2,
    "bert": 2,
    "vit": 2,
    "t5": 6,
    "falcon": 0,
}
IDS = zoo.TEXT


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose 16-bit products are slow, whatever this one's are."""
    monkeypatch.setattr("peftkern.patching.attention.slow_products", lambda dtype: dtype in LOW)
    monkeypatch.setattr("peftkern.ops.attention.config.available", lambda: False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which SDPA was called."""
    stock, found = nn.functional.scaled_dot_product_attention, []

    def recorded(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(query.dtype)
        return stock(query, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    return found


def llama(dtype: torch.dtype = torch.bfloat16, implementation: str = "sdpa", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**zoo.DECODER, **zoo.TOKENS, **options)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.normal_(0, 0.1)
    model.set_attn_implementation(implementation)
    return model


def widened(model: nn.Module) -> nn.Module:
    assert installed(model, CpuAttention()) > 0
    return model


def run(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Logits and every gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS, use_cache=False, **inputs).logits
    logits.double().square().mean().backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def padding(rows: int = 3) -> Tensor:
    """The first sequence ends with padding, so that every row has something to attend to."""
    mask = torch.ones_like(IDS)
    mask[0, -rows:] = 0
    return mask


@pytest.mark.parametrize("name", ATTENDING)
def test_which_modules_attend(name: str) -> None:
    found = surveyed(zoo.build(name, dtype=torch.bfloat16), CpuAttention())
    assert [(block.row.got, block.made_of, block.row.reason) for block in found] == [
        ("fp32_attention", (AttentionMode(LOW),), None)
    ] * ATTENDING[name]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, padding()], ids=["causal", "padded"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_models_err_no_more_than_stock_ones(
    dtype: torch.dtype, mask: Tensor | None, implementation: str
) -> None:
    stock = llama(dtype, implementation)
    inputs = {} if mask is None else {"attention_mask": mask}
    ours, plain, exact = (
        run(m, **inputs) for m in (widened(copy.deepcopy(stock)), stock, models.in_fp64(stock))
    )
    for name in exact:
        error, allowed = (
            (got[name].double() - exact[name]).norm() / exact[name].norm() for got in (ours, plain)
        )
        assert error <= max(FACTOR * allowed, torch.finfo(dtype).eps), name
    assert any(not torch.equal(ours[name], plain[name]) for name in ours)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, padding()], ids=["causal", "padded"])
def test_a_layer_attends_as_stock_does_in_fp32_and_rounds_once(
    implementation: str, mask: Tensor | None
) -> None:
    """Bit for bit: stock's function on the same operands, cast."""
    model, given = llama(implementation=implementation), []
    module = model.model.layers[0].self_attn
    scope = innermost(type(module).forward).__globals__
    function = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        implementation, scope["eager_attention_forward"]
    )

    def recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        given.append((args, kwargs, function(*args, **kwargs)))
        return given[-1][2]

    transformers.AttentionInterface.register("recorded", recorded)
    widened(model)
    interfaces = find(module)[1].scope["ALL_ATTENTION_FUNCTIONS"]
    q, k, v = (torch.randn(2, heads, 12, 16).bfloat16() for heads in (4, 2, 2))
    added = (
        None
        if mask is None
        else torch.zeros(2, 1, 12, 12)
        .masked_fill(mask[:, None, None] == 0, torch.finfo(torch.bfloat16).min)
        .bfloat16()
    )
    ours = interfaces.get_interface(implementation, scope["eager_attention_forward"])(
        module, q, k, v, added, scaling=0.25
    )
    wide = function(
        module, q.float(), k.float(), v.float(), None if added is None else added.float(), scaling=0.25
    )
    assert torch.equal(ours[0], wide[0].bfloat16()) and ours[0].dtype == torch.bfloat16
    assert (ours[1] is None) == (wide[1] is None) and (
        ours[1] is None or torch.equal(ours[1], wide[1].bfloat16())
    )
    assert (
        interfaces.get_interface("recorded", None) is recorded
        and interfaces["sdpa"] is scope["ALL_ATTENTION_FUNCTIONS"]["sdpa"]
    )


def test_calls_that_stay_in_16_bits(seen: list[torch.dtype]) -> None:
    """One token against a cache; attention dropout, whose draws depend on the dtype; another device's tensors
    are not ours."""
    model = widened(llama())
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        assert seen == [torch.float32] * 2
        model(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert seen[2:] == [torch.bfloat16] * 2
    seen.clear()
    model.train()
    model(IDS, use_cache=False)
    assert seen == [torch.float32] * 2
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model(IDS, use_cache=False)
    assert seen[2:] == [torch.bfloat16] * 2


def test_one_token_with_a_gradient_is_in_fp32(seen: list[torch.dtype]) -> None:
    widened(llama())(IDS[:, :1], use_cache=False).logits.sum().backward()
    assert seen == [torch.float32] * 2


def test_gradients_or_none_the_same_bits() -> None:
    model = widened(llama())
    expected = model(IDS, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_autocast(seen: list[torch.dtype]) -> None:
    """The dtype autocast would have multiplied in decides; the result has it."""
    model = widened(llama())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS, use_cache=False).logits.dtype == torch.bfloat16
    assert seen == [torch.float32] * 2


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A CPU whose own kernel is the faster one; the sizes of queries it got."""
    level = backends.native().isa()
    if level not in ("avx512bf16", "amx"):
        pytest.skip("no bf16 products here")
    monkeypatch.setattr(attention_op.config, "available", lambda: True)
    monkeypatch.setattr(attention_op.config, "FEWEST_QUERIES", 2)
    original, found = attention_op.attention, []

    def recorded(q: Tensor, *args: Any) -> Tensor:
        found.append(tuple(q.shape))
        return original(q, *args)

    monkeypatch.setattr(attention_op, "attention", recorded)
    return found


@pytest.mark.parametrize("mask", [None, padding()], ids=["causal", "padded"])
def test_in_tiles_models_err_no_more_than_stock_ones(
    mask: Tensor | None, tiled: list[tuple[int, ...]]
) -> None:
    stock = llama()
    inputs = {} if mask is None else {"attention_mask": mask}
    ours = run(widened(copy.deepcopy(stock)), **inputs)
    assert tiled == [(2, 4, 12, 16)] * 2
    plain, exact = run(stock, **inputs), run(models.in_fp64(stock), **inputs)
    assert len(tiled) == 2
    for name in exact:
        error, allowed = (
            (got[name].double() - exact[name]).norm() / exact[name].norm() for got in (ours, plain)
        )
        assert error <= max(FACTOR * allowed, torch.finfo(torch.bfloat16).eps), name


def test_tiles_are_reported_and_taken_off(tiled: list[tuple[int, ...]]) -> None:
    report = peftkern.patch(model := models.lora(llama()), dense=False)
    assert report.counts["tiled_attention"] == 2 and "fp32_attention" not in report.counts
    model(IDS, use_cache=False)
    assert len(tiled) == 2
    peftkern.unpatch(model)
    model(IDS, use_cache=False)
    assert len(tiled) == 2


def test_which_calls_are_in_tiles(tiled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one token against a cache, not with dropout, and nothing on a level where torch is faster."""
    model = widened(llama(attention_dropout=0.5))
    made = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert len(tiled) == 2 and made.shape[1] == IDS.shape[1] + 4  # of the prompt alone
    model.train()(IDS, use_cache=False)
    assert len(tiled) == 2
    with torch.autocast("cpu", torch.bfloat16):
        model.eval()(IDS, use_cache=False)
    assert len(tiled) == 4
    monkeypatch.setattr(attention_op.config, "available", lambda: False)
    model(IDS, use_cache=False)
    assert len(tiled) == 4


def test_fp32_under_autocast_is_in_tiles(tiled: list[tuple[int, ...]]) -> None:
    """Where some weight is in bf16; as torch's SDPA, which autocast gives bf16 operands."""
    model = llama(torch.float32)
    model.lm_head.bfloat16()
    stock = copy.deepcopy(model)
    widened(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (each(IDS, use_cache=False).logits for each in (model, stock))
    assert len(tiled) == 2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_in_tiles_what_is_recomputed_is_the_same(tiled: list[tuple[int, ...]]) -> None:
    model = widened(llama())
    expected = run(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    got = run(model)
    assert len(tiled) == 6 and all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_compiled_model_attends_as_torch_does(tiled: list[tuple[int, ...]]) -> None:
    torch._dynamo.reset()
    model = widened(llama())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    assert len(tiled) == 2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_where_nothing_is_gained_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not surveyed(llama(torch.float32), CpuAttention()) and not surveyed(
        llama().to("meta"), CpuAttention()
    )
    monkeypatch.setattr("peftkern.patching.attention.slow_products", lambda dtype: False)
    assert not surveyed(llama(), CpuAttention())


def test_what_torch_says_of_this_cpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda fast=fast: fast)
        assert [slow_products(dtype) for dtype in (*LOW, torch.float32)] == [not fast, not fast, False]


@pytest.mark.parametrize("how", models.COPIES)
def test_copies_and_removal(how: str, seen: list[torch.dtype]) -> None:
    stock = llama()
    before = run(stock)
    model = widened(copy.deepcopy(stock))
    expected = run(model)
    twin = models.copied(model, how)
    seen.clear()
    got = run(twin)
    assert seen == [torch.float32] * 2 and all(torch.equal(got[name], expected[name]) for name in expected)
    assert sum(remove(module) for module in twin.modules()) == 2
    got = run(twin)
    assert all(torch.equal(got[name], before[name]) for name in before)


def test_beside_rope_and_when_others_change_the_functions(
    monkeypatch: pytest.MonkeyPatch, seen: list[torch.dtype]
) -> None:
    import transformers.models.llama.modeling_llama as defining

    model = llama()
    assert installed(model, Rotary(), CpuAttention()) == 2
    held = find(model.model.layers[0].self_attn)[1]
    assert type(held) is AttentionForward and len(held.cache) == 2
    run(model)
    assert seen == [torch.float32] * 2
    installed(model, Rotary())  # of less: what is no longer wanted is gone
    run(model)
    assert seen[2:] == [torch.bfloat16] * 2
    installed(model, CpuAttention())
    calls = []

    class Theirs(transformers.AttentionInterface):
        def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            calls.append(name)
            return super().get_interface(name, default)

    with monkeypatch.context() as patching:
        patching.setattr(defining, "ALL_ATTENTION_FUNCTIONS", Theirs())
        run(model)
        assert calls == ["sdpa"] * 2 and seen[4:] == [torch.bfloat16] * 2
    run(model)
    assert len(calls) == 2 and seen[6:] == [torch.float32] * 2


def test_patch_reports_it_and_exclude_and_blocks_leave_it(seen: list[torch.dtype]) -> None:
    def build() -> nn.Module:
        return models.lora(llama())

    report = peftkern.patch(model := build(), dense=False)
    rows = [row for row in report.rows if row.got == "fp32_attention"]
    assert (
        report.counts["fp32_attention"] == 2
        and {row.kind for row in rows} == {"attention"}
        and "fp32_attention" in str(report)
    )
    model(IDS, use_cache=False)
    assert seen == [torch.float32] * 2
    assert peftkern.unpatch(model) and not peftkern.unpatch(model)
    for options in (dict(blocks=False), dict(exclude=["self_attn"])):
        if "exclude" in options:  # a LoRA layer outside attention has to remain
            assert peftkern.patch(build(), **options).counts.get("fp32_attention", 0) == 0
        else:
            assert "fp32_attention" not in peftkern.patch(build(), **options).counts


@pytest.mark.any_isa
def test_compile_fullgraph_does_not_recompile() -> None:
    torch._dynamo.reset()
    model = widened(llama())
    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = run(compiled)
    assert {name.removeprefix("_orig_mod."): value for name, value in got.items()}.keys() == expected.keys()
    torch.testing.assert_close(list(got.values()), list(expected.values()), rtol=2e-2, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled)
