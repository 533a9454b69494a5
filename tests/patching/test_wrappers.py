"""Models as another version of transformers might write them: forwards behind decorators, with arguments
renamed or added. Each module is fused, or refused with a reason, and gives what the stock one gives."""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.patching.wrappers import UNKNOWN, innermost, rewrapped

from . import zoo

pytestmark = pytest.mark.any_isa

LLAMA = zoo.transformers.models.llama.modeling_llama
CLASSES = {"rope": LLAMA.LlamaAttention, "add_rms_norm": LLAMA.LlamaDecoderLayer}
CLASSES |= {"rms_norm": LLAMA.LlamaRMSNorm, "gated_mlp": LLAMA.LlamaMLP}


def scaled(value: Any) -> Any:
    return (value[0] * 0.5, *value[1:]) if isinstance(value, tuple) else value * 0.5


def held(forward: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return scaled(forward(self, *args, **kwargs))

    return wrapper


def unsaid(forward: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    """A wrapper that does not say what it wraps."""

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return scaled(forward(self, *args, **kwargs))

    return wrapper


def opaque(forward: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    """One that keeps the wrapped function elsewhere than in a cell."""
    box = types.SimpleNamespace(function=forward)

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return scaled(box.function(self, *args, **kwargs))

    return wrapper


def follows_stock(model: nn.Module) -> peftkern.PatchReport:
    stock = copy.deepcopy(model)
    report = peftkern.patch(model)
    assert all(row.reason or row.got != "stock" for row in report.rows)
    torch.testing.assert_close(zoo.output(model), zoo.output(stock), rtol=1e-4, atol=1e-5)
    return report


@pytest.mark.parametrize("decorator", [held, unsaid, opaque])
@pytest.mark.parametrize("got", CLASSES)
def test_a_forward_in_an_unknown_decorator(
    got: str, decorator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code runs once a call, and what it does counts, whether ours runs inside it or not."""
    kind, seen = CLASSES[got], []
    monkeypatch.setattr(kind, "forward", decorator(kind.forward, seen))
    model = zoo.build("llama")
    rows = [
        row
        for row in follows_stock(model).rows
        if isinstance(model.get_submodule(row.name), kind) and row.got in (got, "stock")
    ]
    assert rows and all(
        (row.reason is not None and UNKNOWN in row.reason) == (decorator is opaque) for row in rows
    )
    seen.clear()
    zoo.output(model)
    assert seen == [kind.__name__] * sum(isinstance(module, kind) for module in model.modules())


def rewritten(kind: type[nn.Module], old: str, new: str) -> Callable[..., Any]:
    """The class's forward with a change in its source."""
    source = textwrap.dedent(inspect.getsource(innermost(kind.forward)))
    source = source[source.index("def forward") :]
    assert old in source
    scope: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "<another version>", "exec"), vars(inspect.getmodule(kind)), scope)
    return rewrapped(kind.forward, scope["forward"])


@pytest.mark.parametrize(
    "old, new",
    [
        ("attention_mask", "mask"),
        ("position_embeddings", "angles"),
        ("**kwargs: ", "further: int = 1, **kwargs: "),
    ],
)
def test_an_argument_that_is_renamed_or_added(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (LLAMA.LlamaAttention, LLAMA.LlamaDecoderLayer):
        monkeypatch.setattr(kind, "forward", rewritten(kind, old, new))
    if not old.startswith("**"):
        stock = LLAMA.LlamaDecoderLayer.forward

        # as the model of that version would call it
        def renamed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return stock(
                self, *args, **{new if name == old else name: value for name, value in kwargs.items()}
            )

        monkeypatch.setattr(LLAMA.LlamaDecoderLayer, "forward", functools.wraps(stock)(renamed))
    report = follows_stock(zoo.build("llama"))
    assert {"rope", "add_rms_norm"} <= report.counts.keys()


def test_a_rotary_function_whose_parameters_are_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = LLAMA.apply_rotary_pos_emb
    monkeypatch.setattr(
        LLAMA,
        "apply_rotary_pos_emb",
        lambda query, key, cosine, sine, axis=1: stock(query, key, cosine, sine, axis),
    )
    by_name = (
        "query_states, key_states, cos, sin",
        "query=query_states, key=key_states, cosine=cos, sine=sin",
    )
    monkeypatch.setattr(LLAMA.LlamaAttention, "forward", rewritten(LLAMA.LlamaAttention, *by_name))
    follows_stock(zoo.build("llama"))


def test_a_deprecated_argument_is_renamed_with_its_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LLAMA.LlamaAttention.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "angles" in kwargs:
            warnings.warn("angles is deprecated", FutureWarning, stacklevel=2)
            kwargs["position_embeddings"] = kwargs.pop("angles")
        return forward(*args, **kwargs)

    monkeypatch.setattr(LLAMA.LlamaAttention, "forward", wrapper)
    model = zoo.build("llama")
    report = peftkern.patch(model)
    inner = model.base_model.model.model
    x = torch.randn(1, 5, zoo.WIDTH)
    angles = inner.rotary_emb(x, torch.arange(5)[None])
    expected = inner.layers[0].self_attn(x, position_embeddings=angles)[0]
    with pytest.warns(FutureWarning, match="angles is deprecated"):
        got = inner.layers[0].self_attn(x, angles=angles)[0]
    assert torch.equal(got, expected) and report.counts["rope"] == 2


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_module_of_every_architecture_is_fused_or_refused_with_a_reason(name: str) -> None:
    follows_stock(zoo.build(name).eval())
