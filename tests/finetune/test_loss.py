"""The recipe's loss and perplexities against what the model itself gives, whatever it does to its logits or
adds to its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peftkern import functional
from peftkern.finetune import FinetuneConfig, InputError, finetune

from .conftest import write_jsonl

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=0,
    pad_token_id=0,
    bos_token_id=None,
    tie_word_embeddings=False,
)
EXPERTS = dict(router_aux_loss_coef=0.5, num_experts_per_tok=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16, attn_layer_indices=[1])
GRIFFIN = dict(lru_width=64, logits_soft_cap=2.0, block_types=["recurrent", "attention"])
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": dict(final_logit_softcapping=2.0, head_dim=16),
    "RecurrentGemma": GRIFFIN,
    "Bamba": dict(**MAMBA, z_loss_coefficient=0.05),
    "Mixtral": dict(**EXPERTS, num_local_experts=4),
    "Qwen3Moe": dict(**EXPERTS, num_experts=4, moe_intermediate_size=64, head_dim=16),
}
FUSED = {"Llama", "Gemma2", "RecurrentGemma", "Mixtral", "Qwen3Moe"}
TEXT = "all rows are alike"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of the fused loss."""
    seen, original = [], functional.linear_cross_entropy
    monkeypatch.setattr(
        functional, "linear_cross_entropy", lambda x, *a, **k: (seen.append(len(x)), original(x, *a, **k))[1]
    )
    return seen


def save(name: str, tiny_model: str, folder: Path, **options: Any) -> torch.nn.Module:
    """A random model with the tokenizer of the tiny one; its words are not all equally likely."""
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS.get(name, {}) | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.save_pretrained(folder)
    return model


def run(options: dict[str, Any], folder: Path, data: str, **changes: Any) -> Any:
    small = dict(model=str(folder), data=data, quantization="none", steps=1, packing=False, sample_tokens=1)
    return finetune(FinetuneConfig(**(options | small | changes)), quiet=True)


def tokens(folder: Path, text: str = TEXT) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


@pytest.mark.parametrize("name", MODELS)
def test_first_loss_and_perplexity_are_the_models_own(
    name: str, tiny_model: str, options: dict[str, Any], tmp_path: Path, calls: list[int]
) -> None:
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    model = save(name, tiny_model, tmp_path / "model")
    ids = tokens(tmp_path / "model")
    router = {"output_router_logits": True} if "num_experts_per_tok" in MODELS[name] else {}
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        loss = model.train()(input_ids=ids, labels=ids, **router).loss.item()
    result = run(options, tmp_path / "model", write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 8))
    expected = F.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).item()
    assert math.log(result.perplexity_before["held-out"]) == pytest.approx(expected, rel=1e-5)
    assert result.final_loss == pytest.approx(loss, rel=1e-5)
    assert bool(calls) == (name in FUSED)


def test_the_routers_loss_is_a_mean_over_the_batches_of_a_step(
    tiny_model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = save("Mixtral", tiny_model, tmp_path / "model").train()
    texts = ["a", "some more of it", "and then a row of a good length"]
    batches = [tokens(tmp_path / "model", text) for text in texts]
    with torch.no_grad():
        outputs = [model(input_ids=ids, output_router_logits=True) for ids in batches]
    nll = sum(
        F.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum")
        for output, ids in zip(outputs, batches, strict=True)
    ) / sum(ids.shape[1] - 1 for ids in batches)
    expected = nll + 0.5 * sum(output.aux_loss for output in outputs) / len(batches)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    result = run(options, tmp_path / "model", rows, eval_data=(rows,), batch_size=1, grad_accumulation=3)
    assert result.final_loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "stock"])
@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("lm_head",)], ids=" ".join)
def test_an_adapter_on_the_head_is_trained(
    targets: tuple[str, ...],
    dropout: float,
    tiny_model: str,
    options: dict[str, Any],
    tmp_path: Path,
    calls: list[int],
) -> None:
    """By the fused loss, in training only where no dropout stands in its way; the adapter that is saved gives
    what was reported."""
    from peft import PeftModel

    model = save("Llama", tiny_model, tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 8)
    result = run(options, tmp_path / "model", rows, steps=6, warmup=0.0, targets=targets, dropout=dropout)
    assert len(calls) == (2 if dropout else 8), "one a step, and two evaluations of the one held-out row"
    adapted = PeftModel.from_pretrained(model, options["output"]).eval()
    assert all(
        any(target in name and value.any() for name, value in adapted.named_parameters() if "lora_B" in name)
        for target in targets
    )
    ids = tokens(tmp_path / "model")
    with torch.no_grad():
        loss = adapted(input_ids=ids, labels=ids).loss.item()
    assert math.log(result.perplexity_after["held-out"]) == pytest.approx(loss, rel=1e-4)
    assert result.perplexity_after["held-out"] < result.perplexity_before["held-out"]


def test_a_bidirectional_encoder_is_refused(tiny_model: str, options: dict[str, Any], tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {
        name: SIZES[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    config = transformers.RobertaConfig(**sizes, pad_token_id=1, initializer_range=0.1)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 8)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(
            InputError, match=f"--model {tmp_path / 'model'}: RobertaForCausalLM is no causal language model"
        ):
            run(options, tmp_path / "model", rows, dtype=dtype)
    assert not (Path(options["output"]) / "run.json").exists()


def test_a_run_that_diverges_says_so_and_keeps_the_last_good_checkpoint(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of the fourth step makes the weights infinite; its own loss and the steps before it are
    finite."""
    from peftkern.finetune.trainer import RecipeTrainer

    original = RecipeTrainer.training_step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 3:
            next(p for p in self.model.parameters() if p.requires_grad).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", poisoned)
    with pytest.raises(
        InputError, match=r"NaN or infinite at step 4: .* lower --lr \(now 0.005\).* kept: .*checkpoint-2 "
    ):
        finetune(FinetuneConfig(**options | {"steps": 4}), quiet=True)
    output = Path(options["output"])
    assert [path.name for path in output.glob("**/checkpoint-*")] == ["checkpoint-2"] and not (
        output / "result.json"
    ).exists()
    losses = [
        json.loads(line)["loss"] for line in next(output.glob("**/metrics.jsonl")).read_text().splitlines()
    ]
    assert len(losses) >= 3 and all(map(math.isfinite, losses))


def test_a_perplexity_of_nothing_or_of_no_number_is_an_error(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.finetune import trainer

    for value, words in (
        (math.nan, "is nan before training: choose another --dtype"),
        (1e9, "before training"),
    ):
        monkeypatch.setattr(trainer, "summed_nll", lambda *_, value=value: torch.tensor(value))
        with pytest.raises(InputError, match=words):
            finetune(FinetuneConfig(**options), quiet=True)
    original = trainer.RecipeTrainer.get_eval_dataloader

    def unlabelled(self: Any, name: str) -> list[dict[str, torch.Tensor]]:
        batches = list(original(self, name))
        for batch in batches:
            batch["labels"].fill_(-100)
        return batches

    monkeypatch.setattr(trainer, "summed_nll", lambda *_: torch.tensor(0.0))
    monkeypatch.setattr(trainer.RecipeTrainer, "get_eval_dataloader", unlabelled)
    with pytest.raises(InputError, match="'held-out' has no token to predict within --seq-length 64"):
        finetune(FinetuneConfig(**options), quiet=True)
