"""Gated MLPs in models: both layouts recognized by what they compute, as accurate as stock, and stock where a
child cannot take part."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftkern
from peftkern.patching.forwards import find

from ..cases import each_choice, nightly
from . import models, zoo
from .test_values import SEEDS, UNIT, rms
from .versions import exact

GOT = {"llama": "gated_mlp", "gemma2": "gated_mlp", "phi3": "gated_mlp_packed"}
ACTIVATION = {"llama": "silu", "gemma2": "gelu_tanh", "phi3": "silu"}


def EVERY(test: Callable[..., None]) -> Callable[..., None]:
    return exact(pytest.mark.parametrize("name", GOT)(test))


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


def rows(report: peftkern.PatchReport) -> list[tuple[str, str | None]]:
    return [(row.got, row.reason) for row in report.rows if row.kind == "mlp"]


def down(module: nn.Module) -> nn.Module:
    return module.down_proj


@EVERY
def test_each_layout_and_activation_is_recognized(name: str) -> None:
    model = zoo.build(name)
    assert rows(peftkern.patch(model)) == [(GOT[name], None)] * 2
    for module in mlps(model):
        _, forward = find(module)
        assert forward.function == GOT[name] and forward.cache["activation"] == ACTIVATION[name]
        assert forward.cache.get("gate_first", True)


ACCURATE = [
    ("llama", "nf4", torch.bfloat16),
    ("llama", "dense", torch.float32),
    ("gemma2", "nf4", torch.float32),
    ("phi3", "nf4", torch.bfloat16),
    ("phi3", "dense", torch.float32),
]


@exact
@pytest.mark.parametrize(
    "name, base, dtype", each_choice(GOT, ["nf4", "dense"], [torch.float32, torch.bfloat16], quick=ACCURATE)
)
def test_patched_models_err_no_more_than_stock_ones(name: str, base: str, dtype: torch.dtype, calls) -> None:
    stock, patched = [], []
    for seed in SEEDS:
        model = zoo.build(name, four_bit=base == "nf4", seed=seed, dtype=dtype)
        exact = zoo.train_exactly(model)
        stock.append(models.errors(zoo.train(copy.deepcopy(model)), exact))
        peftkern.patch(model)
        calls.mlps = 0
        patched.append(models.errors(zoo.train(model), exact))
        assert calls.mlps == 2 * 2, "two layers, two steps"
    for key in stock[0]:
        bound = 1.5 * rms(stock, key) + UNIT[dtype] / 32
        assert rms(patched, key) <= bound, (
            f"{key}: {rms(patched, key):.2e} > {bound:.2e}, stock {rms(stock, key):.2e}"
        )


def same(model: nn.Module, twin: nn.Module) -> None:
    got, expected = models.run(model, zoo.TEXT), models.run(twin, zoo.TEXT)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5 * value.abs().max().item(), msg=key)


def patched_pair(name: str) -> tuple[nn.Module, nn.Module]:
    model = zoo.build(name)
    twin = copy.deepcopy(model)
    peftkern.patch(model)
    return model, twin


@EVERY
def test_a_hook_on_a_child_sends_the_call_to_stock_and_fires(name: str, calls) -> None:
    model, twin = patched_pair(name)
    seen = []
    handle = down(mlps(model)[0]).register_forward_hook(lambda *_: seen.append(1))
    same(model, twin)
    assert seen == [1] and calls.mlps == 1, "the other layer's is still one call"
    handle.remove()
    same(model, twin)
    assert seen == [1] and calls.mlps == 1 + 2


@EVERY
def test_disabled_and_merged_adapters(name: str, calls) -> None:
    """Of a dense base both run stock linears, inside the stock MLP."""
    model, twin = patched_pair(name)
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=zoo.TEXT).logits, twin(input_ids=zoo.TEXT).logits, rtol=1e-4, atol=1e-4
        )
    assert calls.mlps == 0
    for step, expected in (("merge_adapter", 0), ("unmerge_adapter", 2)):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            getattr(model, step)(), getattr(twin, step)()
            torch.testing.assert_close(
                model(input_ids=zoo.TEXT).logits, twin(input_ids=zoo.TEXT).logits, rtol=1e-4, atol=1e-4
            )
        assert calls.mlps == expected
    same(model, twin)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@EVERY
def test_copies_are_patched_and_independent(name: str, how: str, calls) -> None:
    model, twin = patched_pair(name)
    twin_of = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for original, copied in zip(mlps(model), mlps(twin_of), strict=True):
        assert find(copied)[1].module is copied and find(original)[1].module is original
        assert find(copied)[1].cache == find(original)[1].cache
    same(twin_of, twin)
    assert calls.mlps == 2
    peftkern.unpatch(twin_of)
    assert all(find(module) is None for module in mlps(twin_of)) and all(
        find(module) for module in mlps(model)
    )
    same(model, twin)
    assert calls.mlps == 4


@EVERY
def test_a_child_left_out_leaves_the_block_stock(name: str) -> None:
    model = zoo.build(name)
    report = peftkern.patch(model, exclude=["layers.0.mlp.down_proj"])
    assert len(rows(report)) == 1 and find(mlps(model)[0]) is None and find(mlps(model)[1])


class Packed(nn.Module):
    """Phi-3's children; what it does with them is given."""

    def __init__(self, act=F.silu) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act = (
            nn.Linear(16, 48, bias=False),
            nn.Linear(24, 16, bias=False),
            act,
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.act(gate))


class UpFirst(Packed):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.act(gate))


class Interleaved(Packed):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(both[..., 1::2] * self.act(both[..., ::2]))


class Added(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Squared(Packed):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up.square() * self.act(gate))


class Apart(nn.Module):
    def __init__(self, act=F.silu) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down_proj, self.act = nn.Linear(24, 16, bias=False), act
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class ClampedApart(Apart):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act(self.gate_proj(x)) * self.up_proj(x)).clamp(max=0.5))


@pytest.mark.parametrize(
    "module, options",
    [
        (Packed(), {"activation": "silu", "gate_first": True}),
        (Packed(F.gelu), {"activation": "gelu", "gate_first": True}),
        (UpFirst(nn.GELU("tanh")), {"activation": "gelu_tanh", "gate_first": False}),
        (Apart(nn.SiLU()), {"activation": "silu"}),
    ],
    ids=["packed", "packed-gelu", "up-first", "apart"],
)
def test_the_probe_finds_the_activation_and_the_half_that_is_the_gate(
    module: nn.Module, options: dict
) -> None:
    x = torch.randn(3, 16)
    expected = module(x)
    report = peftkern.patch(module, dense=True)
    assert rows(report)[0][1] is None and find(module)[1].cache == options
    torch.testing.assert_close(module(x), expected)
    assert peftkern.unpatch(module) and torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "module",
    [Interleaved(), Added(), Squared(), Packed(F.relu), Packed(torch.sigmoid), Apart(F.relu), ClampedApart()],
    ids=["interleaved", "residual", "squared", "relu", "sigmoid", "apart-relu", "clamped"],
)
def test_another_forward_is_refused_with_its_reason(module: nn.Module) -> None:
    x = torch.randn(3, 16)
    expected = module(x)
    report = peftkern.patch(module, dense=True)
    assert rows(report) == [("stock", "its forward is not down(act(gate(x)) * up(x)) of a known activation")]
    assert find(module) is None
    torch.testing.assert_close(module(x), expected)


def test_a_forward_replaced_on_the_instance_is_left() -> None:
    module = Packed()
    module.forward = lambda x: 2 * x
    report = peftkern.patch(module, dense=True)
    assert [got for got, _ in rows(report)] == ["stock"] and torch.equal(
        module(torch.ones(1, 16)), 2 * torch.ones(1, 16)
    )


@pytest.mark.any_isa
@exact
# Llama's, with all else: test_compile.py
@pytest.mark.parametrize("name", nightly(GOT, quick=["gemma2", "phi3"]))
def test_compiles_into_one_graph(name: str) -> None:
    model = zoo.build(name)
    peftkern.patch(model)
    module = mlps(model)[0]
    x = torch.randn(2, 5, zoo.WIDTH, requires_grad=True)
    eager = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    (expected,), (got,) = (torch.autograd.grad(y.square().sum(), x) for y in (eager, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
