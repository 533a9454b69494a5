"""Decoder layers whose residual additions run inside the norms: recognized by behaviour, right in every use,
reversible."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import functional
from peftkern.patching.blocks import NormForward, Norms
from peftkern.patching.forwards import find, remove
from peftkern.patching.layers import DecoderLayers, Half, LayerForward, LayerMode, layer_mode
from peftkern.patching.rewrite import Rewrite
from peftkern.patching.survey import survey

from ..cases import nightly
from ..ops.bounds import FACTOR
from . import models, prenorm, zoo
from .prenorm import Layer, Wrapped, wrapping
from .rewriting import installed
from .test_blocks import IDS, _in_fp64, build, run, same
from .versions import exact

pytestmark = exact

FUSED = ("llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3-moe")
# What a decoder layer hands to its attention, under the names that the installed transformers has for it.
NAMES = tuple(
    inspect.signature(models.transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward).parameters
)[2:-1]
LLAMA = LayerMode(
    Half(
        "input_layernorm", "self_attn", "hidden_states", tuple((name, name) for name in NAMES), True, True, ()
    ),
    Half("post_attention_layernorm", "mlp", None, (), False, False, ()),
    False,
)


NORMS_AND_LAYERS = (Norms(), DecoderLayers())


def install_layers(
    model: nn.Module, *, rewrites: Sequence[Rewrite] = NORMS_AND_LAYERS, exclude: Sequence[str] = ()
) -> list[tuple[str, str, str | None]]:
    """Of each layer that was looked at its name, what it runs and why it does not run ours."""
    findings = survey(model, rewrites, exclude=tuple(exclude))
    for rewrite, finding in findings:
        rewrite.install(finding)
    rows = [finding.row for _, finding in findings if finding.row.kind == "layer"]
    return [(row.name, row.got, row.reason) for row in rows]


def patched(model: nn.Module) -> nn.Module:
    """Its norms and layers alone."""
    assert [got for _, got, _ in install_layers(model)] == ["add_rms_norm"] * 2
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused function ran; "added" with an addition."""
    counter: Counter[str] = Counter()
    norm, add = functional.rms_norm, functional.add_rms_norm

    def counted_norm(*args, **kwargs):
        counter["rms_norm"] += 1
        return norm(*args, **kwargs)

    def counted_add(x, residual, *args, **kwargs):
        counter["stream" if residual is None else "added"] += 1
        return add(x, residual, *args, **kwargs)

    monkeypatch.setattr(functional, "rms_norm", counted_norm)
    monkeypatch.setattr(functional, "add_rms_norm", counted_add)
    return counter


# ---- which layers


@pytest.mark.parametrize("name", zoo.CASES)
def test_layers_of_every_architecture_are_fused_or_named_with_the_reason(name: str) -> None:
    rows = [row for row in peftkern.patch(zoo.build(name)).rows if row.kind == "layer"]
    if name in FUSED:
        assert [(row.got, row.reason) for row in rows] == [("add_rms_norm", None)] * 2
    elif name in ("gemma2", "gemma3"):
        assert [row.got for row in rows] == ["stock"] * 2 and all(
            "is not h + attention(norm(h))" in row.reason for row in rows
        )
    elif name in ("gpt2", "gpt-neox", "falcon", "vit"):
        assert [row.got for row in rows] == ["stock"] * 2 and all(
            "norms do not run" in row.reason for row in rows
        )
    else:
        # no layer with a norm and two blocks of its own
        assert name in ("bert", "roberta", "minilm", "t5") and not rows


def test_what_a_layer_passes_on_is_recognized() -> None:
    model = build("llama")
    patched(model)
    assert [layer_mode(layer) for layer in layers(model)] == [LLAMA] * 2
    phi = build("phi3")
    patched(phi)
    mode = layer_mode(layers(phi)[0])
    assert (mode.first.after, mode.second.after) == (("resid_attn_dropout",), ("resid_mlp_dropout",))


def single(kind: type[Layer]) -> nn.Module:
    torch.manual_seed(3)
    model = nn.ModuleList([kind()])
    installed(model, Norms())
    return model


@pytest.mark.parametrize("kind", prenorm.OTHERS)
def test_other_layers_keep_their_forward_and_say_why(kind: type[Layer]) -> None:
    model = single(kind)
    ((name, got, reason),) = install_layers(model)
    words = (
        "does more than"
        if kind in (prenorm.ByAttribute, prenorm.Branching, prenorm.Typed)
        else "is not h + attention"
    )
    assert (name, got) == ("0", "stock") and words in reason and find(model[0]) is None


@pytest.mark.parametrize("kind", [Layer, Wrapped])
def test_tensors_for_tuples_and_wrappers_of_forwards(kind: type[Layer], calls: Counter[str]) -> None:
    """An attention that returns a tensor, a layer that returns a tuple, a decorator that takes an argument
    away."""
    model, x = single(kind), torch.randn(2, 3, 8)
    options = {"deprecated": 1} if kind is Wrapped else {}
    expected = model[0](x, 0.5, **options)
    assert install_layers(model) == [("0", "add_rms_norm", None)]
    for got in (model[0](x, 0.5, **options), model[0](x=x, scale=0.5, **options)):
        assert isinstance(got, tuple) and len(got) == 1 and torch.equal(got[0], expected[0])
    assert calls["added"] == calls["stream"] == 2
    if kind is Layer:
        for bad in ((), (x, 1.0, 2.0)):
            with pytest.raises(TypeError, match="forward"):
                model[0](*bad)
        with pytest.raises(TypeError, match="scale"):
            model[0](x, 1.0, scale=2.0)
        with pytest.raises(TypeError, match="other"):
            model[0](x, other=2.0)


def test_what_cannot_be_looked_into_is_left() -> None:
    assert "cannot be looked into" in install_layers(single(prenorm.Opaque))[0][2]
    replaced = single(Layer)
    replaced[0].forward = lambda x: x
    assert "replaced" in install_layers(replaced)[0][2]
    bare = nn.ModuleList([Layer()])
    assert "norms do not run rms_norm" in install_layers(bare, rewrites=[DecoderLayers()])[0][2]
    assert install_layers(single(Layer), exclude=("0",)) == []


def test_a_class_whose_forward_is_replaced_later_is_asked(
    monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    model, x = single(Layer), torch.randn(2, 8)
    install_layers(model)
    monkeypatch.setattr(Layer, "forward", wrapping(Layer.forward))
    model[0](x, deprecated=1)
    assert calls["added"] == 1  # wrapped otherwise, the same inside
    monkeypatch.setattr(Layer, "forward", lambda self, x: x)
    assert model[0](x) is x


def test_a_subclass_that_wraps_again_is_followed(calls: Counter[str]) -> None:
    """As FSDP2 makes one of every layer: its forward is the layer's, wrapped for gradient checkpointing a
    second time."""
    model = patched(build("llama").train())
    expected = run(model)
    for layer in layers(model):
        layer.__class__ = type("Sharded" + type(layer).__name__, (type(layer),), {})
    assert same(run(model), expected) and calls["added"] == 2 * 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert same(run(model), expected) and calls["added"] == 4 * 2


# ---- what they compute


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_give_the_bits_of_the_norms_alone_and_gradients_as_accurate(
    name: str, dtype: torch.dtype, calls: Counter[str]
) -> None:
    stock = build(name, dtype)
    plain, exact = run(stock), run(_in_fp64(stock))
    norms = copy.deepcopy(stock)
    installed(norms, Norms())
    before, ours = run(norms), run(patched(copy.deepcopy(stock)))
    assert torch.equal(ours["logits"], before["logits"])
    assert calls["stream"] == calls["added"] == 2
    assert ours.keys() == plain.keys() == exact.keys()
    for key in ours:
        error, allowed = (
            ((run_[key].double() - exact[key]).norm() / exact[key].norm()).item() for run_ in (ours, plain)
        )
        assert error <= max(FACTOR * allowed, torch.finfo(dtype).eps), key


class _Adds(TorchDispatchMode):
    """Additions of two tensors as large as the stream."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += isinstance(args[1], Tensor) and args[0].numel() == args[1].numel() == self.size
        return func(*args, **(kwargs or {}))


def test_one_addition_of_the_stream_is_left_of_a_layers_four() -> None:
    """Forward the one behind the MLP; backward none where the gradients of the stream meet."""
    norms, counts = build("llama"), []
    installed(norms, Norms())
    for each in (norms, patched(build("llama"))):
        x, layer = torch.randn(1, 6, 64, requires_grad=True), layers(each)[0]
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states * 0.5, None)
        layer.mlp.forward = lambda hidden_states: hidden_states * 0.5
        with _Adds(x.numel()) as forward:
            y = layer(x)
        with _Adds(x.numel()) as backward:
            y.sum().backward()
        counts.append((forward.count, backward.count))
    assert counts == [(2, 2), (1, 0)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, calls: Counter[str]) -> None:
    expected = run(patched(build("llama").train()))
    model = patched(build("llama").train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    assert same(run(model), expected)
    assert calls["added"] == 2 * 2  # again in the backward pass


def test_arguments_reach_the_attention_as_they_are() -> None:
    stock = build("llama")
    model, seen = patched(copy.deepcopy(stock)), []
    given = {name: object() for name in (*NAMES, "further")}
    for layer in (layers(stock)[0], layers(model)[0]):
        layer.self_attn.forward = lambda *args, **kwargs: (
            seen.append((args, kwargs)) or (kwargs["hidden_states"], None)
        )
        x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
        layer(
            x,
            given["attention_mask"],
            **{name: value for name, value in given.items() if name != "attention_mask"},
        )
        layer(hidden_states=x)
    for stock_call, our_call in zip(seen[:2], seen[2:], strict=True):
        assert stock_call[0] == our_call[0] == () and stock_call[1].keys() == our_call[1].keys()
        assert all(
            our_call[1][name] is value for name, value in stock_call[1].items() if name != "hidden_states"
        )
        torch.testing.assert_close(our_call[1]["hidden_states"], stock_call[1]["hidden_states"])


@pytest.mark.parametrize("child", ["input_layernorm", "post_attention_layernorm", "self_attn", "mlp", ""])
def test_hooks_fire_and_what_they_return_counts(child: str, calls: Counter[str]) -> None:
    stock = build("llama")
    model, outputs = patched(copy.deepcopy(stock)), []
    for each in (stock, model):
        fired = []

        def hook(module, args, output, fired=fired):
            fired.append(1)
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

        layers(each)[1].get_submodule(child).register_forward_hook(hook)
        outputs.append(each(input_ids=IDS, use_cache=False).logits)
        assert fired == [1]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    watched = child.endswith("norm")
    assert calls["rms_norm"] == 1 + watched and calls["added"] == 2 - (child == "post_attention_layernorm")


def test_recorded_hidden_states_and_attentions() -> None:
    stock = build("llama")
    stock.set_attn_implementation("eager")
    model = patched(copy.deepcopy(stock))
    ours, theirs = (
        each(input_ids=IDS, output_attentions=True, output_hidden_states=True) for each in (model, stock)
    )
    torch.testing.assert_close(ours.attentions, theirs.attentions)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache(calls: Counter[str]) -> None:
    stock = build("qwen3")
    model = patched(copy.deepcopy(stock))
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
    assert calls["added"] == 4 * 2


def test_a_stream_wider_than_what_is_added(calls: Counter[str]) -> None:
    """bf16 blocks beside an fp32 stream: torch's promoting addition, and the stream's gradient in the norm
    all the same."""
    stock = single(Layer)
    for part in ("attn", "mlp"):
        getattr(stock[0], part).register_forward_hook(lambda module, args, output: output.bfloat16())
    model, x = copy.deepcopy(stock), torch.randn(2, 8)
    install_layers(model)
    results = []
    for each in (stock, model):
        leaf = x.clone().requires_grad_()
        (y,) = each[0](leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[1][0].dtype == torch.float32
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)
    assert calls["stream"] == 2 and not calls["added"]


def test_autocast(calls: Counter[str]) -> None:
    stock = build("llama")
    norms, model = copy.deepcopy(stock), patched(copy.deepcopy(stock))
    installed(norms, Norms())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [each(input_ids=IDS, use_cache=False).logits for each in (norms, model)]
    assert torch.equal(*outputs) and calls["stream"] == 2 * 2


@pytest.mark.parametrize("kind", ["fp64", "meta"])
def test_tensors_the_kernels_do_not_take(kind: str, calls: Counter[str]) -> None:
    stock = single(Layer)
    model = copy.deepcopy(stock)
    install_layers(model)
    x = torch.randn(2, 8)
    stock, model, x = (each.double() if kind == "fp64" else each.to("meta") for each in (stock, model, x))
    (ours,), (theirs,) = model[0](x), stock[0](x)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device) and not calls
    assert kind == "meta" or torch.equal(ours, theirs)


def test_no_grad_gives_the_same_bits() -> None:
    model = patched(build("llama", torch.bfloat16))
    expected = model(input_ids=IDS, use_cache=False).logits
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


# ---- living with it


def test_removal_restores_everything() -> None:
    model = build("llama", torch.bfloat16)
    before, contents, classes = (
        run(model),
        [set(m.__dict__) for m in model.modules()],
        [type(m) for m in model.modules()],
    )
    forward, state = classes[-1].forward, list(model.state_dict())
    patched(model)
    assert list(model.state_dict()) == state and [type(m) for m in model.modules()] == classes
    assert sum(remove(module) for module in model.modules()) == 5 + 2
    assert (
        same(run(model), before)
        and [set(m.__dict__) for m in model.modules()] == contents
        and classes[-1].forward is forward
    )


def test_a_layer_outlives_its_norms_patch(calls: Counter[str]) -> None:
    """Norms that were given back, or replaced, are called."""
    model = patched(build("llama"))
    expected = run(build("llama"))
    for module in model.modules():
        if find(module) and type(find(module)[1]) is NormForward:
            remove(module)
    assert same(run(model), expected) and not calls


@pytest.mark.parametrize("how", models.COPIES)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_copies_are_patched_and_independent(name: str, how: str, calls: Counter[str]) -> None:
    model = patched(build(name))
    before = run(model)
    twin = models.copied(model, how)
    calls.clear()
    assert same(run(twin), before) and calls["added"] == 2
    held = [find(layer)[1] for layer in layers(twin)]
    assert all(
        type(forward) is LayerForward and forward.module is layer
        for forward, layer in zip(held, layers(twin), strict=True)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(run(twin), before)


def test_patching_twice_and_other_instances(calls: Counter[str]) -> None:
    model = models.lora(models.llama())
    peftkern.patch(model)
    first = [type(find(layer)[1]) for layer in layers(model)]
    assert (
        peftkern.patch(model).counts["add_rms_norm"] == 2
        and [type(find(layer)[1]) for layer in layers(model)] == first
    )
    build("llama")(input_ids=IDS)
    assert not calls


@pytest.mark.parametrize("child", ["", "post_attention_layernorm"])
@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_hooks(child: str, hook_first: bool, calls: Counter[str]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = build("llama")
    target = layers(model)[0].get_submodule(child)
    if hook_first:
        add_hook_to_module(target, ModelHook())
    patched(model)
    if not hook_first:
        add_hook_to_module(target, ModelHook())
    torch.testing.assert_close(run(model), run(build("llama")), rtol=1e-3, atol=1e-5)
    assert calls["added"] == (1 if child else 2)  # a hook on the norm is served by calling it
    remove_hook_from_module(target)
    calls.clear()
    run(model)
    assert calls["added"] == 2


def test_probing_changes_nothing_and_does_not_depend_on_torchs_defaults() -> None:
    model = build("llama")
    installed(model, Norms())
    before, state = (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        torch.random.get_rng_state(),
    )
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert layer_mode(layers(model)[0]) == LLAMA
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.any_isa
@pytest.mark.parametrize("name", nightly(["llama", "phi3"], quick=["llama"]))
def test_compile_fullgraph_runs_ours_and_does_not_recompile(name: str) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    targets: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, _):
        targets.update(
            str(node.target).split(".")[1]
            for node in graph.graph.nodes
            if str(node.target).startswith("peftkern.")
        )
        return make_boxed_func(graph)

    expected = run(patched(build(name)))
    compiled = torch.compile(patched(build(name)), fullgraph=True, backend=aot_autograd(fw_compiler=count))
    got = run(compiled)
    torch.testing.assert_close(list(got.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    # The first norms of both layers add in backward only; the last norm adds nothing.
    assert targets == {"rms_norm_fwd": 3, "add_rms_norm_fwd": 2, "add_rms_norm_bwd": 4, "rms_norm_bwd": 1}
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled)


def test_a_traced_layer_is_the_stock_program() -> None:
    stock, x = single(Layer), torch.randn(2, 8)
    model = copy.deepcopy(stock)
    install_layers(model)
    graph = str(torch.jit.trace(model[0], (x,)).inlined_graph)
    assert "layers.py" not in graph and "blocks.py" not in graph
