"""Calls of a linear outside generation are checked and described once, and again when anything has changed:
the bits and the gradients are those of calls that are described anew each time."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.functional import Adapter, Member, group, linear, mlp
from peftkern.patching.forwards import find
from peftkern.patching.groups import Group
from peftkern.patching.linears import PlannedForward
from peftkern.patching.mlp import GatedMLPForward

from . import models, zoo
from .test_changes import adapted, sample


def recorded(patch: pytest.MonkeyPatch, module: types.ModuleType) -> list[int]:
    """Of each tensor that the module's `prepared` is given, how many rows it had."""
    seen, original = [], module.prepared

    def prepared(x: Tensor, *args, **options) -> Callable[[Tensor], Any]:
        seen.append(x[..., 0].numel())
        return original(x, *args, **options)

    patch.setattr(module, "prepared", prepared)
    return seen


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call that was described, how many rows its first tensor had."""
    return recorded(monkeypatch, linear)


def trained(layer: nn.Module, rows: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """y, dx and the gradients of what is trained; dropout's draws are the same each time."""
    layer.zero_grad(set_to_none=True)
    x = sample(rows).to(dtype).requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


class Queries(nn.Module):
    """q, k and v of one LoRA model, and an output that needs all three."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.model = models.lora(models.llama(bias=True), **options)
        peftkern.patch(self.model)
        attention = next(module for module in self.model.modules() if hasattr(module, "q_proj"))
        self.parts = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


class Block(nn.Module):
    """A gated MLP of one LoRA model: gate and up apart, or one linear for both."""

    def __init__(self, packed: bool = False, **options) -> None:
        super().__init__()
        self.model = (
            zoo.build("phi3", four_bit=True, **options)
            if packed
            else models.lora(models.llama(bias=True), **options)
        )
        peftkern.patch(self.model)
        self.mlp = next(module for name, module in self.model.named_modules() if name.endswith(".mlp"))
        self.parts = tuple(module for module in self.mlp.modules() if hasattr(module, "lora_A"))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


EVERY_KIND = pytest.mark.parametrize("kind", ["linear", "siblings", "mlp", "packed mlp"])


def built(kind: str, **options) -> nn.Module:
    if kind == "linear":
        return adapted("nested", **options)[1]
    if kind == "siblings":
        return Queries(**options).train()
    return Block(packed=kind == "packed mlp", **options).train()


def parts(layer: nn.Module) -> Sequence[nn.Module]:
    """Its LoRA linears."""
    return getattr(layer, "parts", [layer])


@contextlib.contextmanager
def described_anew() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedForward, "prepared", lambda self, x: None)
        patch.setattr(Group, "prepared_part", lambda self, forward, x: None)
        patch.setattr(GatedMLPForward, "prepared_call", lambda self, x, linears, options: None)
        yield


def anew(layer: nn.Module, rows: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with described_anew():
        return trained(layer, rows, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nested", "plain"])
def test_the_same_bits_and_described_once(kind: str, dropout: float, described: list[int]) -> None:
    _, layer = adapted(kind, lora_dropout=dropout)
    assert len(trained(layer)) == 4
    for rows in (24, 1, 3):
        assert same(trained(layer, rows), anew(layer, rows))
    with torch.no_grad():
        assert torch.equal(layer(sample(80)), layer.eval()(sample(80))) == (dropout == 0.0)
    assert described == ([24] if dropout == 0.0 else [24, 80])  # without dropout, evaluation is the same call


def _parameter(layer: nn.Module) -> None:
    """Another parameter on the same storage, which is to get the gradient."""
    part = layer.lora_A["default"]
    part.weight = nn.Parameter(part.weight.data)


def _data(layer: nn.Module) -> None:
    part = layer.lora_B["default"]
    part.weight.data = part.weight.data * 2


def _wider(layer: nn.Module) -> None:
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.weight.data = part.weight.data.bfloat16()


def _rank(layer: nn.Module) -> None:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a.weight.data, b.weight.data = a.weight.data[:2].clone(), b.weight.data[:, :2].clone()


def _bias(layer: nn.Module) -> None:
    """A trained one in place of a frozen one."""
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.data)


def _frozen(layer: nn.Module) -> None:
    layer.lora_A["default"].weight.requires_grad_(False)


def _dropout(layer: nn.Module) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


def _disabled(layer: nn.Module) -> None:
    layer.enable_adapters(False)


CHANGES = [_parameter, _data, _wider, _rank, _bias, _frozen, _dropout, _disabled]
CHANGES.append(lambda layer: layer.scaling.update(default=3.0))
CHANGES.append(lambda layer: layer.base_layer.weight.data.bitwise_xor_(0x35))
CHANGES.append(lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[nn.Module], None]) -> None:
    _, layer = adapted("nested")
    before = trained(layer)
    change(layer)
    got, expected = trained(layer), anew(layer)
    assert same(got, expected)
    # The same numbers to another parameter; a hook that returns nothing.
    assert same(got, before) == (change is _parameter) or change is CHANGES[-1]


def test_autocast_is_described_anew(described: list[int]) -> None:
    _, layer = adapted("nested")
    trained(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = trained(layer)
        assert same(inside, anew(layer))
    assert described == [24] and not same(inside, trained(layer))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64), (0, 64)])
@EVERY_KIND
def test_every_shape_of_x(kind: str, shape: tuple[int, ...]) -> None:
    layer = built(kind)
    trained(layer)

    def results() -> list[Tensor]:
        layer.zero_grad(set_to_none=True)
        x = torch.sin(torch.arange(math.prod(shape)).float()).view(shape).requires_grad_()
        y = layer(x)
        assert y.shape[:-1] == shape[:-1]
        y.sin().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    got = results()
    with described_anew():
        assert same(got, results())
    peftkern.unpatch(layer)
    for one, expected in zip(got, results(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)  # 1.1e-6 where measured


@EVERY_KIND
def test_backward_reads_what_saved_tensor_hooks_give_back(kind: str) -> None:
    """The originals are overwritten between forward and backward, in a way that nothing counts, as where
    somebody has moved what is saved to another place."""
    layer = built(kind)
    expected = trained(layer)
    layer.zero_grad(set_to_none=True)
    x = sample(24).requires_grad_()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = layer(x)
    loss = y.sin().sum()
    for part in parts(layer):
        for held in (part.lora_A["default"].weight, part.lora_B["default"].weight, part.base_layer.weight):
            held.data.zero_()
    loss.backward()
    got = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert same(got, expected)


@EVERY_KIND
def test_a_profiler_sees_the_ops(kind: str) -> None:
    layer = built(kind)
    expected = trained(layer)
    with torch.profiler.profile() as profile:
        assert same(trained(layer), expected)
    op = "qlora_linear" if kind == "linear" else "qlora_group"
    names = {event.name for event in profile.events()}
    assert {f"peftkern::{op}_fwd", f"peftkern::{op}_bwd"} <= names


@EVERY_KIND
def test_gradients_can_be_differentiated_again(kind: str) -> None:
    layer = built(kind)
    trained(layer)
    weights = [p for p in layer.parameters() if p.grad is not None]

    def twice() -> list[Tensor]:
        x = sample(6).view(2, 3, -1).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), [x, *weights])]

    got = twice()
    with described_anew():
        assert same(got, twice())


def test_errors_are_those_of_any_call() -> None:
    _, layer = adapted("nested")
    trained(layer)
    for x in (torch.ones(3, 63), torch.ones(())):  # the stock forward says what is wrong
        with pytest.raises((RuntimeError, IndexError)):
            layer(x)


def test_what_leads_to_a_graph_is_not_held() -> None:
    """Parameters that a step of meta-learning has computed are gone with it."""
    model, layer = adapted("nested")
    trained(layer)
    names = {name: p * 1.5 for name, p in model.named_parameters() if "lora_" in name}
    watched = weakref.ref(next(iter(names.values())))
    x = sample(24)
    y = _called(layer, names, x)
    assert y.requires_grad
    del y, names
    gc.collect()
    assert watched() is None


def _called(layer: nn.Module, names: dict[str, Tensor], x: Tensor) -> Tensor:
    own = {name.partition("linear.")[2]: value for name, value in names.items()}
    return torch.func.functional_call(layer, own, (x,))


def test_copies_describe_their_own(described: list[int]) -> None:
    _, layer = adapted("nested")
    trained(layer)
    twin = copy.deepcopy(layer)
    _data(twin)
    assert same(trained(twin), anew(twin)) and not same(trained(twin), trained(layer))
    assert len(described) == 2 and find(twin)[1].cache is not find(layer)[1].cache


@pytest.fixture
def described_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of a group that was described, how many rows its first tensor had."""
    return recorded(monkeypatch, group)


@pytest.fixture
def described_mlps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each MLP that was described, how many rows its first tensor had."""
    return recorded(monkeypatch, mlp)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_mlps_give_the_same_bits_and_are_described_once(
    packed: bool, dropout: float, described_mlps: list[int]
) -> None:
    layer = Block(packed, lora_dropout=dropout).train()
    assert len(trained(layer)) == 2 + 2 * len(layer.parts)
    for rows in (24, 1, 3):
        assert same(trained(layer, rows), anew(layer, rows))
    with torch.no_grad():
        assert torch.equal(layer(sample(80)), layer.eval()(sample(80))) == (dropout == 0.0)
    assert described_mlps == ([24] if dropout == 0.0 else [24, 80])


@pytest.mark.parametrize("packed", [False, True])
def test_an_mlp_sees_a_change_of_any_of_its_linears(packed: bool) -> None:
    layer = Block(packed).train()
    for place, change in enumerate(change for change in CHANGES if change is not _bias):  # it has none
        before = trained(layer)
        change(layer.parts[place % len(layer.parts)])
        got = trained(layer)
        assert same(got, anew(layer))
        # The same numbers to another parameter; a hook that returns nothing, for which stock's forward runs.
        assert same(got, before) == (change is _parameter) or change is CHANGES[-1], change


def test_an_mlp_under_autocast_is_described_anew(described_mlps: list[int]) -> None:
    layer = Block().train()
    outside = trained(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = trained(layer)
        assert same(inside, anew(layer))
    assert described_mlps == [24] and not same(inside, outside) and same(trained(layer), outside)


def test_copies_of_an_mlp_describe_their_own(described_mlps: list[int]) -> None:
    layer = Block().train()
    before = trained(layer)
    twin = copy.deepcopy(layer)
    _data(twin.parts[0])
    assert same(trained(twin), anew(twin)) and not same(trained(twin), before) and len(described_mlps) == 2
    assert same(trained(layer), before) and len(described_mlps) == 2


def test_what_an_mlp_has_prepared_is_let_go() -> None:
    """As the linears': a layer whose weights are moved to another device holds the old ones no longer."""
    layer = Block().train()
    trained(layer)
    forward = find(layer.mlp)[1]
    packed = weakref.ref(forward.prepared[1])
    forward.let_go()
    gc.collect()
    assert packed() is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_give_the_same_bits_and_are_described_once(
    dropout: float, described_groups: list[int]
) -> None:
    layer = Queries(lora_dropout=dropout).train()
    assert len(trained(layer)) == 8
    for rows in (24, 1, 3):
        assert same(trained(layer, rows), anew(layer, rows))
    assert described_groups == [24]


def test_siblings_see_a_change_of_any_of_them() -> None:
    layer = Queries().train()
    for place, change in enumerate(CHANGES):
        before = trained(layer)
        change(layer.parts[place % 3])
        got = trained(layer)
        assert same(got, anew(layer))
        assert same(got, before) == (change in (_parameter, CHANGES[-1])), change


def test_siblings_that_part_run_alone_and_are_described_alone(
    described: list[int], described_groups: list[int]
) -> None:
    layer = Queries().train()
    together = trained(layer)
    peftkern.unpatch(layer.parts[1])
    apart = trained(layer), trained(layer)
    assert same(*apart) and described_groups == [24] and described == [24, 24]  # q and v
    torch.testing.assert_close(apart[0], together)


def test_siblings_under_autocast_are_described_anew(described_groups: list[int]) -> None:
    layer = Queries().train()
    outside = trained(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = trained(layer)
        assert same(inside, anew(layer))
    assert described_groups == [24] and not same(inside, outside) and same(trained(layer), outside)


def test_several_adapters_of_one_linear_are_one_prepared_call(described_groups: list[int]) -> None:
    model, layer = adapted("nested")
    model.add_adapter("second", models.peft.LoraConfig(r=2, target_modules=["linear"]))
    models.randomize(model)
    model.base_model.set_adapter(["default", "second"])
    peftkern.patch(model)
    for rows in (24, 5):
        assert same(trained(layer, rows), anew(layer, rows))
    assert described_groups == [24]


def test_a_prepared_group_has_no_rows_and_no_seed_of_its_own() -> None:
    weight, x = torch.randn(8, 4), torch.randn(3, 4)
    low = torch.randn(2, 4), torch.randn(8, 2)
    for own in ({"rows": (0, 2)}, {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.5}):
        with pytest.raises(
            ValueError, match=r"members\[1\].adapters\[0\]: got rows .* call the function itself"
        ):
            group.prepared(x, [Member(weight), Member(weight, adapters=[Adapter(*low, **own)])])
