"""Bits per byte of whole documents, and what the report says of the arms."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from peftkern.finetune.errors import InputError  # noqa: E402
from peftkern.transfer.pretraining import DocumentBits, PretrainingReport, document_bits  # noqa: E402
from tests.finetune.conftest import save_tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder
    ), transformers.AutoTokenizer.from_pretrained(folder)


def test_bits_are_the_definition_s(tiny) -> None:
    model, tokenizer = tiny
    texts = ["A first text.", "Zweiter: äöü."]
    found = document_bits(model, tokenizer, texts, window=64)
    for text, bits, size in zip(texts, found.bits, found.sizes, strict=True):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=1)
        wanted = -log_p.gather(1, ids[0, 1:, None]).sum().item() / math.log(2)
        assert bits == pytest.approx(wanted, rel=1e-5) and size == len(text.encode())
    assert found.per_byte.mean == pytest.approx(sum(found.bits) / sum(found.sizes))


def test_long_documents_are_read_to_their_end_once(tiny) -> None:
    model, tokenizer = tiny
    text = "abcdefghij" * 3
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    total = 0.0
    for begin in range(0, 30, 8):
        piece = ids[begin : begin + 9]
        with torch.no_grad():
            logits = model(input_ids=piece[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
    assert document_bits(model, tokenizer, [text], window=8).bits[0] == pytest.approx(
        total / math.log(2), rel=1e-5
    )


def test_interval_is_that_of_a_ratio() -> None:
    """Against the spread of the ratio over samples of documents."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> DocumentBits:
        sizes = torch.randint(50, 500, (40,), generator=generator)
        rates = 1.0 + 0.3 * torch.randn(40, generator=generator)
        return DocumentBits(tuple((sizes * rates).tolist()), tuple(sizes.tolist()))

    samples = [sample().per_byte for _ in range(300)]
    spread = torch.tensor([s.mean for s in samples]).std().item()
    assert torch.tensor([s.se for s in samples]).mean().item() == pytest.approx(spread, rel=0.12)
    covered = sum(s.low <= 1.0 <= s.high for s in samples) / 300
    assert 0.9 < covered < 0.985


def bits(rate: float, spread: float, seed: int) -> DocumentBits:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(100, 1000, (30,), generator=generator)
    own = torch.Generator().manual_seed(seed)
    rates = 1.5 + 0.4 * torch.randn(30, generator=generator) + rate + spread * torch.randn(30, generator=own)
    return DocumentBits(tuple((sizes * rates).tolist()), tuple(sizes.tolist()))


def test_verdict_separates_the_domain_from_training_on_any_text() -> None:
    base = bits(0.0, 0.0, 1)
    helped = PretrainingReport(
        {"before": base, "adapted": bits(-0.3, 0.02, 2), "control": bits(-0.02, 0.02, 3)}, 10
    )
    assert (
        helped.verdict.startswith("pretraining on the target helps")
        and "it is the target's text" in helped.verdict
    )
    any_text = PretrainingReport(
        {"before": base, "adapted": bits(-0.3, 0.02, 2), "control": bits(-0.3, 0.02, 3)}, 10
    )
    assert "as much may come from training on any text" in any_text.verdict
    noise = PretrainingReport({"before": base, "adapted": bits(0.0, 0.2, 2)}, 10)
    assert "cannot be told to help" in noise.verdict and "there was no control" in noise.verdict
    hurt = PretrainingReport({"before": base, "adapted": bits(0.3, 0.02, 2)}, 10)
    assert "hurts" in hurt.verdict and hurt.gain("adapted").mean == pytest.approx(-0.3, abs=0.02)
    assert helped.table().count("\n") == 4
    helped.draw(pytest.importorskip("matplotlib.figure").Figure().add_subplot())


def test_bad_input_is_named(tiny) -> None:
    model, tokenizer = tiny
    for texts, window, message in (
        ([], 8, "there are no texts"),
        (["good", ""], 8, "text 1 is empty"),
        (["good"], 1, "at least 2 tokens, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            document_bits(model, tokenizer, texts, window=window)
    with pytest.raises(ValueError, match="expected the same ones"):
        DocumentBits((1.0,), (2,)).minus(DocumentBits((1.0,), (3,)))
