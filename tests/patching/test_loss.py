"""The fused loss of causal language models against the stock one: values, gradients, fallbacks, copies,
compile."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from peftkern.patching.forwards import remove
from peftkern.patching.loss import Loss

from ..cases import nightly
from ..ops.bounds import FACTOR, assert_as_accurate, relative_norm
from .rewriting import installed, surveyed

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
LABELS = torch.where(torch.arange(12) < 4, -100, IDS)
BATCHES = 16
CALLS = 1 + BATCHES  # of the fused function, in `check`
COMMON = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)


def _config(kind: str, **options) -> transformers.PretrainedConfig:
    small = dict(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=1,
        bos_token_id=2,
    )
    return {
        "llama": lambda: transformers.LlamaConfig(**COMMON | options),
        "qwen2": lambda: transformers.Qwen2Config(**COMMON | options),
        "gemma2": lambda: transformers.Gemma2Config(
            **COMMON | dict(head_dim=16, final_logit_softcapping=3.0) | options
        ),
        "granite": lambda: transformers.GraniteConfig(**COMMON | dict(logits_scaling=8.0) | options),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=64, n_layer=1, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**small, intermediate_size=80),
        "opt": lambda: transformers.OPTConfig(
            **small, ffn_dim=80, word_embed_proj_dim=64, max_position_embeddings=64, dropout=0.0
        ),
        "mixtral": lambda: transformers.MixtralConfig(**COMMON | dict(num_local_experts=2) | options),
    }[kind]()


def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(kind, **options))
    model.config._experts_implementation = "eager"  # the grouped product knows no fp64
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            nn.init.normal_(parameter, std=0.2)  # transformers' own makes all words equally likely
    return model.to(dtype).train()


def lora(model: nn.Module, **options) -> nn.Module:
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]} | options)
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    return adapted.train()


def fuse(model: nn.Module) -> nn.Module:
    (found,) = surveyed(model, Loss())
    assert found.row.reason is None, found.row.reason
    assert installed(model, Loss())
    return model


@pytest.fixture
def calls(loss_calls: list[dict]) -> list[dict]:
    """The keyword arguments of every call of the fused loss."""
    return loss_calls


def run(model: nn.Module, **arguments) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, **{"labels": LABELS} | arguments).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def losses(model: nn.Module, **arguments) -> Tensor:
    """Of several batches: the error of one number says little."""
    generator = torch.Generator().manual_seed(5)
    batches = torch.randint(1, 96, (BATCHES, 2, 12), generator=generator)
    with torch.no_grad():
        return torch.stack([model(input_ids=ids, **{"labels": ids} | arguments).loss for ids in batches])


def check(model: nn.Module, **arguments) -> None:
    """Fused against stock, each against the model in fp64."""
    double = copy.deepcopy(model).double()
    stock, exact = run(model, **arguments), run(double, **arguments)
    values = [losses(model, **arguments), losses(double, **arguments)]
    fused = run(fuse(model), **arguments)
    assert_as_accurate("loss", losses(model, **arguments), *values)
    assert fused.keys() == stock.keys() and len(fused) > 1
    assert all(value.dtype == stock[name].dtype for name, value in fused.items())
    got, plain, true = (
        torch.cat([g[name].double().flatten() / exact[name].norm() for name in fused])
        for g in (fused, stock, exact)
    )
    assert relative_norm(got, true) <= FACTOR * relative_norm(plain, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_loss_and_every_gradient(kind: str, tied: bool, dtype: torch.dtype, calls: list) -> None:
    """Trainable heads: the weight's gradient too, added to the embedding's where they are tied."""
    check(make(kind, dtype, tie_word_embeddings=tied))
    assert len(calls) == CALLS and calls[0]["softcap"] == (3.0 if kind == "gemma2" else None)


@pytest.mark.parametrize("kind", ["granite", "gpt2", "neox", "opt", "mixtral"])
def test_other_architectures(kind: str, calls: list) -> None:
    check(make(kind))
    assert len(calls) == CALLS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [3.0, 0.7])
def test_a_scale_that_rounds(scaling: float, dtype: torch.dtype, calls: list) -> None:
    check(make("granite", dtype, logits_scaling=scaling))
    assert len(calls) == CALLS


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "head",
    [{}, {"lora_bias": True, "bias": "none"}, {"target_modules": ["q_proj"]}, {"use_rslora": True}],
    ids=str,
)
def test_peft_models(kind: str, head: dict, calls: list) -> None:
    """An adapter on the head, with a bias of its own, and a frozen head."""
    model = lora(make(kind, tie_word_embeddings=False), **head)
    check(model)
    assert ("lora_a" in calls[0]) == ("target_modules" not in head)


def test_a_head_that_is_saved_as_a_whole_is_trained(calls: list) -> None:
    model = lora(make(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    check(model)
    assert len(calls) == CALLS and any("lm_head.modules_to_save" in name for name in run(model))


@pytest.mark.parametrize(
    "arguments",
    [{"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}, {"shift_labels": LABELS}],
    ids=str,
)
def test_arguments_of_the_loss(arguments: dict, calls: list) -> None:
    check(make(), **arguments)
    assert len(calls) == CALLS


def test_no_label_at_all_gives_stocks_loss() -> None:
    model, labels = make(), torch.full_like(IDS, -100)
    assert run(model, labels=labels)["loss"].isnan()
    fused = run(fuse(model), labels=labels)
    assert fused.pop("loss").isnan() and not any(g.any() for g in fused.values())


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast(frozen: bool, calls: list) -> None:
    model = make()
    model.lm_head.weight.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        check(model)
    assert len(calls) == CALLS


def test_the_output_has_no_logits_in_training_and_all_of_them_otherwise(calls: list) -> None:
    model = make()
    stock = copy.deepcopy(model)
    fuse(model)
    output = model(input_ids=IDS, labels=LABELS)
    assert (
        output.logits is None
        and "logits" not in output
        and output[0] is output.loss
        and output.past_key_values is not None
    )
    calls.clear()
    for arguments in ({}, {"labels": None}):
        assert torch.equal(model(input_ids=IDS, **arguments).logits, stock(input_ids=IDS, **arguments).logits)
    model.eval(), stock.eval()
    for arguments in ({"labels": LABELS}, {"logits_to_keep": 1}):
        ours, theirs = model(input_ids=IDS, **arguments), stock(input_ids=IDS, **arguments)
        assert torch.equal(ours.logits, theirs.logits) and (
            ours.loss is None or torch.equal(ours.loss, theirs.loss)
        )
    generated = [m.generate(IDS[:, :4], max_new_tokens=3, do_sample=False) for m in (model, stock)]
    assert torch.equal(*generated) and not calls


def _other_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_) -> Tensor:
    return logits.float().square().mean()


def _hooked(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "loss_function", _other_loss),
        _hooked,
    ],
    ids=["loss function", "hook"],
)
def test_changes_after_patching_are_seen(change, calls: list) -> None:
    model = make("gemma2")
    stock = copy.deepcopy(model)
    fuse(model)
    change(model), change(stock)
    got, expected = run(model), run(stock)
    assert not calls and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("arguments", [{"return_dict": False}, {"logits_to_keep": 12}], ids=str)
def test_arguments_that_want_more_go_to_the_stock_forward(arguments: dict, calls: list) -> None:
    model = make()
    stock = model(input_ids=IDS, labels=LABELS, **arguments)
    fused = fuse(model)(input_ids=IDS, labels=LABELS, **arguments)
    assert (
        not calls
        and type(fused) is type(stock)
        and torch.equal(fused[0], stock[0])
        and torch.equal(fused[1], stock[1])
    )


def test_fp64_and_dropout_on_the_heads_adapter_go_to_the_stock_forward(calls: list) -> None:
    double = make(dtype=torch.float64)
    with pytest.raises(AssertionError, match="torch.float64"):
        fuse(double)
    assert "logits" in fuse(make()).double()(input_ids=IDS, labels=LABELS)
    assert "logits" in fuse(lora(make(), lora_dropout=0.1))(input_ids=IDS, labels=LABELS)
    assert not calls


def test_adapters_disabled_merged_and_several(calls: list) -> None:
    model = lora(make(tie_word_embeddings=False))
    stock = copy.deepcopy(model)
    fuse(model)

    def same() -> bool:
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=IDS, labels=LABELS).loss, stock(input_ids=IDS, labels=LABELS).loss
            )
        return len(calls) == 1 and not calls.clear()

    with model.disable_adapter(), stock.disable_adapter():
        assert same()
    for m in (model, stock):
        m.merge_adapter()
    assert same()
    for m in (model, stock):
        m.unmerge_adapter()
        m.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
        m.base_model.set_adapter(["default", "other"])
    assert not same()


class _Halved(transformers.LlamaForCausalLM):
    """Does something to its logits that no option describes."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
        logits = logits - logits.square() * 0.01
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_reasons(calls: list) -> None:
    """What the probe finds is stated, and nothing is installed."""
    models = {
        "has no fused form": _Halved(_config("llama")),
        "not transformers' ForCausalLMLoss": make(),
        "hook": make(),
        "forward was replaced": make(),
        "cannot be probed|does not call": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, d_model=64, d_ff=80, num_layers=1, num_heads=4)
        ),
    }
    models["not transformers' ForCausalLMLoss"].loss_function = _other_loss
    _hooked(models["hook"])
    models["forward was replaced"].forward = lambda **_: None
    for words, model in models.items():
        (found,) = surveyed(model, Loss())
        assert (
            found.row.got == "stock"
            and found.forward is None
            and any(w.strip() in found.row.reason for w in words.split("|"))
        ), found.row
        assert not installed(model, Loss())
    assert not surveyed(nn.Linear(3, 3), Loss())
    assert "excluded" in surveyed(make(), Loss(), exclude=["loss_function"])[0].row.reason


def test_the_probe_leaves_no_trace() -> None:
    model = make("gemma2")
    state, contents = torch.get_rng_state(), [set(module.__dict__) for module in model.modules()]
    surveyed(model, Loss())
    assert (
        torch.equal(torch.get_rng_state(), state)
        and [set(module.__dict__) for module in model.modules()] == contents
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how: str, calls: list) -> None:
    model = fuse(lora(make()))
    before, keys = run(model), model.state_dict().keys()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.clear()
    after = run(twin)
    assert (
        len(calls) == 1
        and all(torch.equal(after[name], before[name]) for name in before)
        and twin.state_dict().keys() == keys
    )


def test_removed_without_a_trace(calls: list) -> None:
    model = make()
    contents, before = [set(module.__dict__) for module in model.modules()], run(model)
    fuse(fuse(model))
    assert remove(model) and not remove(model)
    after = run(model)
    assert not calls and all(torch.equal(after[name], before[name]) for name in before)
    assert [set(module.__dict__) for module in model.modules()] == contents


@pytest.mark.any_isa
@pytest.mark.parametrize("kind", nightly(["llama", "gemma2"], quick=["gemma2"]))
def test_compiles_into_one_graph_and_never_again(kind: str) -> None:
    model = fuse(lora(make(kind)))
    eager = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.zero_grad(set_to_none=True)
            output = compiled(input_ids=IDS, labels=LABELS, use_cache=False)
        output.loss.backward()
        assert output.logits is None
        torch.testing.assert_close(output.loss.detach(), eager["loss"])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, eager[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, calls: list) -> None:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(model, use_cache=False)
    assert len(calls) == CALLS


def test_training_goes_as_with_the_stock_loss(calls: list) -> None:
    """Ten steps of AdamW from the same start."""
    curves = []
    for fused in (False, True):
        model = lora(make())
        if fused:
            fuse(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert len(calls) == 10 and curves[0][-1] < curves[0][0] * 0.9
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)


def test_a_head_replaced_after_patching_goes_to_the_stock_forward(calls: list) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make(tie_word_embeddings=False)
    stock = copy.deepcopy(model)
    fuse(model)
    for m in (model, stock):
        head = Doubled(64, 96, bias=False)
        head.weight = m.lm_head.weight
        m.lm_head = head
    got, expected = run(model), run(stock)
    assert not calls and all(torch.equal(got[name], expected[name]) for name in expected)


def test_trainable_tokens_of_a_tied_head_go_to_the_stock_forward(calls: list) -> None:
    model = lora(
        make(tie_word_embeddings=True),
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    (found,) = surveyed(model, Loss())
    assert found.forward is None and "head: base layer is peft" in found.row.reason
    before = run(model)
    assert not installed(model, Loss()) and torch.equal(run(model)["loss"], before["loss"]) and not calls


@pytest.mark.parametrize("head", ["4-bit", "adapter on 4-bit", "adapter on dense"])
def test_beside_patch(head: str, calls: list) -> None:
    """The layers patched too, and the head among them: the fused loss goes round its forward and agrees with
    it."""
    import peftkern

    from . import models

    model = models.llama()
    if "4-bit" in head:
        model.lm_head = models.linear_4bit(model.lm_head, torch.float32)
    targets = ["q_proj", "lm_head"] if "adapter" in head else ["q_proj"]
    model = models.lora(model, target_modules=targets).train()
    peftkern.patch(model)
    patched = run(model)
    fused = run(fuse(model))
    assert (
        len(calls) == 1 and ("lora_a" in calls[0]) == ("adapter" in head) and fused.keys() == patched.keys()
    )
    for name, value in fused.items():
        torch.testing.assert_close(value, patched[name], rtol=1e-4, atol=1e-6)
    peftkern.unpatch(model)
    assert "logits" in model(input_ids=IDS, labels=LABELS)
