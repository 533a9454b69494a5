"""A prefix inside the attention of many kinds of model: each against the base that reads the text itself, and
what is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.adapters.prefix import inside_attention, prefix_model
from peftkern.patching import attention

from .test_prefix import IDS, PADDED, TEXT, assert_same, config, dense, peft, results, transformers

SIZES = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DECODER = SIZES | dict(
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GEMMA = DECODER | dict(head_dim=16, sliding_window=64)
SHARED = dict(
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    vocab_size_per_layer_input=96,
    hidden_size_per_layer_input=8,
)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    first_k_dense_replace=4,
)
# By model type: absolute positions, norms on heads wider than hidden_size / heads, capped scores, windows,
# layers that share keys, sinks, latent attention whose values are narrower than its keys, one projection for
# all, positions counted by the mask, part of a head rotated.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": SIZES | dict(n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "qwen3": DECODER | dict(head_dim=32),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3n_text": (
        GEMMA
        | SHARED
        | dict(intermediate_size=[80] * 4, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)
    ),
    "gemma4_text": GEMMA | SHARED,
    "gpt_oss": GEMMA | dict(num_local_experts=2, num_experts_per_tok=1),
    "deepseek_v3": DECODER | LATENT,
    "phi3": DECODER,
    "opt": (
        SIZES
        | dict(
            hidden_size=64,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    ),
    "gptj": SIZES | dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
}
SHARING = ("gemma3n_text", "gemma4_text")


def build(kind: str, **options: Any) -> nn.Module:
    try:
        made = transformers.AutoConfig.for_model(kind, **(FAMILIES.get(kind, DECODER) | options))
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.1)  # transformers' 0.02 leaves a model this small all but linear
    return model.requires_grad_(False).eval()


def after_text(base: nn.Module, **inputs: Any) -> Tensor:
    return base(torch.cat([TEXT[None, :5].expand(2, -1), IDS], 1), **inputs).logits[:, 5:]


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_text_prefix_is_the_base_after_that_text(kind: str) -> None:
    base = build(kind)
    if not any(attention.surroundable(module) is None for module in base.modules()):
        pytest.skip(f"the attention of {kind} has no interface in this transformers")
    model = prefix_model(copy.deepcopy(base), config(), text=TEXT)
    torch.testing.assert_close(model(IDS).logits, after_text(base), rtol=1e-4, atol=1e-5)
    report = inside_attention(model)
    assert (len(report.layers), len(report.shared)) == (
        base.config.num_hidden_layers,
        2 if kind in SHARING else 0,
    )
    mask = torch.cat([torch.ones(2, 5, dtype=torch.long), PADDED], 1)
    seen, want = PADDED.bool(), after_text(base, attention_mask=mask)
    if kind == "opt":  # padding does not count, so that a padded row goes on where the text ended
        assert (model(IDS, attention_mask=PADDED).logits[seen] - want[seen]).abs().max() < 1e-4
    gated = prefix_model(copy.deepcopy(base), config(), text=TEXT, init="gate")
    assert torch.equal(gated(IDS, attention_mask=PADDED).logits, base(IDS, attention_mask=PADDED).logits)


@torch.no_grad()
def test_every_token_of_a_window_sees_the_prefix() -> None:
    """PEFT's forgets it: there a window counts the prefix, and the first tokens alone see it whole."""
    base = build("mistral", sliding_window=6)
    model = prefix_model(copy.deepcopy(base), config(), text=TEXT)
    own = torch.ones(17, 17, dtype=torch.bool).tril().triu(-5)
    own[:, :5] = torch.ones(17, 17, dtype=torch.bool).tril()[:, :5]
    mask = torch.zeros(2, 1, 17, 17).masked_fill(~own, torch.finfo(torch.float32).min)
    got = model(IDS).logits
    torch.testing.assert_close(got, after_text(base, attention_mask=mask), rtol=1e-4, atol=1e-5)
    stock = peft.get_peft_model(copy.deepcopy(base), config())
    stock.prompt_encoder["default"].load_state_dict(model.prompt_encoder["default"].state_dict())
    theirs = stock(input_ids=IDS).logits
    torch.testing.assert_close(theirs[:, 0], got[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs[:, -1], got[:, -1], atol=1e-2)


@torch.no_grad()
def test_packed_texts_each_see_the_prefix_and_themselves() -> None:
    model = prefix_model(dense(), config(), text=TEXT)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in (IDS[:1, :7], IDS[:1, 7:])]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_an_encoder_keeps_its_positions(kind: str) -> None:
    """RoBERTa counts from its padding index on, which no shift may touch."""
    sizes = dict(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
    )
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(
        kind.partition("For")[0].lower(),
        **sizes,
        max_position_embeddings=64,
    )
    base = getattr(transformers, kind)(made).eval()
    options = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    model = prefix_model(copy.deepcopy(base), options, init="random").eval()
    want, got = base(IDS, attention_mask=PADDED).logits, model(input_ids=IDS, attention_mask=PADDED).logits
    assert not torch.allclose(got, want, atol=1e-4)
    gated = prefix_model(copy.deepcopy(base), options, text=TEXT, init="gate").eval()
    assert torch.equal(gated(input_ids=IDS, attention_mask=PADDED).logits, want)
    gradients = torch.autograd.grad(got.sum(), model.prompt_encoder["default"].embedding.weight)
    assert gradients[0].abs().sum() > 0


def test_attention_in_fp32_on_cpus_without_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prefix_model(dense(dtype=torch.bfloat16), config(), text=TEXT)
    want = results(model)
    monkeypatch.setattr(attention, "slow_products", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr("peftkern.ops.attention.config.available", lambda: False)
    peftkern.patch(model, dense=True)
    assert any(
        isinstance(mode, attention.AttentionMode) and mode.slow
        for mode in model.base_model.model.layers[0].self_attn.forward.cache
    )
    assert_same(results(model), want, rtol=0.1, atol=0.03)


def test_autocast() -> None:
    model = prefix_model(dense(), config(), text=TEXT)
    want = results(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(model)
    assert_same([got[0].float(), *got[1:]], want, rtol=0.1, atol=0.03)
    assert got[-1].dtype == torch.float32


def test_the_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def train(folder: Path, resume: bool = False) -> Tensor:
        model = prefix_model(dense(), config(), text=TEXT, init="gate")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return torch.cat(
            [parameter.detach().flatten() for parameter in model.prompt_encoder["default"].parameters()]
        )

    whole = train(tmp_path)
    assert torch.equal(train(tmp_path, resume=True), whole)
    assert whole[-8:].abs().min() > 0  # the gate has learned


def test_what_is_refused() -> None:
    t5 = transformers.T5Config(
        vocab_size=96,
        d_model=64,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        d_kv=16,
        decoder_start_token_id=0,
    )
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        prefix_model(transformers.T5ForConditionalGeneration(t5), config(), init="random")
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    )
    with pytest.raises(ValueError, match="has no attention module that a prefix can be put into"):
        prefix_model(bloom, config(), init="random")
    with pytest.raises(ValueError, match="has 7 tokens, the prefix 9: give a longer text"):
        prefix_model(dense(), config(9), text=TEXT)
    with pytest.raises(ValueError, match="give one of the kind to adapt to"):
        prefix_model(dense(), config())
    with pytest.raises(ValueError, match="expected one of text, random, zero, gate"):
        prefix_model(dense(), config(), init="best")
    with pytest.raises(ValueError, match="a prefix_projection cannot be set"):
        prefix_model(dense(), config(prefix_projection=True, encoder_hidden_size=8), text=TEXT)
    with pytest.raises(ValueError, match="none of its adapters"):
        inside_attention(peft.get_peft_model(dense(), peft.LoraConfig(task_type="CAUSAL_LM")))
    other = prefix_model(dense(), config(), text=TEXT)
    other.base_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs the attention implementation 'sdpa' or 'eager'"):
        other(IDS)


def test_dropout_of_attention_goes_over_the_prefix_too() -> None:
    """By the model's own function on the prefix and the keys: with a probability of all but nothing, the
    values without it."""
    model = prefix_model(dense(), config(), text=TEXT)
    want = results(model)
    for layer in model.base_model.model.layers:
        layer.self_attn.attention_dropout = 1e-12
    assert_same(results(model.train()), want, rtol=1e-4, atol=1e-6)
    for layer in model.base_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert not torch.allclose(results(model)[0], want[0], atol=1e-2)


def test_replicas_are_refused() -> None:
    model = prefix_model(dense(), config(), text=TEXT)
    (hook,) = model.base_model.model._forward_pre_hooks.values()
    with pytest.raises(RuntimeError, match="does not work in replicas"):
        hook(copy.copy(model.base_model.model), (), {})


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_layers_under_checkpointing(reentrant: bool) -> None:
    model = prefix_model(dense(), config(), text=TEXT).train()
    want = results(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch._dynamo.reset()
    for layer in model.base_model.model.layers:
        layer.self_attn.compile(backend="aot_eager")
    assert_same(results(model, use_cache=False), want, rtol=1e-4, atol=1e-6)
