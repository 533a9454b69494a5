"""Whatever a call reads may change between two calls: adapters swapped in place, weights written through
`.data`, moved or replaced, other modules put in their places, other widths. The next call gives what the
layer gives now, with one row and with many."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.formats.nf4 import NF4Weight
from peftkern.patching.forwards import find
from peftkern.patching.weights import is_4bit

from . import models

ROWS = pytest.mark.parametrize("rows", [1, 24])
KINDS = {"nested": {"nested": True}, "plain": {"nested": False}, "dense": None}


def linear(kind: str, n: int = 64, k: int = 64, seed: int = 0, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    old = nn.Linear(k, n, bias=bias).requires_grad_(False)
    options = KINDS[kind]
    return old if options is None else models.linear_4bit(old, torch.float32, **options)


def adapted(kind: str, **options) -> tuple[nn.Module, nn.Module]:
    """A patched model of one LoRA linear of width 64, and that layer."""
    model = models.peft.get_peft_model(
        nn.ModuleDict({"linear": linear(kind)}),
        models.peft.LoraConfig(**{"r": 4, "target_modules": ["linear"]} | options),
    )
    models.randomize(model)
    peftkern.patch(model)
    return model, model.base_model.model["linear"]


def exact(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer holds now, in fp64 and by the definition; 4-bit weights by the reference's decoding."""
    base = layer.base_layer
    weight = NF4Weight.from_bnb(base).dequantize(torch.float32) if is_4bit(base) else base.weight.detach()
    (name,) = layer.active_adapters
    a, b = (getattr(layer, part)[name].weight.detach().double() for part in ("lora_A", "lora_B"))
    weight, delta = weight.double(), float(layer.scaling[name]) * (b @ a)
    dense = weight + delta
    if layer.lora_variant:
        magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
        dense = dense * (magnitude / dense.norm(dim=1))[:, None]
    y = x.double() @ dense.t()
    return y if base.bias is None else y + base.bias.detach().double()


def check(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(layer(x), exact(layer, x).to(x.dtype), rtol=1e-4, atol=1e-4)


def sample(rows: int) -> Tensor:
    return torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(3))


def _written(layer: nn.Module) -> None:
    weight = layer.base_layer.weight
    weight.data.bitwise_xor_(0x35) if is_4bit(layer.base_layer) else weight.data.mul_(-2)


def _data(layer: nn.Module) -> None:
    weight = layer.base_layer.weight
    weight.data = weight.data.flip(0).clone()


def _transposed(layer: nn.Module) -> None:
    """The same address, dtype and, of a square one, shape."""
    if is_4bit(layer.base_layer):
        pytest.skip("packed bytes have no transposed form")
    layer.base_layer.weight.data = layer.base_layer.weight.data.t()


def _module(layer: nn.Module) -> None:
    layer.base_layer = linear("dense", seed=7)


def _bias_data(layer: nn.Module) -> None:
    layer.base_layer.bias.data = torch.linspace(-1, 1, 64)


def _strided_bias(layer: nn.Module) -> None:
    layer.base_layer.bias.data = torch.linspace(-1, 1, 128)[::2]


def _loaded(layer: nn.Module) -> None:
    if is_4bit(layer.base_layer):
        pytest.skip("a state_dict of packed bytes alone is no weight")
    layer.base_layer.load_state_dict({"weight": torch.ones(64, 64), "bias": torch.ones(64)}, assign=True)


def _square_adapter(layer: nn.Module) -> None:
    a = layer.lora_A["default"].weight
    a.data = a.data.reshape(64, 4).t()


BASES = (_written, _data, _transposed, _module, _bias_data, _strided_bias, _loaded, _square_adapter)


@ROWS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", BASES, ids=lambda change: change.__name__[1:])
def test_what_a_layer_holds(change: Callable[[nn.Module], None], kind, rows):
    _, layer = adapted(kind)
    x = sample(rows)
    check(layer, x)
    before = layer(x)
    change(layer)
    check(layer, x)
    assert not torch.allclose(layer(x), before, atol=1e-3), "the change makes a difference"


def _absmax_written(state) -> None:
    state.absmax.copy_(state.absmax.flip(0).clone())


def _absmax_data(state) -> None:
    state.absmax.data = state.absmax.flip(0).clone()


def _absmax_replaced(state) -> None:
    state.absmax = state.absmax.flip(0).clone()


def _code_data(state) -> None:
    state.code.data = state.code.flip(0).clone()


def _code_replaced(state) -> None:
    state.code = state.code * 1.5


def _inner_absmax_data(state) -> None:
    state.state2.absmax.data = state.state2.absmax * 3


def _inner_absmax_replaced(state) -> None:
    state.state2.absmax = state.state2.absmax * 3


def _inner_code_data(state) -> None:
    state.state2.code.data = state.state2.code.flip(0).clone()


def _inner_replaced(state) -> None:
    state.state2 = copy.deepcopy(state.state2)
    state.state2.code = state.state2.code * 3


def _offset_data(state) -> None:
    state.offset.data = state.offset * 3


def _coarse_offset(state) -> None:
    """Of another dtype, as bitsandbytes' own unpacking leaves it, and written afterwards."""
    state.offset = state.offset.bfloat16() * 2


INNER = (_inner_absmax_data, _inner_absmax_replaced, _inner_code_data, _inner_replaced)
STATES = {
    "plain": (_absmax_written, _absmax_data, _absmax_replaced, _code_data, _code_replaced),
    "nested": (_absmax_data, _code_replaced, *INNER, _offset_data, _coarse_offset),
}
CASES = [(kind, change) for kind, changes in STATES.items() for change in changes]


@ROWS
@pytest.mark.parametrize("kind, change", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_what_a_4bit_weight_is_read_with(kind, change, rows):
    _, layer = adapted(kind)
    x = sample(rows)
    check(layer, x)
    before = layer(x)
    change(layer.base_layer.weight.quant_state)
    check(layer, x)
    assert not torch.allclose(layer(x), before, atol=1e-3), "the change makes a difference"
    if change is _coarse_offset:
        layer.base_layer.weight.quant_state.offset.mul_(3)
        check(layer, x)


def test_a_4bit_weight_of_another_shape():
    """The same bytes, read as another matrix: the shape is checked at the call, whose error is torch's."""
    _, layer = adapted("plain")
    x = sample(1)
    check(layer, x)
    layer.base_layer.weight.quant_state.shape = torch.Size([32, 128])
    with pytest.raises(RuntimeError), torch.no_grad():
        layer(x)


def test_bases_replaced_again_and_again():
    """What was prepared for one base is not taken for another that Python has put at the address of the
    first."""
    model = nn.Sequential(linear("nested", bias=False).requires_grad_(False))
    peftkern.patch(model)
    bases = [linear("nested", seed=seed, bias=False) for seed in range(60)]
    torch.manual_seed(0)
    token, prompt = torch.randn(1, 64), torch.randn(100, 64)

    def hold(index: int) -> None:
        model[0].weight = bases[index % 60].weight
        model[0].quant_state = model[0].weight.quant_state

    with torch.no_grad():
        for i in range(0, 600, 2):
            hold(i)
            model(token)
            hold(i + 1)
            model(prompt)
            hold(i + 7)
            expected = token @ NF4Weight.from_bnb(model[0]).dequantize(torch.float32).t()
            torch.testing.assert_close(model(token), expected, rtol=1e-4, atol=1e-4)


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@ROWS
def test_a_base_of_another_class_runs_its_own_forward(rows):
    _, layer = adapted("dense")
    x = sample(rows)
    check(layer, x)
    other = Doubled(64, 64).requires_grad_(False)
    layer.base_layer = other
    with torch.no_grad():
        branch = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
        torch.testing.assert_close(layer(x), other(x) + branch, rtol=1e-4, atol=1e-4)


@ROWS
def test_a_base_whose_class_is_given_another_forward(rows, monkeypatch):
    class Own(nn.Linear):
        pass

    model = models.peft.get_peft_model(
        nn.ModuleDict({"linear": linear("dense")}), models.peft.LoraConfig(r=4, target_modules=["linear"])
    )
    layer, x = model.base_model.model["linear"], sample(rows)
    layer.base_layer.__class__ = Own
    peftkern.patch(model)
    check(layer, x)
    monkeypatch.setattr(Own, "forward", lambda self, x: torch.zeros(*x.shape[:-1], 64), raising=False)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x), layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
        )


@ROWS
def test_a_weight_that_is_computed_at_every_access(rows):
    """A parametrized base or adapter: what stands in the parameter's place is another tensor at every
    call."""
    _, layer = adapted("dense")
    x = sample(rows)
    check(layer, x)

    class Times(nn.Module):
        factor = 2.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    for part in (layer.base_layer, layer.lora_A["default"]):
        nn.utils.parametrize.register_parametrization(part, "weight", Times())
        check(layer, x)
    Times.factor = -1.0
    check(layer, x)


# ---- scalings that are tensors


def hotswappable(kind: str, **options) -> tuple[nn.Module, nn.Module]:
    model, layer = adapted(kind, **options)
    pytest.importorskip("peft.utils.hotswap").prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layer.scaling["default"], Tensor)
    return model, layer


@ROWS
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_a_scaling_that_is_written_in_place(kind, use_dora, rows):
    _, layer = hotswappable(kind, use_dora=use_dora)
    x = sample(rows)
    check(layer, x)
    for change in (
        lambda: layer.scaling["default"].fill_(5.0),
        lambda: layer.scale_layer(2.0),
        lambda: layer.set_scale("default", 0.5),
    ):
        before = layer(x)
        change()
        check(layer, x)
        assert not torch.allclose(layer(x), before, atol=1e-3), "the change makes a difference"


def test_a_scaling_that_is_trained():
    _, layer = adapted("nested")
    layer.scaling["default"] = torch.tensor(0.5, requires_grad=True)
    x = sample(24)
    layer(x).square().sum().backward()
    got = layer.scaling["default"].grad
    base = NF4Weight.from_bnb(layer.base_layer).dequantize(torch.float32).double()
    a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
    scaling = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (x.double() @ (base + scaling * b @ a).t() + layer.base_layer.bias.double()).square().sum().backward()
    torch.testing.assert_close(got.double(), scaling.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "stock base"])
def test_one_graph_for_all_scalings(name):
    """Compiled once: neither the tensor breaks the graph, nor does another value compile it again."""
    kind = "nested" if name == "lora" else "dense"
    model, layer = hotswappable(kind)
    if name == "stock base":
        layer.base_layer = Same(64, 64).requires_grad_(False)
        assert peftkern.patch(model).counts == {"lora_add": 1}
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), sample(24)
    with torch.no_grad():
        for value in (1.0, 3.0, -2.0):
            layer.scaling["default"].fill_(value)
            torch.testing.assert_close(compiled(x), exact(layer, x).float(), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_a_number_is_read_anew_in_a_compiled_layer(kind):
    _, layer = adapted(kind)
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend="eager"), sample(24)
    with torch.no_grad():
        for value in (1.0, 3.0, -2.0):
            layer.set_scale("default", value)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# ---- DoRA's norm


@ROWS
@pytest.mark.parametrize("kind", KINDS)
def test_doras_norm_is_that_of_the_present_weight(kind, rows):
    _, layer = adapted(kind, use_dora=True)
    x = sample(rows)
    check(layer, x)
    for change in (_written, _data, lambda layer: layer.lora_B["default"].weight.data.mul_(3)):
        before = layer(x)
        change(layer)
        check(layer, x)
        assert not torch.allclose(layer(x), before, atol=1e-3), "the change makes a difference"
    if is_4bit(layer.base_layer):
        _absmax_written(layer.base_layer.weight.quant_state)
        check(layer, x)


# ---- widths


def _lora() -> nn.Module:
    return adapted("nested")[1]


def _bare() -> nn.Module:
    model = nn.Sequential(linear("nested"))
    peftkern.patch(model)
    return model[0]


@pytest.mark.parametrize("make", [_lora, _bare], ids=["lora", "linear"])
def test_another_width_of_as_many_elements_raises_as_torch_does(make):
    layer = make()
    with torch.no_grad():
        layer(torch.randn(1, 64))
        for shape in ((2, 32), (4, 16), (1, 2, 32)):
            with pytest.raises(RuntimeError):
                layer(torch.randn(shape))
        for shape in ((64,), (1, 64), (1, 1, 64)):
            assert layer(torch.randn(shape)).shape == shape


def test_blocks_of_another_width_raise_as_torch_does():
    model = models.lora(models.llama(layers=1)).eval()
    peftkern.patch(model)
    layer = next(module for module in model.modules() if hasattr(module, "self_attn"))
    with torch.no_grad():
        for block in (layer.mlp, layer.self_attn.q_proj, layer.self_attn.v_proj):
            block(torch.randn(1, 64))
            with pytest.raises(RuntimeError):
                block(torch.randn(2, 32))


def test_nothing_is_read_twice_in_generation():
    """A step of generation that is prepared stays so: what is looked at again is no reason to prepare it
    anew."""
    _, layer = adapted("nested")
    forward, x = find(layer)[1], sample(1)
    with torch.no_grad():
        layer(x)
        (_, call), view = forward.ready.prepared, forward.cache.view(layer.base_layer)
        layer(x)
    assert (
        call is not None
        and forward.ready.prepared[1] is call
        and forward.cache.view(layer.base_layer) is view
    )
