"""What whole documents cost a masked language model: masked bits per byte, and pseudo-perplexity, its limit
of one mask at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .alignment import step_seed
from .pretraining import DocumentBits
from .windows import windows

__all__ = ["masked_document_bits"]


def masked_document_bits(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 512,
    rate: float | None = 0.15,
    seed: int = 0,
    batch_size: int = 8,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    progress: bool = False,
) -> DocumentBits:
    """The bits of each text by a masked language model, every token of it predicted once.

    The tokens of a window are divided into groups of the part `rate`; each group is masked in a pass of its
    own, and predicted from all others. With `rate` None it is one token a pass: the pseudo-log-likelihood of
    Salazar et al. (2020, Masked Language Model Scoring, section 2), whose exponential is the
    pseudo-perplexity. Neither is a code's length, since every token helps to predict the others: compare
    models of one tokenizer by it, and nothing with the bits per byte of a causal model. The division is a
    pure function of seed and window; long texts are cut into windows with the tokens that begin and end a
    text.

    Raises: InputError where there is no text, an empty one, no mask token, or a window without room.
    """
    from tqdm import tqdm

    if len(texts) == 0:
        raise InputError("there are no texts to measure: give at least one")
    if tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token: masked bits are of encoders")
    if rate is not None and not 0 < rate < 1:
        raise InputError(f"the part of the tokens to mask must be between 0 and 1, got {rate}")
    training, bits = model.training, []
    model.eval()
    try:
        for number, text in enumerate(tqdm(texts, desc="masked bits", unit="text", disable=not progress)):
            pieces = list(_pieces(tokenizer, text, window))
            if not pieces:
                raise InputError(f"text {number} is empty: leave it out")
            with torch.no_grad(), autocast():
                batches = (
                    _batches(*piece, tokenizer.mask_token_id, rate, seed, batch_size) for piece in pieces
                )
                nats = sum(_nats(model, *batch) for of_piece in batches for batch in of_piece)
            bits.append(nats / math.log(2))
    finally:
        model.train(training)
    return DocumentBits(tuple(bits), tuple(len(text.encode()) for text in texts))


def _pieces(tokenizer: Any, text: str, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [S] of each window, and the places [n] of those that are the text's own."""
    for _, ids, places in windows(tokenizer, [text], window):
        yield torch.tensor(ids), torch.tensor(places)


def _batches(
    ids: Tensor, places: Tensor, mask_id: int, rate: float | None, seed: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Masked ids [b, S] and labels [b, S], -100 but where a row is masked; each place in one row."""
    generator = torch.Generator().manual_seed(step_seed(seed, *ids.tolist()))
    group = 1 if rate is None else max(1, round(rate * len(places)))
    rows = places[torch.randperm(len(places), generator=generator)].split(group)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        chosen = torch.zeros(len(some), len(ids), dtype=torch.bool)
        for row, hidden in enumerate(some):
            chosen[row, hidden] = True
        several = ids.expand(len(some), -1)
        yield several.masked_fill(chosen, mask_id), several.masked_fill(~chosen, -100)


def _nats(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids, device=device)).logits
    chosen = (labels != -100).to(device)
    predicted = logits[chosen].to(torch.promote_types(logits.dtype, torch.float32))
    return float(F.cross_entropy(predicted, labels.to(device)[chosen], reduction="sum"))
