"""Bottleneck adapters on models at work: 4-bit bases, patched models, checkpointing, compiling, copies,
several adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.adapters.bottleneck import (
    BottleneckConfig,
    add_bottleneck,
    bottleneck_disabled,
    bottleneck_parameters,
    find_places,
    remove_bottleneck,
    set_bottleneck,
)
from peftkern.adapters.bottleneck.layer import BottleneckLayer, InputTap

from .. import stock
from ..patching import models, zoo
from ..patching.models import IDS, copied, grads, llama
from .test_bottleneck_places import CONFIGS, build, randomize


@pytest.fixture(autouse=True)
def stock_bitsandbytes():
    with stock.right():
        yield


def adapted(model: nn.Module, config: str = CONFIGS["houlsby"]) -> nn.Module:
    add_bottleneck(model, config)
    randomize(model)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """Output and the adapters' gradients of one step."""
    model.zero_grad(set_to_none=True)
    result = zoo.output(model)
    zoo.losses(result).mean().backward()
    return {"output": result.detach()} | {
        key: p.grad.clone() for key, p in bottleneck_parameters(model).items()
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] - value).norm() <= tolerance * value.norm() + 1e-7, key


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_four_bit_bases_gradients_are_those_of_fp64_on_its_exact_weights(kind: str) -> None:
    model = llama(torch.float32)
    model = adapted(model, CONFIGS[kind])
    exact = models.in_fp64(model)
    peftkern.patch(model)
    errors = models.errors(models.run(model), models.run(exact))
    assert max(errors.values()) < 1e-4, errors
    assert {key for key in errors if "bottlenecks" in key} == {
        key for key, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "bert", "gpt-neox"])
def test_patched_before_or_after_the_same_modules_run_fused_and_compute_the_same(
    name: str, kind: str
) -> None:
    plain, after, before = (build(name) for _ in range(3))
    reports = {"alone": peftkern.patch(build(name), dense=True), "before": peftkern.patch(before, dense=True)}
    for model in (plain, after, before):
        torch.manual_seed(5)
        adapted(model, CONFIGS[kind])
    reports["after"] = peftkern.patch(after, dense=True)
    fused = [
        {key: count for key, count in report.counts.items() if key != "stock"} for report in reports.values()
    ]
    assert fused[0] == fused[1]
    assert (
        fused[0].items() <= fused[2].items()
    )  # an adapter on a layer's second norm lets its residual addition be fused too
    expected = step(plain)
    for model in (after, before):
        assert_close(step(model), expected)
    peftkern.unpatch(before)
    assert_close(step(before), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_patching_finds_the_same_places(name: str) -> None:
    model = build(name)
    expected = find_places(model)
    peftkern.patch(model, dense=True)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    assert find_places(model) == expected
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name: str, kind: str, reentrant: bool) -> None:
    model = adapted(build(name), CONFIGS[kind]).train()
    peftkern.patch(model, dense=True)
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = step(model)
    assert_close(got, expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "patched"),
    [
        ("bert", "parallel", False),
        pytest.param("llama", "houlsby", True, marks=pytest.mark.slow),
        pytest.param("llama", "parallel", True, marks=pytest.mark.slow),
        pytest.param("bert", "parallel", True, marks=pytest.mark.slow),
        pytest.param("bert", "pfeiffer", True, marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph(name: str, kind: str, patched: bool) -> None:
    model = adapted(build(name), CONFIGS[kind])
    if patched:
        peftkern.patch(model, dense=True)
    expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    keyword = {"use_cache": False} if name == "llama" else {}
    out = compiled(input_ids=zoo.TEXT, **keyword).logits
    torch.testing.assert_close(out, expected["output"], rtol=1e-6, atol=1e-6)  # equal where measured
    zoo.losses(out).mean().backward()
    assert_close(
        {"output": out.detach()} | {key: p.grad for key, p in bottleneck_parameters(model).items()}, expected
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("how", models.COPIES)
def test_copies_are_whole_and_their_own(how: str, name: str, kind: str) -> None:
    model = adapted(build(name), CONFIGS[kind])
    peftkern.patch(model, dense=True)
    other = copied(model, how)
    expected = step(model)
    assert_close(step(other), expected, 1e-6)
    randomize(other)
    assert torch.equal(zoo.output(model), expected["output"])
    remove_bottleneck(other)
    assert not any(isinstance(module, (BottleneckLayer, InputTap)) for module in other.modules())


def test_several_adapters_switch_and_add_up() -> None:
    model = build("llama").double()
    base = zoo.output(model)
    outputs = {}
    for name, config in (("a", CONFIGS["houlsby"]), ("b", CONFIGS["parallel"]), ("c", CONFIGS["pfeiffer"])):
        add_bottleneck(model, config, name=name)
        with torch.no_grad():
            for parameter in bottleneck_parameters(model, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        outputs[name] = zoo.output(model)
    for name, expected in outputs.items():
        set_bottleneck(model, name)
        assert torch.equal(zoo.output(model), expected)
        assert {p.requires_grad for p in bottleneck_parameters(model, name).values()} == {True}
        assert not any(
            p.requires_grad
            for other in outputs
            if other != name
            for p in bottleneck_parameters(model, other).values()
        )
    set_bottleneck(model, ["a", "b"])
    both = zoo.output(model)
    zoo.losses(both).mean().backward()
    assert all(p.grad is not None for name in "ab" for p in bottleneck_parameters(model, name).values())
    remove_bottleneck(model, "c")
    assert torch.equal(zoo.output(model), both)
    remove_bottleneck(model, "b")
    assert torch.equal(zoo.output(model), outputs["a"])
    with bottleneck_disabled(model):
        assert torch.equal(zoo.output(model), base)
    remove_bottleneck(model)
    assert torch.equal(zoo.output(model), base)


def test_the_branches_of_several_adapters_read_the_unadapted_activation() -> None:
    model = build("llama").double()
    seen: dict[str, Tensor] = {}
    mlp = model.model.layers[1].mlp
    for name in "ab":
        add_bottleneck(
            model, BottleneckConfig(places=("mlp",), leave_out=(0,), size=3, init="bert"), name=name
        )
    set_bottleneck(model, ["a", "b"])
    mlp.register_forward_hook(lambda _, args, out: seen.update(base=out))
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.update(adapted=out))
    zoo.output(model)
    branches = sum(
        adapter(seen["base"], seen["base"]) - seen["base"]
        for adapter in model.model.layers[1].mlp.bottlenecks.values()
    )
    torch.testing.assert_close(seen["adapted"], seen["base"] + branches)


def test_the_base_is_frozen_meanwhile_and_trains_again_after_removal() -> None:
    model = build("llama").requires_grad_(True)
    model.lm_head.requires_grad_(False)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    adapted(model)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".bottlenecks." not in key)
    remove_bottleneck(model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_modules_put_around_others_pass_for_them() -> None:
    model = adapted(build("llama"), CONFIGS["pfeiffer"])
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.in_features == 64 and layer.self_attn.layer_idx == 0
    assert not hasattr(layer, "lora_A") and not hasattr(layer, "nonsense")


@pytest.mark.parametrize("order", ["lora first", "bottleneck first"])
def test_beside_lora(order: str) -> None:
    base = build("llama")
    lora = models.config(target_modules=["q_proj", "down_proj"])
    if order == "lora first":
        model = models.peft.get_peft_model(base, lora)
        add_bottleneck(model, CONFIGS["houlsby"])
    else:
        add_bottleneck(base, CONFIGS["houlsby"])
        model = models.peft.get_peft_model(base, lora)
    models.randomize(model)
    randomize(model if order == "lora first" else base)
    expected = zoo.output(model)
    report = peftkern.patch(model, dense=True)
    assert report.counts["qlora_linear"] == 4
    torch.testing.assert_close(zoo.output(model), expected, rtol=1e-5, atol=1e-5)  # 1.7e-6 measured


def test_dropout_acts_in_training_only() -> None:
    model = build("llama")
    add_bottleneck(model, BottleneckConfig(dropout=0.5, init="bert", scaling=5.0))
    assert torch.equal(zoo.output(model), zoo.output(model))
    assert not torch.equal(zoo.output(model.train()), zoo.output(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    first = step(model)
    model.gradient_checkpointing_disable()
    torch.manual_seed(1)
    assert_close(step(model), first, 1e-6)


def test_near_identity_at_the_start() -> None:
    model = build("llama")
    before = zoo.output(model)
    for init, least, most in (("houlsby", 0.0, 1e-2), ("mam_adapter", -1.0, 0.0), ("bert", 1e-3, 1.0)):
        add_bottleneck(model, BottleneckConfig(init=init))
        change = ((zoo.output(model) - before).norm() / before.norm()).item()
        assert least < change <= most, (init, change)
        remove_bottleneck(model)


def test_generation_with_a_cache_is_generation_without() -> None:
    model = adapted(build("llama"), CONFIGS["parallel"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = IDS[:, :5]
    assert torch.equal(
        model.generate(prompt, use_cache=True, **options), model.generate(prompt, use_cache=False, **options)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda m: set_bottleneck(m, "x"),
        lambda m: remove_bottleneck(m, "x"),
        lambda m: bottleneck_parameters(m, "x"),
    ],
)
def test_unknown_names_are_told(call: Any) -> None:
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are 'default'"):
        call(adapted(build("llama")))


def test_a_model_without_adapters_and_a_taken_name_are_told() -> None:
    with pytest.raises(ValueError, match="model: has no bottleneck adapter"):
        remove_bottleneck(build("llama"))
    with pytest.raises(ValueError, match="name: there is an adapter 'default' already"):
        add_bottleneck(adapted(build("llama")))


def test_grads_reach_the_adapters_alone() -> None:
    model = adapted(llama(torch.float32))
    peftkern.patch(model)
    models.run(model)
    assert all("bottlenecks" in key for key in grads(model))
