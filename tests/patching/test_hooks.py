"""Hooks and replacements anywhere inside a patched model: they run as often as in the stock one, and what
they return counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import peftkern

from ..cases import each_choice
from . import models, zoo

pytestmark = pytest.mark.any_isa
MODELS = {"llama": {}, "phi3": dict(use_dora=True)}
KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


@pytest.fixture(scope="module", params=MODELS)
def stock(request: pytest.FixtureRequest) -> nn.Module:
    """A model of one layer, with LoRA or DoRA on every linear of a dense base."""
    case = zoo.CASES[request.param]
    small = case._replace(options=case.options | dict(num_hidden_layers=1))
    with pytest.MonkeyPatch.context() as patching:
        patching.setitem(zoo.CASES, request.param, small)
        return zoo.build(request.param, **MODELS[request.param]).eval()


def halved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(halved(item) for item in value)
    return value * 0.5 if isinstance(value, Tensor) and value.is_floating_point() else value


def hook(module: nn.Module, kind: str, seen: list[str]) -> None:
    """One that counts its calls, and halves what it may return."""

    def changing(*args: Any) -> Any:
        seen.append(kind)
        given = args[2] if kind == "forward" else args[1]
        return halved(given) if isinstance(given, Tensor) or (isinstance(given, tuple) and given) else None

    def watching(*args: Any) -> None:
        seen.append(kind)

    tensors = kind.endswith("pre") or not isinstance(
        module, (zoo.transformers.PreTrainedModel, models.peft.PeftModel)
    )
    getattr(module, f"register_{kind}_hook")(
        changing if tensors and not kind.startswith("full") else watching
    )


def results(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = model.get_input_embeddings()(zoo.TEXT).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), "dx": x.grad} | models.grads(model)


def close(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-7, msg=f"{what}: {name}"
        )


def _words(value: str | tuple[str, str]) -> str:
    return value if isinstance(value, str) else "-".join(value)


def called(stock: nn.Module) -> list[str]:
    """Every module inside that may be called, but for the parts of LoRA layers that have a like one among
    them."""
    like = ("k_proj.", "v_proj.", "up_proj.", "down_proj.", "qkv_proj.")
    names = [name for name, module in stock.named_modules() if type(module).forward is not nn.Module.forward]
    return [
        name for name in names if name and not any(part in name.replace("gate_up_proj.", "") for part in like)
    ]


ORDERS = [*((kind, "patch") for kind in KINDS), ("forward_pre", "hook")]
HOOKED = [
    ("llama", ("forward", "patch")),
    ("llama", ("full_backward_pre", "patch")),
    ("llama", ("forward_pre", "hook")),
    ("phi3", ("forward_pre", "patch")),
    ("phi3", ("full_backward", "patch")),
]


@pytest.mark.parametrize(
    "stock, order", each_choice(MODELS, ORDERS, quick=HOOKED, name=_words), indirect=["stock"]
)
def test_a_hook_on_any_module_runs_once_a_call_and_counts(stock: nn.Module, order: tuple[str, str]) -> None:
    kind, first = order
    twin = copy.deepcopy(stock)
    if first == "patch":
        peftkern.patch(twin)
    for name in called(stock):
        plain, patched, theirs, ours = copy.deepcopy(stock), copy.deepcopy(twin), [], []
        hook(plain.get_submodule(name), kind, theirs)
        hook(patched.get_submodule(name), kind, ours)
        if first == "hook":
            peftkern.patch(patched)
        assert not ours, f"{name}: patch itself ran the hook"
        close(results(patched), results(plain), name)
        assert ours == theirs, name


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_for_every_module_see_the_calls_of_a_stock_model(stock: nn.Module, kind: str) -> None:
    patched, calls = copy.deepcopy(stock), []
    peftkern.patch(patched)
    results(patched)
    for model in (stock, patched):
        names, seen = {id(module): name for name, module in model.named_modules()}, []
        handle = getattr(torch_module, f"register_module_{kind}_hook")(
            lambda module, *_, names=names, seen=seen: seen.append(names[id(module)])
        )
        try:
            results(model)
        finally:
            handle.remove()
        calls.append(seen)
    assert sorted(calls[0]) == sorted(calls[1]) and len(calls[0]) > 20


@pytest.mark.parametrize("stock, first", each_choice(MODELS, ["hook", "patch"]), indirect=["stock"])
def test_a_forward_replaced_on_any_instance_counts(stock: nn.Module, first: str) -> None:
    twin = copy.deepcopy(stock)
    if first == "patch":
        peftkern.patch(twin)
    for name in called(stock):
        plain, patched = copy.deepcopy(stock), copy.deepcopy(twin)
        for model in (plain, patched):
            module = model.get_submodule(name)
            bound = module.forward
            module.forward = lambda *args, bound=bound, **kwargs: _first_halved(bound(*args, **kwargs))
        if first == "hook":
            peftkern.patch(patched)
        close(results(patched), results(plain), name)


def _first_halved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value * 0.5
    return (
        (value[0] * 0.5, *value[1:]) if isinstance(value, tuple) and isinstance(value[0], Tensor) else value
    )


def test_a_hook_that_is_taken_off_gives_the_fused_call_back(calls) -> None:
    model = zoo.build("llama")
    peftkern.patch(model)
    handle = model.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    zoo.output(model)
    assert calls.mlps == 1
    handle.remove()
    zoo.output(model)
    assert calls.mlps == 1 + 2


# ---- what a block was recognized by changes


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _base(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    base = Doubled(layer.in_features, layer.out_features, bias=layer.base_layer.bias is not None)
    base.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = base.requires_grad_(False)


def _layer(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0]


def _norm(model: nn.Module, **attributes: float) -> nn.Module:
    return next(child for child in _layer(model).children() if "norm" in type(child).__name__.lower())


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "eps": lambda model: setattr(_norm(model), "variance_epsilon", 3.0),
    "norm": lambda model: setattr(_layer(model), "post_attention_layernorm", nn.Identity()),
    "weight of a norm": lambda model: setattr(
        _norm(model), "weight", nn.Parameter(_norm(model).weight.detach() * 2)
    ),
    "base of another class": _base,
    "mlp": lambda model: setattr(_layer(model), "mlp", nn.Identity()),
    "down": lambda model: setattr(_layer(model).mlp, "down_proj", _layer(model).mlp.down_proj.base_layer),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_later_counts(stock: nn.Module, what: str) -> None:
    patched = copy.deepcopy(stock)
    peftkern.patch(patched)
    for context in (torch.enable_grad(), torch.no_grad()):
        plain, model = copy.deepcopy(stock), copy.deepcopy(patched)
        with context:
            model(input_ids=zoo.TEXT)
            CHANGES[what](plain), CHANGES[what](model)
            got, expected = (each(input_ids=zoo.TEXT, use_cache=False).logits for each in (model, plain))
        assert not torch.allclose(expected, stock(input_ids=zoo.TEXT).logits, rtol=1e-3), (
            "the change must matter"
        )
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
