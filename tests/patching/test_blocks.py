"""Norms and rotary embeddings of tiny random models: patched against unpatched, reversible, carried along by
copies."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from peftkern import functional
from peftkern.patching import rotary
from peftkern.patching.blocks import NormMode, Norms
from peftkern.patching.forwards import find, remove
from peftkern.patching.rewrite import Finding
from peftkern.patching.rotary import RopeMode, Rotary

from ..cases import nightly
from ..ops.bounds import FACTOR
from . import models
from .rewriting import installed, surveyed
from .versions import exact

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = exact

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.0,
)
LLAMA, GEMMA = NormMode("variance_epsilon", 0.0, "llama", True), NormMode("eps", 1.0, "gemma", True)
# name: (config, norms, their mode, attentions, their mode)
MODELS = {
    "llama": (lambda: transformers.LlamaConfig(**SIZES), 5, LLAMA, 2, RopeMode(False)),
    "gemma2": (
        lambda: transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=8),
        9,
        GEMMA,
        2,
        RopeMode(False),
    ),
    "qwen3": (lambda: transformers.Qwen3Config(**SIZES, head_dim=16), 9, LLAMA, 2, RopeMode(False)),
    "phi3": (
        lambda: transformers.Phi3Config(**SIZES, partial_rotary_factor=0.5, resid_pdrop=0.0),
        5,
        LLAMA,
        2,
        RopeMode(True),
    ),
    "gpt_neox": (
        lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        0,
        None,
        2,
        RopeMode(True),
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name][0]())
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms that do nothing would hide an error
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def candidates(model: nn.Module) -> list[Finding]:
    return surveyed(model, Norms(), Rotary())


def patched(model: nn.Module) -> nn.Module:
    assert installed(model, Norms(), Rotary()) > 0
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    """logits, loss and every gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten())
    loss.backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), "loss": loss.detach()} | grads


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused function ran."""
    counter: Counter[str] = Counter()
    for name in ("rms_norm", "rope"):
        original = getattr(functional, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counter[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(functional, name, counted)
    return counter


@EVERY
def test_every_norm_and_rotation_is_recognized(name: str) -> None:
    _, norms, norm_mode, ropes, rope_mode = MODELS[name]
    model = build(name)
    found = surveyed(model, Norms())
    assert [(block.made_of, block.row.reason) for block in found] == [(norm_mode, None)] * norms
    found = surveyed(model, Rotary())
    assert [(block.made_of, block.row.reason) for block in found] == [((rope_mode,), None)] * ropes
    assert all(model.get_submodule(block.row.name) is block.module for block in found)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patched_models_err_no_more_than_stock_ones(
    name: str, dtype: torch.dtype, calls: Counter[str]
) -> None:
    """Logits, loss and every gradient against fp64, with the bound plain PyTorch's own error sets."""
    stock = build(name, dtype)
    plain, exact = run(stock), run(_in_fp64(stock))
    ours = run(patched(copy.deepcopy(stock)))
    _, norms, _, ropes, _ = MODELS[name]
    calls.clear()
    model = patched(copy.deepcopy(stock))
    model(input_ids=IDS, use_cache=False)
    assert calls == {key: count for key, count in (("rms_norm", norms), ("rope", ropes)) if count}
    assert ours.keys() == plain.keys() == exact.keys()
    for key in ours:
        error, allowed = (
            ((run_[key].double() - exact[key]).norm() / exact[key].norm()).item() for run_ in (ours, plain)
        )
        assert error <= max(FACTOR * allowed, torch.finfo(dtype).eps), key


def _in_fp64(model: nn.Module) -> nn.Module:
    """With norms that do not round to fp32 inside."""
    double = copy.deepcopy(model).double()
    for block in surveyed(model, Norms()):
        module, mode = double.get_submodule(block.row.name), block.made_of

        def forward(x: Tensor, module=module, mode=mode) -> Tensor:
            normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(module, mode.eps_name))
            return normal * (mode.offset + module.weight)

        module.forward = forward
    return double


@EVERY
def test_removal_restores_everything(name: str) -> None:
    model = build(name, torch.bfloat16)
    before, contents, classes = (
        run(model),
        [set(m.__dict__) for m in model.modules()],
        [type(m) for m in model.modules()],
    )
    state = list(model.state_dict())
    patched(model)
    assert list(model.state_dict()) == state and [type(m) for m in model.modules()] == classes
    assert sum(remove(module) for module in model.modules()) == MODELS[name][1] + MODELS[name][3]
    assert same(run(model), before) and [set(m.__dict__) for m in model.modules()] == contents


@pytest.mark.parametrize("how", models.COPIES)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_copies_are_patched_and_independent(name: str, how: str, calls: Counter[str]) -> None:
    model = patched(build(name))
    before = run(model)
    twin = models.copied(model, how)
    calls.clear()
    assert same(run(twin), before) and calls == {"rms_norm": MODELS[name][1], "rope": 2}
    for left, right in zip(model.modules(), twin.modules(), strict=True):
        held = find(right)
        assert held is None or held[1].module is right is not left
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(run(twin), before)


def test_patching_twice_and_candidates_of_a_patched_model() -> None:
    model = patched(build("llama"))
    held = [find(module) for module in model.modules()]
    assert all(block.row.reason is None for block in candidates(model))
    patched(model)
    assert [find(module) for module in model.modules()] == held


def test_other_instances_and_the_module_of_the_class_are_untouched(calls: Counter[str]) -> None:
    import transformers.models.llama.modeling_llama as defining

    function, forward = defining.apply_rotary_pos_emb, defining.LlamaAttention.forward
    patched(build("llama"))
    build("llama")(input_ids=IDS)
    assert (
        not calls and defining.apply_rotary_pos_emb is function and defining.LlamaAttention.forward is forward
    )


@pytest.mark.any_isa
@pytest.mark.parametrize("name", nightly(["llama", "phi3", "gemma2", "qwen3", "gpt_neox"], quick=["qwen3"]))
def test_compile_fullgraph_runs_ours_and_does_not_recompile(name: str) -> None:
    """Dynamo sees the replaced function: the compiled graphs hold our ops."""
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

    model = copy.deepcopy(patched(build(name)))  # a copy that never ran
    expected = run(patched(build(name)))
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    got = run(compiled)
    torch.testing.assert_close(list(got.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    _, norms, _, ropes, _ = MODELS[name]
    assert targets["rope"] == 2 * ropes and targets["rms_norm_fwd"] == targets["rms_norm_bwd"] == norms
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled)


def test_generation_with_a_cache(calls: Counter[str]) -> None:
    stock = build("qwen3")
    model = patched(copy.deepcopy(stock))
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
    assert calls["rope"] == 4 * 2


def test_attention_weights_are_still_returned() -> None:
    stock = build("llama")
    stock.set_attn_implementation("eager")
    model = patched(copy.deepcopy(stock))
    for ours, theirs in zip(
        model(input_ids=IDS, output_attentions=True).attentions,
        stock(input_ids=IDS, output_attentions=True).attentions,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_accelerate_hooks_on_the_same_module(calls: Counter[str]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    for hook_first in (True, False):
        model = build("llama")
        attention, norm = model.model.layers[0].self_attn, model.model.norm
        if hook_first:
            add_hook_to_module(attention, ModelHook()), add_hook_to_module(norm, ModelHook())
        patched(model)
        if not hook_first:
            add_hook_to_module(attention, ModelHook()), add_hook_to_module(norm, ModelHook())
        calls.clear()
        model(input_ids=IDS)
        assert calls == {"rms_norm": 5, "rope": 2}
        if hook_first:
            assert sum(remove(module) for module in model.modules()) == 7
        remove_hook_from_module(attention), remove_hook_from_module(norm)
        calls.clear()
        model(input_ids=IDS)
        assert calls == ({} if hook_first else {"rms_norm": 5, "rope": 2})


class Scaled(nn.Module):
    """Almost an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return 1.0001 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Gated(Scaled):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class Biased(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Scaled(), "no RMSNorm that peftkern knows"),
        (Gated(), "failed on a probe: TypeError"),
        (Biased(), "other parameters"),
    ],
    ids=lambda v: "" if isinstance(v, str) else type(v).__name__,
)
def test_other_norms_keep_their_forward_and_say_why(module: nn.Module, words: str) -> None:
    (block,) = surveyed(module, Norms())
    assert words in block.row.reason and block.made_of is None
    assert installed(module, Norms()) == 0 and find(module) is None


def test_a_norm_whose_forward_was_replaced_is_left() -> None:
    norm = build("llama").model.norm
    norm.forward = lambda x: x
    (block,) = surveyed(norm, Norms())
    assert "replaced" in block.row.reason


def test_layer_norms_are_not_listed() -> None:
    assert not surveyed(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))


def test_probing_does_not_depend_on_the_defaults_of_torch() -> None:
    model = build("llama")
    expected = candidates(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert candidates(model) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_probing_leaves_the_module_as_it_was() -> None:
    model = build("gemma2")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    candidates(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 64).double(), torch.randn(3, 64, device="meta"), torch.randn(3, 63)],
    ids=["fp64", "meta", "size"],
)
def test_inputs_the_norm_kernels_do_not_take_get_stock_behaviour(x: Tensor, calls: Counter[str]) -> None:
    stock = build("llama").model.norm
    norm = copy.deepcopy(stock)
    installed(norm, Norms())
    outcomes = []
    for module in (stock, norm):
        try:
            y = module(x)
            outcomes.append((y.dtype, y.shape, y if y.device.type == "cpu" else None))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert str(outcomes[0]) == str(outcomes[1]) and not calls


def _rotary_call(q, k, cos, sin, **options) -> bool:
    """Whether a call is ours; it gives what the stock function gives in any case."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as stock

    fell_back = []
    ours = rotary._rotary(lambda *args, **kwargs: fell_back.append(1) or stock(*args, **kwargs), False)
    for got, expected in zip(ours(q, k, cos, sin, **options), stock(q, k, cos, sin, **options), strict=True):
        torch.testing.assert_close(got, expected)
    return not fell_back


def test_calls_that_the_rotation_does_not_serve_go_to_the_stock_function() -> None:
    q, k, angle = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.rand(1, 5, 16)
    cos, sin = angle.cos(), angle.sin()
    assert _rotary_call(q, k, cos, sin) and _rotary_call(q, k, cos, sin, unsqueeze_dim=1)
    assert not _rotary_call(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert not _rotary_call(q.double(), k.double(), cos.double(), sin.double())
    assert not _rotary_call(q.bfloat16(), k.bfloat16(), cos, sin)
    assert not _rotary_call(q, k, cos.requires_grad_(), sin)
    assert not _rotary_call(*(t.to("meta") for t in (q, k, cos.detach(), sin)))


def test_another_rotary_convention_is_refused() -> None:
    """GLM's function turns neighbours, not halves."""
    config = transformers.GlmConfig(**SIZES, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert ["rotate_half" in block.row.reason for block in surveyed(model, Rotary())] == [True, True]


def test_what_others_put_into_the_defining_module_later_is_seen(
    monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    import transformers.models.llama.modeling_llama as defining

    model, used = patched(build("llama")), []
    model(input_ids=IDS)
    original, attention = defining.apply_rotary_pos_emb, defining.ALL_ATTENTION_FUNCTIONS

    class Watched:
        def get_interface(self, *args):
            used.append("attention")
            return attention.get_interface(*args)

    monkeypatch.setattr(defining, "ALL_ATTENTION_FUNCTIONS", Watched())
    calls.clear()
    model(input_ids=IDS)
    assert used == ["attention"] * 2 and calls["rope"] == 2
    monkeypatch.setattr(
        defining, "apply_rotary_pos_emb", lambda *args: used.append("rotary") or original(*args)
    )
    calls.clear()
    model(input_ids=IDS)
    assert used.count("rotary") == 2 and calls["rope"] == 0


def test_forwards_pickle_without_their_functions() -> None:
    attention = patched(build("llama")).model.layers[0].self_attn
    forward = attention.forward
    again = pickle.loads(pickle.dumps(forward))
    assert again.cache == forward.cache and type(again) is type(forward)
    assert again.scope is not forward.scope and again._function.__code__ is forward._function.__code__
