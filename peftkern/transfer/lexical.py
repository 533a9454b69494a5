"""How two sets of texts differ as text: their words, how a tokenizer cuts them, and what a language model
makes of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["Lexicon", "TextRate", "bits_per_byte", "fertility", "lexicon", "passages", "surface"]

_WORD = re.compile(r"\w+")
_TOP = 10_000


@dataclass(frozen=True)
class TextRate:
    """A ratio over texts, bits a byte say, with its standard error over the texts."""

    value: float
    se: float
    texts: int


@dataclass(frozen=True)
class Lexicon:
    """Of two texts: the share of their most frequent words that is common, and the Jensen-Shannon divergence
    of their words, in bits.

    `within_overlap`, `within_divergence`: the same between halves of the first text, of as many words: what
    two samples of one source have. Both depend on the number of `words`.
    """

    overlap: float
    divergence: float
    within_overlap: float
    within_divergence: float
    words: int


def passages(
    texts: Sequence[str],
    *,
    words: int = 60,
    most: int | None = None,
    seed: int = 0,
) -> tuple[list[str], list[int]]:
    """Cut texts into passages of `words` words; returns them with the index of the text each is from, `most`
    of them drawn at random.

    A remainder shorter than half a passage is left out, unless it is all there is of a text.
    """
    found: list[tuple[str, int]] = []
    for index, text in enumerate(texts):
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        bounds = [*starts[::words], len(text)]
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if number == 0 or len(starts) - number * words >= words / 2:
                found.append((text[start:end].strip(), index))
    if most is not None and len(found) > most:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:most].sort().values
        found = [found[i] for i in order.tolist()]
    return [text for text, _ in found], [index for _, index in found]


def lexicon(source: Sequence[str], target: Sequence[str], *, top: int = _TOP, seed: int = 0) -> Lexicon:
    """Overlap of the `top` most frequent words without stop words (Gururangan et al., 2020, section 3.1) and
    divergence of all words.

    Texts are drawn at random until all sides have as many words as the shortest, half of the source at most.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    ours, theirs = _shuffled(source, seed), _shuffled(target, seed + 1)
    halves = _words(ours[::2]), _words(ours[1::2])
    other = _words(theirs)
    size = min(len(halves[0]), len(halves[1]), len(other))
    if size < 10:
        raise InputError(
            f"there are only {size} words to compare: give more text, in at least two documents a side"
        )
    first, second, third = (Counter(side[:size]) for side in (*halves, other))
    stop = ENGLISH_STOP_WORDS
    return Lexicon(
        _overlap(first, third, stop, top),
        _divergence(first, third),
        _overlap(first, second, stop, top),
        _divergence(first, second),
        size,
    )


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[index] for index in order]


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in _WORD.findall(text.lower())]


def _overlap(first: Counter[str], second: Counter[str], stop: frozenset[str], top: int) -> float:
    ranked = [
        [
            word
            for word, _ in sorted(
                c.items(),
                key=lambda item: (-item[1], item[0]),
            )
            if word not in stop
        ]
        for c in (first, second)
    ]
    count = min(top, *map(len, ranked))
    return len(set(ranked[0][:count]) & set(ranked[1][:count])) / max(count, 1)


def _divergence(first: Counter[str], second: Counter[str]) -> float:
    from scipy.spatial.distance import jensenshannon

    names = sorted({*first, *second})
    return float(
        jensenshannon([first[name] for name in names], [second[name] for name in names], base=2) ** 2,
    )


def fertility(texts: Sequence[str], tokenizer: Any) -> TextRate:
    """Tokens a word: how finely a tokenizer cuts these texts."""
    tokens = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return _rate([len(ids) for ids in tokens], [len(text.split()) for text in texts])


def surface(texts: Sequence[str]) -> Any:
    """[n, 6] of lengths and shares of kinds of characters: what differs between texts that differ in form
    alone.
    """
    import numpy as np

    def share(text: str, of: Any) -> float:
        return sum(map(of, text)) / max(len(text), 1)

    return np.array(
        [
            [
                math.log1p(len(text)),
                math.log1p(len(text.split())),
                share(text, str.isupper),
                share(text, str.isdigit),
                share(text, str.isspace),
                share(text, lambda c: not (c.isalnum() or c.isspace())),
            ]
            for text in texts
        ]
    )


def bits_per_byte(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int = 256,
    progress: bool = False,
) -> TextRate:
    """A causal language model's bits for a byte of these texts, the first `max_length` tokens of each;
    comparable between tokenizers.

    The first token, which nothing precedes, is not counted, nor are its bytes. The standard error is that of
    the ratio over texts.
    """
    from tqdm import tqdm

    if len(texts) == 0:
        raise InputError("there are no texts to measure: give at least one")
    device, training = next(model.parameters()).device, model.training
    bits, sizes = [], []
    model.eval()
    try:
        with torch.no_grad():
            for text in tqdm(texts, desc="bits per byte", unit="text", disable=not progress):
                ids = tokenizer(
                    text,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                )["input_ids"].to(
                    device,
                )
                if ids.shape[1] > 1:
                    bits.append(_nats(model, ids) / math.log(2))
                    sizes.append(len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode()))
    finally:
        model.train(training)
    if not sizes or sum(sizes) == 0:
        raise InputError("the texts are of one token each: bits per byte needs longer ones")
    return _rate(bits, sizes)


def _nats(model: nn.Module, ids: Tensor) -> float:
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def _rate(amounts: Sequence[float], sizes: Sequence[float]) -> TextRate:
    """sum(amounts) / sum(sizes); the standard error by the delta method."""
    total, n = sum(sizes), len(sizes)
    if total == 0:
        raise InputError("the texts are empty: give texts of words")
    value = sum(amounts) / total
    spread = sum((amount - value * size) ** 2 for amount, size in zip(amounts, sizes, strict=True))
    return TextRate(value, (n / (n - 1) * spread) ** 0.5 / total if n > 1 else math.inf, n)
