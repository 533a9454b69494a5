"""A sample of what the model says, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .rows import decode_row
from .tokens import render

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .trainer import RecipeTrainer

__all__ = ["generate", "make_prompt"]

_WORDS = 12
_ROWS = 100  # held-out rows to look through for one that can be asked


def make_prompt(given: str | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int) -> str:
    """The text to continue: the one given, or how a row begins, up to where its last answer would stand.

    It is taken from the first row of which that part is not blank, is taken by the chat template and has at
    most `length` tokens; it is empty if there is none.
    """
    if given is not None:
        return given
    questions = (_question(decode_row(row), tokenizer) for row in rows.select(range(min(_ROWS, len(rows)))))
    return next(
        (text for text in questions if text.strip() and len(tokenizer(text)["input_ids"]) <= length), ""
    )


def _question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in row:
        return " ".join(row["text"].split()[:_WORDS])
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    turns = row["prompt"] if "prompt" in row else _before_last_answer(row["messages"])
    try:
        return render(row, tokenizer, turns, answer=True) if turns else ""
    except (
        Exception
    ):  # a template may raise anything, and not take the part of a conversation of which it took the whole
        return ""


def _before_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def generate(trainer: RecipeTrainer, prompt: str, tokens: int) -> str:
    """Greedy continuation of `prompt`, without it; empty where there is nothing to continue, or no token is
    asked for."""
    model, tokenizer = trainer.model, trainer.processing_class
    # A prompt that a chat template wrote begins with the token that the tokenizer would put before it once
    # more.
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not begun).to(model.device)
    if not tokens or not inputs["input_ids"].numel():
        return ""
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        output = trainer.within(
            lambda: model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
