"""No token of a text is lost where it is cut into windows."""

from __future__ import annotations

import pytest

from peftkern.finetune.errors import InputError
from peftkern.transfer.windows import ends, windows

from .test_masked import CLS, SEP, tokenizer

WORDS = [f"w{number}" for number in range(1, 60)]


def test_the_tokens_that_begin_and_end_a_text() -> None:
    assert ends(tokenizer()) == ([CLS], [SEP])


@pytest.mark.parametrize("length", [3, 4, 16, 200])
def test_every_token_has_one_place(length: int) -> None:
    texts = [" ".join(WORDS[:50]), "", "w1", " ".join(WORDS[:14])]
    own = tokenizer()(texts, add_special_tokens=False)["input_ids"]
    found: list[list[int]] = [[] for _ in texts]
    for number, ids, places in windows(tokenizer(), texts, length):
        assert len(ids) <= length and ids[0] == CLS and ids[-1] == SEP and len(places) == len(ids) - 2
        found[number] += [ids[place] for place in places]
    assert found == own


def test_no_room() -> None:
    with pytest.raises(InputError, match="no room for text"):
        list(windows(tokenizer(), ["w1"], 2))
