"""Where bottleneck adapters act, found by how activations flow: against places written down by hand, and
against the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.adapters.bottleneck import (
    BottleneckConfig,
    add_bottleneck,
    bottleneck_disabled,
    bottleneck_parameters,
    find_places,
    remove_bottleneck,
)
from peftkern.adapters.bottleneck import reference as definition

from ..patching import models, zoo

transformers = models.transformers

CONFIGS = {
    "houlsby": "double_seq_bn[init=mam_adapter,reduction_factor=4]",
    "pfeiffer": "seq_bn[init=mam_adapter,reduction_factor=4]",
    "parallel": "par_bn[mh_adapter=True,reduction_factor=4,scaling=channel]",
}
LAYERS = {name: 2 for name in zoo.CASES}
# Layer 0: kind -> (what gives the summand, what is given the sublayer's input, where its branch is added,
# where the stream is)
LLAMA = {
    "attention": ("{}.self_attn", "{}.self_attn", "{}.self_attn", None),
    "mlp": ("{}.mlp", "{}.mlp", "{}.mlp", "{}"),
}
GEMMA = {
    "attention": ("{}.post_attention_layernorm", "{}.self_attn", "{}.post_attention_layernorm", None),
    "mlp": ("{}.post_feedforward_layernorm", "{}.mlp", "{}.post_feedforward_layernorm", "{}"),
}
BERT = {
    "attention": (
        "{}.attention.output.dropout",
        "{}.attention.self",
        "{}.attention.output.dropout",
        "{}.attention.output.LayerNorm",
    ),
    "mlp": ("{}.output.dropout", "{}.intermediate", "{}.output.dropout", "{}.output.LayerNorm"),
}
BY_HAND = {
    "llama": ("model.layers.0", LLAMA),
    "gemma2": ("model.layers.0", GEMMA),
    "mixtral": ("model.layers.0", LLAMA),
    "gpt2": (
        "transformer.h.0",
        {"attention": ("{}.attn", "{}.attn", "{}.attn", None), "mlp": ("{}.mlp", "{}.mlp", "{}.mlp", "{}")},
    ),
    "gpt-neox": (
        "gpt_neox.layers.0",
        {
            "attention": ("{}.post_attention_dropout", "{}.attention", "{}.attention", "{}"),
            "mlp": ("{}.post_mlp_dropout", "{}.mlp", "{}.mlp", "{}"),
        },
    ),
    "bert": ("bert.encoder.layer.0", BERT),
    "minilm": ("encoder.layer.0", BERT),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    case = zoo.CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**zoo.TOKENS | case.options, experts_implementation="eager")
    model = getattr(transformers, case.model)(config)
    zoo._spread(model)
    return model.to(dtype).eval().requires_grad_(False)


def randomize(model: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in bottleneck_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * scale)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_places_are_those_one_would_name(name: str) -> None:
    layer, expected = BY_HAND[name]
    found = [place for place in find_places(build(name)) if place.layer == 0]
    assert {place.kind for place in found} == set(expected)
    for place in found:
        got = (place.output, place.input.path, place.input.added_at, place.sum)
        assert got == tuple(path and path.format(layer) for path in expected[place.kind])
        assert place.normed == (place.sum or "").endswith("LayerNorm")


def test_an_encoder_and_a_decoder_are_numbered_one_after_the_other_and_cross_attention_is_told_apart() -> (
    None
):
    found = find_places(build("t5"))
    assert [(place.layer, place.kind) for place in found] == [
        *[(layer, kind) for layer in (0, 1) for kind in ("attention", "mlp")],
        *[(layer, kind) for layer in (2, 3) for kind in ("attention", "cross_attention", "mlp")],
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "houlsby" or name in BY_HAND else pytest.mark.slow)
        for name in zoo.CASES
        for kind in CONFIGS
    ],
)
def test_every_architecture(name: str, kind: str) -> None:
    """up = 0 leaves the model as it is, bit for bit; trained, every parameter has an effect and a gradient;
    removal leaves no trace."""
    model = build(name)
    before, tree = zoo.output(model), [(path, id(module)) for path, module in model.named_modules()]
    keys = list(model.state_dict())
    places = add_bottleneck(model, CONFIGS[kind])
    of_kinds = {"houlsby": 2, "pfeiffer": 1, "parallel": 2}[kind]
    assert len(places) == of_kinds * (4 if name == "t5" else 2)
    assert torch.equal(zoo.output(model), before)
    randomize(model)
    assert (zoo.output(model) - before).abs().max() > 1e-2
    with bottleneck_disabled(model):
        assert torch.equal(zoo.output(model), before)
    zoo.losses(zoo.output(model.train())).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in bottleneck_parameters(model).values())
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".bottlenecks." not in key)
    remove_bottleneck(model.eval())
    assert [(path, id(module)) for path, module in model.named_modules()] == tree
    assert list(model.state_dict()) == keys
    assert torch.equal(zoo.output(model), before)


class ByHooks:
    """The definition on a stock model: hooks at modules named by hand, plain PyTorch, autograd."""

    def __init__(
        self, model: nn.Module, name: str, config: BottleneckConfig, values: dict[str, Tensor]
    ) -> None:
        self.inputs: dict[str, Tensor] = {}
        layer, kinds = BY_HAND[name]
        for number in range(LAYERS[name]):
            at = f"{layer[:-1]}{number}"
            for kind in config.places:
                output, reader, added_at, total = (path and path.format(at) for path in kinds[kind])
                if config.reads == "output":
                    model.get_submodule(output).register_forward_hook(
                        self.adapting(config, values, output, None)
                    )
                elif config.reads == "input":
                    model.get_submodule(reader).register_forward_pre_hook(
                        self.keeping(reader), with_kwargs=True
                    )
                    model.get_submodule(added_at).register_forward_hook(
                        self.adapting(config, values, added_at, reader)
                    )
                elif total.endswith("LayerNorm"):
                    self.around_norm(model.get_submodule(total), config, values, total)
                else:
                    model.get_submodule(total).register_forward_hook(
                        self.adapting(config, values, total, None)
                    )

    def keeping(self, reader: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.inputs[reader] = args[0] if args else kwargs["hidden_states"]

        return hook

    def adapting(
        self, config: BottleneckConfig, values: dict[str, Tensor], path: str, reader: str | None
    ) -> Any:
        def hook(module: nn.Module, args: tuple, out: Any) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            adapted = adapt(config, values, path, y, y if reader is None else self.inputs[reader])
            return (adapted, *out[1:]) if isinstance(out, tuple) else adapted

        return hook

    @staticmethod
    def around_norm(norm: nn.Module, config: BottleneckConfig, values: dict[str, Tensor], path: str) -> None:
        plain = norm.forward
        norm.forward = lambda t: plain(adapt(config, values, path, t, plain(t)))


def adapt(config: BottleneckConfig, values: dict[str, Tensor], path: str, y: Tensor, x: Tensor) -> Tensor:
    names = ("down", "up", "down_bias", "up_bias")
    scaling = values.get(f"{path}.bottleneck.learned_scaling", config.scaling)
    return definition.bottleneck(
        y, x, *(values[f"{path}.bottleneck.{key}"] for key in names), scaling, activation=config.activation
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox", "bert"])
def test_outputs_and_gradients_are_those_of_the_definition_in_fp64(name: str, kind: str) -> None:
    config = BottleneckConfig.parse(CONFIGS[kind])
    stock = build(name, torch.float64)
    ours = copy.deepcopy(stock)
    add_bottleneck(ours, config)
    randomize(ours)
    values = {
        key: value.detach().clone().requires_grad_() for key, value in bottleneck_parameters(ours).items()
    }
    ByHooks(stock, name, config, values)
    got, expected = zoo.output(ours), zoo.output(stock)
    torch.testing.assert_close(got, expected, rtol=2e-14, atol=2e-14)  # 1.8e-15 on a Zen 5
    zoo.losses(got).mean().backward()
    zoo.losses(expected).mean().backward()
    for key, parameter in bottleneck_parameters(ours).items():
        torch.testing.assert_close(parameter.grad, values[key].grad, rtol=1e-8, atol=1e-11, msg=key)


def test_layers_can_be_left_out_and_have_sizes_of_their_own() -> None:
    model = build("llama")
    places = add_bottleneck(model, "double_seq_bn[leave_out=[0]]")
    assert {place.layer for place in places} == {1}
    remove_bottleneck(model)
    add_bottleneck(model, "seq_bn[reduction_factor={'1': 8, 'default': 4}]")
    assert [p.shape[0] for key, p in bottleneck_parameters(model).items() if key.endswith(".down")] == [16, 8]


def test_cross_attention_gets_one_where_it_is_asked_for() -> None:
    places = add_bottleneck(build("t5"), "double_seq_bn[cross_adapter=True]")
    assert [place.layer for place in places if place.kind == "cross_attention"] == [2, 3]


class Mixer(nn.Module):
    """A residual model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def test_any_module_with_residual_additions_will_do() -> None:
    model, x = Mixer(), torch.randn(3, 8)
    before = model(x)
    places = add_bottleneck(model, "double_seq_bn[init=mam_adapter]", example_inputs={"x": x})
    assert [(place.kind, place.output) for place in places] == [("mlp", "first"), ("mlp", "second")]
    assert torch.equal(model(x), before)


def test_the_random_state_hooks_and_modes_are_as_they_were() -> None:
    model = build("bert").train()
    model.bert.encoder.layer[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    find_places(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("make", "config", "options", "message"),
    [
        (lambda: nn.Linear(3, 3), "seq_bn", {}, "example_inputs: what Linear takes is not known"),
        (lambda: nn.Linear(3, 3), "seq_bn", {"example_inputs": {"x": 1}}, "could not be run on x to see"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3)),
            "seq_bn",
            {"example_inputs": {"input": torch.ones(1, 3)}},
            "Sequential has no residual addition",
        ),
        (lambda: build("llama"), "seq_bn[leave_out=[7]]", {}, r"leave_out: got \[7\], the layers are 0 to 1"),
        (
            lambda: build("llama"),
            "seq_bn[leave_out=[0,1]]",
            {},
            "leaves no place for an adapter; the model's sublayers are attention, mlp",
        ),
        (
            lambda: build("llama"),
            BottleneckConfig(places=("cross_attention",)),
            {},
            "leaves no place for an adapter",
        ),
        (
            lambda: build("llama"),
            "seq_bn[mh_adapter=True]",
            {},
            "reads: got 'sum', but no module is given the stream",
        ),
        (lambda: build("llama"), "seq_bn", {"name": "a.b"}, "name: got 'a.b', expected a name without dots"),
    ],
)
def test_what_cannot_be_adapted_is_told(
    make: Any, config: Any, options: dict[str, Any], message: str
) -> None:
    model = make()
    before = [(path, id(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_bottleneck(model, config, **options)
    assert [(path, id(module)) for path, module in model.named_modules()] == before
