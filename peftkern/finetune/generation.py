"""A sample of what the model says, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .trainer import RecipeTrainer

__all__ = ["generate", "make_prompt"]

_WORDS = 12


def make_prompt(given: str | None, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text to continue: the one given, or how a held-out row begins, up to where its answer would stand."""
    if given is not None:
        return given
    if "text" in row:
        return " ".join(row["text"].split()[:_WORDS])
    question = row["prompt"] if "prompt" in row else [turn for turn in row["messages"] if turn["role"] != "assistant"]
    if isinstance(question, str):
        return question
    return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)


def generate(trainer: RecipeTrainer, prompt: str, tokens: int) -> str:
    """Greedy continuation of `prompt`, without it."""
    model, tokenizer = trainer.model, trainer.processing_class
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
