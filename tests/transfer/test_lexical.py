"""Words, bytes and tokens of two texts against counts by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftkern.finetune.errors import InputError
from peftkern.transfer.lexical import bits_per_byte, fertility, lexicon, passages, surface


class _Bytes:
    """A tokenizer of one token a byte."""

    pad_token_id, eos_token_id = 0, 0

    def __call__(
        self,
        texts,
        *,
        max_length: int = 512,
        truncation: bool = False,
        return_tensors: str | None = None,
        **_: object,
    ):
        rows = [
            list(text.encode())[: max_length if truncation else None]
            for text in (
                [texts]
                if isinstance(
                    texts,
                    str,
                )
                else texts
            )
        ]
        return {"input_ids": torch.tensor(rows) if return_tensors else rows}

    def decode(self, ids: Tensor, **_: object) -> str:
        return bytes(ids.tolist()).decode(errors="ignore")


class _Guess(nn.Module):
    """Gives the next byte 1/2 if it is an 'a', and every other the same share of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((256,), math.log(0.5 / 255)))
        with torch.no_grad():
            self.logits[ord("a")] = math.log(0.5)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 256))


def test_bits_per_byte_counts_what_is_predicted() -> None:
    a, other = 1.0, math.log2(510)
    rate = bits_per_byte(_Guess(), ["baaa", "abab"], _Bytes())
    assert rate.value == pytest.approx((3 * a + a + 2 * other) / 6, rel=1e-6) and rate.texts == 2
    short = bits_per_byte(_Guess(), ["baaazzzz"], _Bytes(), max_length=4)
    assert short.value == pytest.approx(1.0, rel=1e-6) and short.se == math.inf


def test_the_standard_error_is_that_of_fresh_texts() -> None:
    rng = np.random.default_rng(0)

    def draw() -> list[str]:
        return [
            "".join(
                "a" if rng.random() < share else "b"
                for _ in range(
                    rng.integers(5, 40),
                )
            )
            for share in rng.random(40)
        ]

    rates = [bits_per_byte(_Guess(), draw(), _Bytes()) for _ in range(60)]
    assert 0.75 < np.mean([rate.se for rate in rates]) / np.std([rate.value for rate in rates]) < 1.33


def test_bits_per_byte_refuses_what_has_none() -> None:
    with pytest.raises(InputError, match="no texts"):
        bits_per_byte(_Guess(), [], _Bytes())
    with pytest.raises(InputError, match="one token each"):
        bits_per_byte(_Guess(), ["a"], _Bytes())


def test_words_in_common() -> None:
    source = ["the red fox sees red hens"] * 10
    same, none = lexicon(source, source), lexicon(source, ["blue whales swim along north coasts"] * 10)
    assert (
        same.overlap,
        same.within_overlap,
    ) == (1.0, 1.0) and same.divergence == pytest.approx(0, abs=1e-12)
    assert none.overlap == 0.0 and none.divergence == pytest.approx(1.0) and none.words == 30
    half = lexicon(source, ["the red fox sees red cats"] * 10)
    assert half.overlap == pytest.approx(
        3 / 4,
    )  # red, fox, sees of red, fox, sees, hens; "the" is a stop word
    assert half.divergence == pytest.approx(
        1 / 6,
    )  # a sixth of the words is of one side alone, the others agree
    with pytest.raises(InputError, match="only"):
        lexicon(["one two"], ["three"])


def test_passages_keep_their_text() -> None:
    texts = [" ".join(f"w{i}" for i in range(25)), "short one"]
    parts, owners = passages(texts, words=10)
    assert [len(part.split()) for part in parts] == [10, 10, 5, 2] and owners == [0, 0, 0, 1]
    assert " ".join(parts[:3]) == texts[0]
    assert [len(part.split()) for part in passages([texts[0]], words=18)[0]] == [18]  # 7 of 18 are left out
    few, owners = passages(texts, words=10, most=2, seed=1)
    assert len(few) == len(owners) == 2 and passages(texts, words=10, most=2, seed=1)[0] == few


def test_fertility_and_surface() -> None:
    rate = fertility(["ab cd", "efgh"], _Bytes())
    assert rate.value == pytest.approx(9 / 3)
    forms = surface(["Ab 1!", ""])
    np.testing.assert_allclose(forms[0], [math.log(6), math.log(3), 0.2, 0.2, 0.2, 0.2])
    assert forms[1].tolist() == [0.0] * 6
