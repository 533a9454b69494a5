"""Decoder layers that run as one function in training: the bits are those of the layer run part by part, and
every call that this does not cover, or a change of what it was made of, is seen."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern.functional import decoder_calls, decoder_layer
from peftkern.ops import attention as attention_op
from peftkern.patching import attention_form, whole_layers
from peftkern.patching.attention_form import CACHES
from peftkern.patching.forwards import find
from peftkern.patching.layers import LayerForward
from peftkern.runtime import backends

from . import models, zoo
from .versions import COUNTED, exact

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TILED = [level for level in backends.native().isas() if level in ("avx512bf16", "amx")]
IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(1))
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    """One with attention of our own."""
    if not TILED:
        pytest.skip("no bf16 products here")
    native = backends.native()
    before = native.isa()
    native.set_isa(TILED[0])
    yield
    native.set_isa(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a layer whether it ran whole."""
    found, call = [], whole_layers.WholeLayer.__call__

    def recorded(self, *args: Any) -> Any:
        out = call(self, *args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(whole_layers.WholeLayer, "__call__", recorded)
    return found


def patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = models.lora(models.llama(BF16) if model is None else model, **options).train()
    peftkern.patch(model)
    return model


@contextlib.contextmanager
def by_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layers.WholeLayer, "__call__", lambda self, *args: None)
        yield


def run(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Logits and every gradient; dropout's draws are the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    logits = model(**{"input_ids": IDS, "use_cache": False} | inputs).logits
    logits.double().square().mean().backward()
    return {"logits": logits.detach()} | models.grads(model)


def same(model: nn.Module, taken: list[bool], **inputs: Any) -> None:
    """Every layer ran whole, twice, and with the bits of the parts."""
    taken.clear()
    got, again = run(model, **inputs), run(model, **inputs)
    assert len(taken) >= 4 and all(taken)
    with by_parts():
        expected = run(model, **inputs)
    assert got.keys() == expected.keys() and len(got) > 1
    for name, value in expected.items():
        assert torch.equal(got[name], value) and torch.equal(again[name], value), name


def runs_by_parts(model: nn.Module, taken: list[bool], **inputs: Any) -> None:
    """No layer ran whole, or not all, and the results are those of the parts."""
    taken.clear()
    got = run(model, **inputs)
    assert taken and not all(taken)
    with by_parts():
        expected = run(model, **inputs)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"r": 40, "use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["o_proj", "down_proj"]},
        {"target_modules": ["up_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cache"])
def test_the_bits_of_the_parts(taken: list[bool], options: dict[str, Any], cached: bool) -> None:
    same(patched(**options), taken, use_cache=cached)


def test_biases_and_adapters_in_bf16(taken: list[bool]) -> None:
    model = models.llama(BF16, bias=True)
    model = models.lora(model).to(BF16).train()
    peftkern.patch(model)
    same(model, taken)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@exact
def test_which_models(taken: list[bool], name: str) -> None:
    model = zoo.build(name, four_bit=True, dtype=BF16)
    peftkern.patch(model)
    run(model)
    assert len(taken) == 2 and all(taken)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3"])
def test_other_forms_run_by_parts(taken: list[bool], name: str) -> None:
    """Norms of heads, four norms a layer, packed projections."""
    model = zoo.build(name, four_bit=True, dtype=BF16)
    peftkern.patch(model)
    run(model)
    assert not any(taken)


def test_a_mask_errs_no_more(taken: list[bool]) -> None:
    """Where keys are hidden transformers repeats the heads of keys, whose gradients torch then sums in bf16;
    whole, they are summed in fp32."""
    model, mask = patched(), torch.ones_like(IDS)
    mask[0, :5] = 0
    got = run(model, attention_mask=mask)
    assert len(taken) == 2 and all(taken)
    with by_parts():
        parts = run(model, attention_mask=mask)
    assert torch.equal(got["logits"], parts["logits"])
    wide = models.in_fp64(model)
    true = run(wide, attention_mask=mask)
    ours, theirs = models.errors(got, true), models.errors(parts, true)
    assert sum(ours.values()) <= 1.02 * sum(theirs.values())


def test_a_cache_is_filled_and_keeps_its_graph(taken: list[bool]) -> None:
    """Keys and values lie in it as ever, and lead back to the adapters."""
    model, found = patched(), []
    for way in (contextlib.nullcontext, by_parts):
        model.zero_grad(set_to_none=True)
        with way():
            out = model(input_ids=IDS, use_cache=True)
        layers = out.past_key_values.layers
        kept = [t for layer in layers for t in (layer.keys, layer.values)]
        sum(t.double().square().sum() for t in kept).backward()
        found.append([*map(Tensor.detach, kept), *models.grads(model).values()])
    assert taken == [True, True] and len(found[0]) > 8
    assert all(map(torch.equal, *found))
    taken.clear()
    with torch.no_grad():
        prompt = model(input_ids=IDS, use_cache=True).past_key_values
    model(input_ids=IDS, past_key_values=prompt, use_cache=True)  # onto what is there
    assert taken == [False] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(taken: list[bool], reentrant: bool) -> None:
    model = patched(lora_dropout=0.2)
    model.enable_input_require_grads()
    whole = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run(model)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    # Of a reentrant checkpoint the first pass has no gradients; of the other, the second one ends where it
    # has all that was saved, inside the layer.
    assert taken == [True] * 2 + [not reentrant] * 2 + [True] * (2 if reentrant else 0)


def test_inputs_that_require_grad(taken: list[bool]) -> None:
    model = patched()
    found = []
    for way in (contextlib.nullcontext, by_parts):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with way():
            model(inputs_embeds=x, use_cache=False).logits.double().square().mean().backward()
        found.append(x.grad)
    assert taken == [True, True] and torch.equal(*found)


def test_twice_backward_and_second_derivatives(taken: list[bool]) -> None:
    model = patched()
    trained = [p for p in model.parameters() if p.requires_grad]

    def second(**options: Any) -> list[Tensor]:
        loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
        first = torch.autograd.grad(loss, trained, create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), trained)

    got = second()
    assert taken == [True, True]
    with by_parts():
        expected = second()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.02 * theirs.abs().max().item())
    loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
    once, again = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_a_counter_around_backward_counts_it(taken: list[bool]) -> None:
    model, counts = patched(), []
    for way in (contextlib.nullcontext, by_parts):
        with way():
            loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
            with FlopCounterMode(display=False) as counter:
                loss.backward()
        counts.append(counter.get_total_flops())
    assert taken == [True, True] and counts[0] > 0.5 * counts[1] > 0


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a hook on the layer": lambda m: layer_of(m).register_forward_hook(lambda *_: None),
    "a hook on attention": lambda m: layer_of(m).self_attn.register_forward_pre_hook(lambda *_: None),
    "a hook on a norm": lambda m: layer_of(m).input_layernorm.register_forward_hook(lambda *_: None),
    "a hook on the MLP": lambda m: layer_of(m).mlp.register_full_backward_hook(lambda *_: None),
    "a hook on the activation": lambda m: layer_of(m).mlp.act_fn.register_forward_hook(lambda *_: None),
    "a hook on a projection": lambda m: layer_of(m).self_attn.k_proj.register_forward_hook(lambda *_: None),
    "a hook on a base": lambda m: layer_of(m).mlp.up_proj.base_layer.register_forward_hook(lambda *_: None),
    "a hook on an adapter": lambda m: (
        layer_of(m).self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    ),
    "a trained norm": lambda m: layer_of(m).input_layernorm.weight.requires_grad_(),
    "dropped attention": lambda m: setattr(layer_of(m).self_attn, "attention_dropout", 0.1),
    "another function": lambda m: m.set_attn_implementation("eager"),
    "an adapter switched off": lambda m: m.disable_adapter_layers(),
    "a forward of its own": lambda m: setattr(
        layer_of(m).mlp, "forward", types.MethodType(type(layer_of(m).mlp).forward, layer_of(m).mlp)
    ),
    "an unpatched layer": lambda m: peftkern.unpatch(layer_of(m).self_attn),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_leaves_to_the_parts(taken: list[bool], change: str) -> None:
    """Before the first call, and behind calls that ran whole."""
    model = patched()
    same(model, taken)
    CHANGES[change](model)
    if change == "an adapter switched off":
        with by_parts():
            expected = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        return
    torch.manual_seed(0)
    runs_by_parts(model, taken)
    fresh = patched()
    CHANGES[change](fresh)
    runs_by_parts(fresh, taken)


def _scaled(model: nn.Module) -> None:
    layer_of(model).self_attn.v_proj.scaling["default"] *= 3


def _other_weight(model: nn.Module) -> None:
    for module in (layer_of(model).mlp.gate_proj, layer_of(model).self_attn.q_proj):
        adapter = module.lora_B["default"]
        adapter.weight = nn.Parameter(adapter.weight.detach() * 2)


def _data(model: nn.Module) -> None:
    adapter = layer_of(model).self_attn.o_proj.lora_A["default"]
    adapter.weight.data = adapter.weight.data * 2


def _requantized(model: nn.Module) -> None:
    base = layer_of(model).mlp.down_proj.base_layer
    model.base_model.model.get_submodule("model.layers.0.mlp.down_proj").base_layer = models.linear_4bit(
        nn.Linear(base.in_features, base.out_features, bias=False).to(BF16), BF16
    )


def _second(model: nn.Module) -> None:
    model.add_adapter("second", models.config(r=3))
    models.randomize(model)
    model.set_adapter("second")


STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "another eps": lambda m: setattr(layer_of(m).input_layernorm, "variance_epsilon", 0.5),
    "another norm": lambda m: layer_of(m).post_attention_layernorm.weight.data.mul_(2.0),
    "a norm elsewhere": lambda m: setattr(
        layer_of(m).input_layernorm,
        "weight",
        nn.Parameter(layer_of(m).input_layernorm.weight * 3, requires_grad=False),
    ),
    "another scale of scores": lambda m: setattr(layer_of(m).self_attn, "scaling", 0.01),
    "not causal": lambda m: setattr(layer_of(m).self_attn, "is_causal", False),
    "another scaling": _scaled,
    "other weights": _other_weight,
    "data elsewhere": _data,
    "another base": _requantized,
    "another adapter": _second,
    "dropout": lambda m: setattr(layer_of(m).mlp.up_proj.lora_dropout, "default", nn.Dropout(0.4)),
    "patched again": peftkern.patch,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_change_is_seen_by_the_next_call(taken: list[bool], step: str) -> None:
    model = patched()
    before = run(model)
    STEPS[step](model)
    if step == "another base":
        peftkern.patch(model)
    same(model, taken)
    changed = run(model)["logits"]
    assert torch.equal(changed, before["logits"]) == (step == "patched again")


def test_other_calls(taken: list[bool]) -> None:
    """Without gradients, under autocast, few tokens, under a profiler, a mask of numbers, other dtypes."""
    model = patched()
    with torch.no_grad():
        model(input_ids=IDS)
    with torch.autocast("cpu", dtype=BF16):
        model(input_ids=IDS)
    model(input_ids=IDS[:, : attention_op.config.FEWEST_QUERIES - 1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        model(input_ids=IDS)
    model(input_ids=IDS, attention_mask=torch.zeros(2, 1, 20, 20, dtype=BF16))
    with torch.device("cpu"):  # a mode for every function
        model(input_ids=IDS)
    with pytest.MonkeyPatch.context() as patch:
        function = "torch.nn.functional.scaled_dot_product_attention"
        stock = nn.functional.scaled_dot_product_attention
        patch.setattr(function, lambda *args, **kwargs: stock(*args, **kwargs))
        model(input_ids=IDS)
    backends.native().set_isa("baseline")
    model(input_ids=IDS)
    backends.native().set_isa(TILED[0])
    assert not any(taken)
    single = patched(models.llama(torch.float32))
    run(single)
    assert not any(taken)
    run(model)
    assert taken[-2:] == [True, True]


@pytest.mark.parametrize("how", models.COPIES)
def test_copies_have_their_own(taken: list[bool], how: str) -> None:
    model = patched()
    run(model)
    other = models.copied(model, how)
    _other_weight(other)
    same(other, taken)
    same(model, taken)


def test_what_was_prepared_is_let_go(taken: list[bool]) -> None:
    model = patched()
    run(model)
    forward = find(layer_of(model))[1]
    assert type(forward) is LayerForward and forward.whole().ready is not None
    forward.let_go()
    assert forward.whole().ready is None
    same(model, taken)


# ---- as two lists of calls


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each direction of a layer that ran as one list of calls."""
    found: list[str] = []
    for name in ("forward", "backward"):
        run = getattr(decoder_calls.LayerCalls, name)

        def recorded(self, *args: Any, run=run, name=name) -> Any:
            out = run(self, *args)
            if out is not None:
                found.append(name)
            return out

        monkeypatch.setattr(decoder_calls.LayerCalls, name, recorded)
    return found


@contextlib.contextmanager
def call_by_call() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_layer, "layer_calls", lambda *args: None)
        yield


def wide(**options: Any) -> nn.Module:
    """A model whose weights take tiles: rows of whole blocks."""
    return patched(models.llama(BF16, inner=128), **options)


@pytest.mark.parametrize("cached", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("grads", [False, True], ids=["", "inputs"])
def test_one_list_has_the_bits_of_its_calls(
    taken: list[bool], lists: list[str], cached: bool, masked: bool, grads: bool
) -> None:
    model, inputs = wide(), {"use_cache": cached}
    if masked:
        inputs["attention_mask"] = torch.ones_like(IDS)
        inputs["attention_mask"][0, :5] = 0
    if grads:
        model.enable_input_require_grads()
    got, again = run(model, **inputs), run(model, **inputs)
    assert all(taken) and lists == (["forward"] * 2 + ["backward"] * 2) * 2
    with call_by_call():
        expected = run(model, **inputs)
    assert len(lists) == 8 and got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) and torch.equal(again[name], value), name


def test_what_a_list_leaves_to_its_calls(taken: list[bool], lists: list[str]) -> None:
    """Dropout forward; backward what is not all: adapters that are frozen, a cache's gradients."""
    run(wide(lora_dropout=0.3))
    assert all(taken) and lists == []
    model = wide()
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    same(model, taken)
    assert lists.count("forward") == 4 and lists.count("backward") == 2
    lists.clear()
    out = wide()(input_ids=IDS, use_cache=True)
    sum(layer.keys.double().square().sum() for layer in out.past_key_values.layers).backward()
    assert lists == ["forward"] * 2


def test_tensors_that_come_back_elsewhere_or_otherwise(lists: list[str]) -> None:
    """Hooks for saved tensors: copies at other places, and one that lies in another order."""
    model = wide()
    expected = run(model)
    for unpack in (torch.clone, lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone()):
        lists.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            got = run(model)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert lists.count("forward") == 2
    turned = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t  # noqa: E731
    lists.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        got = run(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert lists == ["forward"] * 2


def test_weights_that_move_before_backward(lists: list[str]) -> None:
    """A norm's lies elsewhere then; a 4-bit one's bytes are held by what forward read."""
    model = wide()
    expected = run(model)
    layer = layer_of(model)
    for weight, backward in ((layer.input_layernorm.weight, 1), (layer.mlp.up_proj.base_layer.weight, 2)):
        lists.clear()
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=IDS, use_cache=False).logits.double().square().mean()
        weight.data = weight.data.clone()
        loss.backward()
        assert lists == ["forward"] * 2 + ["backward"] * backward
        assert all(torch.equal(expected[name], value) for name, value in models.grads(model).items())


def test_other_shapes_and_threads(taken: list[bool], lists: list[str]) -> None:
    """Each has a list of its own, four at most."""
    model, before = wide(), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for length in (20, 17, 33, 40, 20):
                ids = torch.randint(1, 96, (2, length))
                run(model, input_ids=ids)
    finally:
        torch.set_num_threads(before)
    assert all(taken) and lists.count("backward") == 20
    layer = find(layer_of(model))[1].whole().ready.layer
    assert 0 < len(layer.calls) <= 4


def test_a_graph_that_is_kept_keeps_its_numbers(lists: list[str]) -> None:
    """While one step's graph lives, another's activations lie elsewhere."""
    model = wide()
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits.double().square().mean()

    one, other = IDS, IDS.flip(0, 1)
    first = loss(one)
    alone = torch.autograd.grad(first, trained, retain_graph=True)
    torch.autograd.grad(loss(other), trained)
    again = torch.autograd.grad(first, trained)
    assert all(map(torch.equal, alone, again)) and lists.count("backward") == 6


# ---- what an attention's forward is asked


def forward_of(change: Callable[..., Any] | None = None) -> type:
    """A class of attention like Llama's, whose forward does what `change` does to its parts."""

    class Attention(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
            key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
            value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            dropout = 0.0 if not self.training else self.attention_dropout
            out, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return Attention


apply_rotary_pos_emb = eager_attention_forward = ALL_ATTENTION_FUNCTIONS = None  # looked up by the forwards


def _with(old: str, new: str) -> nn.Module:
    """Llama's attention, its class's forward as above with a piece of its source replaced."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(forward_of))
    start = source.index("def forward(")
    body = textwrap.dedent(" " * 8 + source[start : source.index("    return Attention")])
    assert body.count(old) == 1, old
    scope: dict[str, Any] = {
        "apply_rotary_pos_emb": None,
        "ALL_ATTENTION_FUNCTIONS": None,
        "eager_attention_forward": None,
    }
    exec(body.replace(old, new), scope)
    module = models.llama(BF16).model.layers[0].self_attn
    module.__class__ = type("Attention", (type(module),), {"forward": scope["forward"]})
    return module


def test_the_usual_form_is_recognized() -> None:
    form = attention_form.attention_form(_with("cos, sin =", "cos, sin ="))
    assert form.cache == "cache" and {"head_dim", "scaling", "config", "training"} <= set(form.reads)
    assert form.further == frozenset()
    window = "sliding_window=getattr(self.config, 'sliding_window', 7), **kwargs\n    )"
    wide = _with("**kwargs\n    )", window)
    assert attention_form.attention_form(wide).further == {"sliding_window"}
    if COUNTED:
        assert attention_form.attention_form(models.llama(BF16).model.layers[0].self_attn).cache in CACHES


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("query, key = apply", "key, query = apply"),
        ("cos, sin = position", "sin, cos = position"),
        ("self.k_proj(hidden_states)", "self.q_proj(hidden_states)"),
        ("scaling=self.scaling", "scaling=self.head_dim"),
        ("query, key, value, attention_mask", "query, key, key, attention_mask"),
        ("value, attention_mask, dropout", "value, None, dropout"),
        ("dropout=dropout", "dropout=0.0"),
        ("self.layer_idx)", "0 * self.layer_idx + 7)"),
        ("out.reshape", "query.reshape"),
        ("transpose(1, 2)\n    key =", "transpose(1, 2) * 2\n    key ="),
        ("return self.o_proj", "return self.head_dim * self.o_proj"),
        (", **kwargs\n    )", "\n    )"),
        ("cos, sin = ", "hidden_states = hidden_states.clone()\n    cos, sin = "),
        ("cache=None, **kwargs", "cache=None, gate=None, **kwargs"),
    ],
    ids=str,
)
def test_another_form_is_not(old: str, new: str) -> None:
    assert attention_form.attention_form(_with(old, new)) is None


def test_a_copy_of_a_model_in_place(taken: list[bool]) -> None:
    """What is held is the layer's own: of two copies each has its weights."""
    one, two = patched(), copy.deepcopy(patched())
    _scaled(two)
    first, second = run(one)["logits"], run(two)["logits"]
    assert all(taken) and not torch.equal(first, second)
    assert torch.equal(run(one)["logits"], first)
