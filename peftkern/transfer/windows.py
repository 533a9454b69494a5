"""Texts longer than a window, cut into pieces without losing a token.

The tokenizers' own overflow (`return_overflowing_tokens`) depends on their version: tokenizers 0.23.2 gave a
text of four windows as two, 0.23.3 as four. Here the tokens of the text are counted out, whatever the
version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ends", "windows"]


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that begin and that end every text.

    Raises: InputError where a text's own tokens do not stand in one piece between them.
    """
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        if own and whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    name = type(tokenizer).__name__
    raise InputError(f"{name} does not keep a text's tokens together between those that begin and end it")


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> Iterator[tuple[int, list[int], range]]:
    """Every window of at most `length` tokens: the text's number, the window's tokens with those that begin
    and end a text, and the places of the text's own. A text without tokens has no window.

    Raises: InputError where the window has no room for text.
    """
    begin, end = ends(tokenizer)
    room = length - len(begin) - len(end)
    if room < 1:
        raise InputError(f"a window of {length} tokens has no room for text: give a greater --seq-length")
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for number, ids in enumerate(rows):
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            yield number, [*begin, *piece, *end], range(len(begin), len(begin) + len(piece))
