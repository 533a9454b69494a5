"""Masks by seed, step and row; documents apart in a window; a masked run that is resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.masked import (  # noqa: E402
    DocumentCollator,
    MaskedPretrainingMixin,
    Masking,
    pack_documents,
    packed_as_alone,
)

CLS, SEP, PAD, MASK, WORDS = 1, 2, 0, 3, 60
MASKING = Masking(MASK, WORDS, (CLS, SEP, PAD, MASK))


class MaskedTrainer(MaskedPretrainingMixin, transformers.Trainer):
    pass


def encoder(kind: str = "Bert", *, attention: str = "sdpa", dropout: float = 0.1) -> nn.Module:
    options = dict(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=PAD,
    )
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.set_attn_implementation(attention)
    return model


def tokenizer() -> Any:
    """Words w4 ... w59, a text between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK} | {f"w{i}": i for i in range(4, WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="w4"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def texts(count: int, *, longest: int = 9, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (1,), generator=generator))
        made.append(
            " ".join(f"w{i}" for i in torch.randint(4, WORDS, (length,), generator=generator).tolist())
        )
    return made


def test_masks_have_the_stated_shares() -> None:
    ids = torch.randint(4, WORDS, (200, 100), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = CLS, SEP
    masked, labels = MASKING(ids, 7)
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    count = chosen.sum().item()
    assert count / (200 * 98) == pytest.approx(0.15, abs=0.01)
    became_mask, stayed = (masked == MASK)[chosen].float().mean(), (masked == ids)[chosen].float().mean()
    assert became_mask == pytest.approx(0.8, abs=0.02)
    # A random token is the old one in one of 60 draws.
    assert stayed == pytest.approx(0.1 + 0.1 / WORDS, abs=0.02)
    other = masked[chosen & (masked != MASK) & (masked != ids)]
    assert len(other.unique()) > 45


def test_masks_are_of_seed_step_and_row_alone() -> None:
    ids = torch.randint(4, WORDS, (6, 30))
    before = torch.get_rng_state()
    masked, labels = MASKING(ids, 3)
    assert torch.equal(torch.get_rng_state(), before)
    turned, turned_labels = MASKING(ids.flip(0), 3)
    assert torch.equal(turned.flip(0), masked) and torch.equal(turned_labels.flip(0), labels)
    assert not torch.equal(MASKING(ids, 4)[1], labels)
    assert not torch.equal(Masking(MASK, WORDS, (CLS, SEP, PAD, MASK), seed=1)(ids, 3)[1], labels)


def test_a_row_has_something_to_predict_and_padding_never_is() -> None:
    ids = torch.tensor([[CLS, 9, SEP, PAD, PAD]])
    for step in range(50):
        _, labels = MASKING(ids, step)
        assert (labels != -100).tolist() == [[False, True, False, False, False]]
    assert (MASKING(torch.tensor([[CLS, SEP]]), 0)[1] == -100).all()


def test_no_word_is_lost_and_windows_are_filled() -> None:
    data = pack_documents([*texts(30), " ".join(["w5"] * 50)], tokenizer(), 16)
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 16 for row in data)
    ids = [token for row in data for token in row["input_ids"]]
    assert ids.count(5) - sum(text.split().count("w5") for text in texts(30)) == 50
    assert ids.count(CLS) == ids.count(SEP) == sum(len(row["seq_lengths"]) for row in data)
    alone = pack_documents(texts(30), tokenizer(), 16, packed=False)
    assert len(alone) == 30 and max(len(row["seq_lengths"]) for row in alone) == 1 and len(data) < 25


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_a_window_are_those_of_its_documents_alone(attention: str) -> None:
    model = encoder(attention=attention, dropout=0.0).double()
    documents = [[CLS, 5, 6, 7, SEP], [CLS, 8, 9, SEP], [CLS, 10, 11, 12, 13, SEP]]
    collator = DocumentCollator(PAD, attention, torch.float64)
    rows = [
        {"input_ids": sum(documents[:2], []), "seq_lengths": [5, 4]},
        {"input_ids": documents[2], "seq_lengths": [6]},
    ]
    batch = collator(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 0, 0]]
    labels = torch.where(batch["input_ids"] > 3, batch["input_ids"], -100)
    grads = []
    for alone in (False, True):
        model.zero_grad()
        if alone:
            each = [torch.tensor([document]) for document in documents]
            logits = torch.cat([model(input_ids=ids).logits[0] for ids in each])
            wanted = torch.cat([torch.where(ids[0] > 3, ids[0], -100) for ids in each])
            nn.functional.cross_entropy(logits, wanted).backward()
        else:
            model(**batch, labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_models_that_see_a_window_otherwise_are_found_out() -> None:
    for attention in ("sdpa", "eager"):
        assert packed_as_alone(encoder(attention=attention), DocumentCollator(PAD, attention), 16)
    # RoBERTa's positions begin after the padding's.
    assert not packed_as_alone(encoder("Roberta"), DocumentCollator(PAD), 16)
    # The rounding of 16 bits is not taken for a neighbour's influence.
    options = dict(hidden_size=96, num_hidden_layers=6, num_attention_heads=12, intermediate_size=192)
    for kind in ("Bert", "Roberta"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=300, max_position_embeddings=80, **options)
        model = getattr(transformers, f"{kind}ForMaskedLM")(config).bfloat16()
        assert packed_as_alone(model, DocumentCollator(PAD), 78) == (kind == "Bert")
    with pytest.raises(InputError, match="load the model with sdpa"):
        DocumentCollator(PAD, "flash_attention_2")


def trainer(folder: Path, *, resume: str | None = None, **options: Any) -> MaskedTrainer:
    settings = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    made = MaskedTrainer(
        model=encoder(),
        args=transformers.TrainingArguments(**(settings | options)),
        train_dataset=pack_documents(texts(60), tokenizer(), 16),
        eval_dataset=pack_documents(texts(20, seed=1), tokenizer(), 16),
        data_collator=DocumentCollator(PAD),
    )
    made.masking = MASKING
    made.train(resume_from_checkpoint=resume)
    return made


def test_a_run_resumed_after_a_kill_is_the_unbroken_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    again = trainer(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    first = whole.evaluate()["eval_loss"]
    torch.manual_seed(123)
    assert whole.evaluate()["eval_loss"] == first  # the same masks each time


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    logged = trainer(tmp_path, gradient_accumulation_steps=3, max_steps=1).state.log_history[0]["loss"]
    assert 3 < logged < 9  # of a random model; the sum of three batches would be three times as much


def test_it_learns_what_it_reads(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    before = made.evaluate()["eval_loss"]
    longer = trainer(tmp_path / "longer", max_steps=60, save_strategy="no")
    # The words are drawn uniformly, of 56: there is nothing to learn but that.
    assert longer.evaluate()["eval_loss"] < min(before - 0.2, math.log(56) + 0.4)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no texts to train on"):
        pack_documents([], tokenizer(), 16)
    with pytest.raises(InputError, match="all 2 texts are empty"):
        pack_documents(["", ""], tokenizer(), 16)
    with pytest.raises(InputError, match="no room for text"):
        pack_documents(["w5"], tokenizer(), 2)
    with pytest.raises(InputError, match="must be between 0 and 1, got 0"):
        Masking(MASK, WORDS, (), rate=0)
    maskless = tokenizer()
    maskless.mask_token = None
    with pytest.raises(InputError, match="no mask token: masked pretraining needs an encoder"):
        Masking.of(maskless)
