"""What a gated MLP was recognized by, changed later: the activation, attributes, a configuration, the class's
forward."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftkern

from . import models

pytestmark = pytest.mark.any_isa


class Gated(nn.Module):
    """Attributes of every kind that a forward may read."""

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.dropout, self.config = (
            act or nn.GELU(),
            nn.Dropout(0.5),
            types.SimpleNamespace(scale=1.0),
        )
        self.limit = 1e9
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate_proj(x)).clamp(max=self.limit)
        return self.dropout(self.down_proj(gate * self.up_proj(x))) * self.config.scale


def doubled(self: Gated, x: Tensor) -> Tensor:
    return 2 * self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


CHANGES: dict[str, Callable[[Gated], Any]] = {
    "another activation": lambda m: setattr(m, "act", nn.ReLU()),
    "another known activation": lambda m: setattr(m, "act", nn.SiLU()),
    "an attribute of the activation": lambda m: setattr(m.act, "approximate", "tanh"),
    "a limit": lambda m: setattr(m, "limit", 0.1),
    "a value of the configuration": lambda m: setattr(m.config, "scale", 3.0),
    "another configuration": lambda m: setattr(m, "config", types.SimpleNamespace(scale=2.0)),
    "dropout in training": lambda m: m.train(),
    "another child in the dropout's place": lambda m: setattr(m, "dropout", nn.Tanh()),
    "a hook on the activation": lambda m: m.act.register_forward_hook(lambda module, args, y: y * 0.5),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_later_counts(what: str, grad: bool, calls) -> None:
    torch.manual_seed(0)
    stock, x = Gated(), torch.randn(5, 16) * 3
    model = copy.deepcopy(stock)
    assert [row.got for row in peftkern.patch(model, dense=True).rows if row.kind == "mlp"] == ["gated_mlp"]
    with torch.set_grad_enabled(grad):
        before = model(x)
        torch.testing.assert_close(before, stock(x), rtol=1e-4, atol=1e-5)
        CHANGES[what](stock), CHANGES[what](model)
        results = []
        for each in (stock, model):
            torch.manual_seed(1)
            results.append(each(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[1], before, rtol=1e-5, atol=1e-6), "the change must matter"


def test_the_fused_call_comes_back_with_what_it_was_recognized_by(calls) -> None:
    model, x = Gated(), torch.randn(100, 16)
    peftkern.patch(model, dense=True)
    for step, expected in ((model.eval, 1), (model.train, 1), (model.eval, 2)):
        step()
        model(x)
        assert calls.mlps == expected


def test_another_forward_on_the_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Gated(), torch.randn(5, 16)
    peftkern.patch(model, dense=True)
    before = model(x)
    monkeypatch.setattr(Gated, "forward", doubled)
    torch.testing.assert_close(model(x), 2 * before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [7.0, 100.0])
def test_a_limit_that_small_numbers_do_not_reach_is_noticed(limit: float) -> None:
    module = Gated()
    module.limit = limit
    report = peftkern.patch(module, dense=True)
    assert [row.got for row in report.rows if row.kind == "mlp"] == ["stock"]


def test_what_may_change_in_place_is_refused_with_its_reason() -> None:
    module = Gated()
    module.limit = [1e9]
    module.__class__ = type(
        "Listed", (Gated,), {"forward": lambda self, x: Gated.forward(self, x) if self.limit[0] else x}
    )
    report = peftkern.patch(module, dense=True)
    (row,) = [row for row in report.rows if row.kind == "mlp"]
    assert row.got == "stock" and row.reason


@pytest.mark.parametrize("how", models.COPIES)
@pytest.mark.parametrize(
    "act",
    [nn.SiLU(), F.gelu, functools.partial(F.gelu, approximate="tanh")],
    ids=["module", "function", "partial"],
)
def test_copies_look_at_their_own_module(act: Any, how: str, calls) -> None:
    model, x = Gated(act), torch.randn(100, 16)
    peftkern.patch(model, dense=True)
    expected = model(x)
    twin = models.copied(model, how)
    assert torch.equal(twin(x), expected) and calls.mlps == 2
    twin.config.scale = 2.0
    torch.testing.assert_close(twin(x), 2 * expected)
    assert torch.equal(model(x), expected) and calls.mlps == 3
