"""Whether two texts share passages: source text that is also evaluated on would measure memory, not
knowledge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["PASSAGE_WORDS", "overlapping", "passages"]

PASSAGE_WORDS = 13  # GPT-3's and later contamination checks use as many


def passages(text: str) -> set[int]:
    """Hashes of every run of 13 words, without case or punctuation; of a shorter text the whole."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return set()
    last = max(1, len(words) - PASSAGE_WORDS + 1)
    return {hash(tuple(words[start : start + PASSAGE_WORDS])) for start in range(last)}


def overlapping(texts: Sequence[str], others: Iterable[str], *, share: float = 0.01) -> list[int]:
    """Which of `texts` have more than `share` of their passages in `others`."""
    known: set[int] = set().union(*(passages(other) for other in others))
    found = []
    for index, text in enumerate(texts):
        own = passages(text)
        if own and len(own & known) > share * len(own):
            found.append(index)
    return found
