"""Continued pretraining, measured: bits per byte of whole held-out documents, beside a control on text of
another kind.

A model adapted to its target's text (DAPT) is to be compared with itself before, and with itself after as
many steps on text that has nothing to do with the target (the control of Gururangan et al., 2020): what both
gain is not the domain's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .intervals import Interval

__all__ = ["MASKED_BITS", "DocumentBits", "PretrainingReport", "document_bits"]

BASE, ADAPTED, CONTROL = "before", "adapted", "control"
BITS, MASKED_BITS = "bits per byte", "masked bits per byte"


@dataclass(frozen=True)
class DocumentBits:
    """What each document costs a model, in bits, and how long it is, in bytes of UTF-8."""

    bits: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def per_byte(self) -> Interval:
        """Bits per byte of all documents together, its standard error over documents (delta method)."""
        return _ratio(self.bits, self.sizes)

    def minus(self, other: DocumentBits) -> Interval:
        """The paired difference in bits per byte on the same documents; below 0 where this model is the
        better one.
        """
        if self.sizes != other.sizes:
            raise ValueError("other: got other documents, expected the same ones: the difference is paired")
        return _ratio([ours - theirs for ours, theirs in zip(self.bits, other.bits, strict=True)], self.sizes)


def _ratio(amounts: Sequence[float], sizes: Sequence[int], level: float = 0.95) -> Interval:
    """sum(amounts) / sum(sizes) with Student's interval of the delta method."""
    from scipy.stats import t

    total, n = sum(sizes), len(sizes)
    value = sum(amounts) / total
    if n < 2:
        return Interval(value, math.inf, -math.inf, math.inf, n)
    spread = sum((amount - value * size) ** 2 for amount, size in zip(amounts, sizes, strict=True))
    se = (n / (n - 1) * spread) ** 0.5 / total
    half = float(t.ppf(0.5 + level / 2, n - 1)) * se
    return Interval(value, se, value - half, value + half, n)


def document_bits(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 512,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    progress: bool = False,
) -> DocumentBits:
    """The bits of each text, all of it, by a causal language model; comparable between models and between
    tokenizers.

    A text is preceded by the token that begins a sequence, or that ends one, so that its first token is
    predicted as well and its bits are of all its bytes. Long ones are read in windows of `window` tokens,
    each after the last token of the one before. Nothing of one text is seen with another.

    Raises: InputError where there is no text, an empty one, or a tokenizer with neither of these tokens.
    """
    from tqdm import tqdm

    if len(texts) == 0:
        raise InputError("there are no texts to measure: give at least one")
    if window < 2:
        raise InputError(f"a window must have at least 2 tokens, got {window}")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InputError("the tokenizer has neither a token that begins a text nor one that ends it: set one")
    device, training = next(model.parameters()).device, model.training
    bits, sizes = [], []
    model.eval()
    try:
        for number, text in enumerate(tqdm(texts, desc="bits per byte", unit="text", disable=not progress)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(f"text {number} is empty: leave it out")
            with torch.no_grad(), autocast():
                bits.append(_nats(model, torch.tensor([start, *ids], device=device), window) / math.log(2))
            sizes.append(len(text.encode()))
    finally:
        model.train(training)
    return DocumentBits(tuple(bits), tuple(sizes))


def _nats(model: nn.Module, ids: Tensor, window: int) -> float:
    """Of ids [n + 1], all but the first predicted once."""
    total = 0.0
    for begin in range(0, len(ids) - 1, window):
        piece = ids[begin : begin + window + 1]
        logits = model(input_ids=piece[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits.float(), piece[1:], reduction="sum"))
    return total


@dataclass(frozen=True)
class PretrainingReport:
    """Held-out target documents under the model before, after pretraining on the target, and after that on
    other text; `measure` in words. With a `new_head` the model before had none, and says nothing of what it
    knew.
    """

    arms: Mapping[str, DocumentBits]
    steps: int
    measure: str = BITS
    new_head: bool = False

    def gain(self, arm: str) -> Interval:
        """Bits per byte that an arm saves over the model before; above 0: it is better."""
        difference = self.arms[BASE].minus(self.arms[arm])
        return difference

    @property
    def verdict(self) -> str:
        """In words, by the paired intervals."""
        adapted = self.gain(ADAPTED)
        words = {1: "helps", 0: "cannot be told to help", -1: "hurts"}[adapted.sign]
        said = f"pretraining on the target {words} ({_signed(adapted)} {self.measure} saved)"
        if self.new_head:
            said = (
                f"the masked head is new, and all that it learns counts ({_signed(adapted)} {self.measure} "
                "saved)"
            )
        if CONTROL not in self.arms:
            return said + "; there was no control"
        over = self.arms[CONTROL].minus(self.arms[ADAPTED])
        which = {
            1: "it is the target's text that does it",
            0: "as much may come from training on any text",
            -1: "other text serves the target better",
        }[over.sign]
        control = _signed(self.gain(CONTROL))
        return f"{said}; {which} (over the control: {_signed(over)}; the control: {control})"

    def table(self) -> str:
        """Markdown, one row an arm."""
        lines = [f"| model | {self.measure} | s.e. | saved over before, paired |", "|---|---|---|---|"]
        for name, arm in self.arms.items():
            saved = "" if name == BASE else _signed(self.gain(name))
            lines.append(f"| {name} | {arm.per_byte.mean:.4f} | {arm.per_byte.se:.4f} | {saved} |")
        return "\n".join(lines)

    def draw(self, axes: Any) -> None:
        """What each arm saves, with its paired interval."""
        names = [name for name in self.arms if name != BASE]
        gains = [self.gain(name) for name in names]
        errors = [[g.mean - g.low for g in gains], [g.high - g.mean for g in gains]]
        axes.bar(names, [g.mean for g in gains], yerr=errors, capsize=4, color=["C0", "0.6"][: len(names)])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylabel=f"{self.measure} saved over before", title=self.verdict.split(" (")[0])


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
