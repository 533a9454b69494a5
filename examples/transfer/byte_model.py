"""A small language model of bytes whose source loss is near a minimum: a Llama of 94,000 weights, trained on
Python's reference prose.

Trained once, within a minute or two on a free core, and kept in the cache folder; an interrupted training
goes on where it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.files import cache_dir

__all__ = ["byte_model", "byte_windows", "new_byte_model"]

VOCABULARY, LENGTH, BATCH, STEPS, RATE = 128, 64, 16, 900, 4e-3


def byte_windows(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """The texts' ASCII codes one after the other, in windows [n, length]; other characters become code
    127."""
    codes = [min(ord(character), VOCABULARY - 1) for text in texts for character in text + "\n"]
    return torch.tensor(codes[: len(codes) // length * length]).view(-1, length)


def new_byte_model(seed: int, *, layers: int = 2, tied: bool = True) -> Any:
    """A Llama of bytes that has learned nothing yet; `tied`: its head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def byte_model(windows: Tensor, *, seconds: float = 1e9) -> Any:
    """The model trained on `windows`; None where that takes more than so many `seconds`: call again to go
    on."""
    model = new_byte_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    path, first = cache_dir() / "byte-model.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    reached = _train(model, optimizer, windows, first, seconds)
    if reached > first:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": reached}, path)
    return model if reached == STEPS else None


def _train(model: Any, optimizer: torch.optim.Optimizer, windows: Tensor, first: int, seconds: float) -> int:
    """Train from step `first`, as long as there is time; the step that was reached."""
    begin = time.perf_counter()
    for step in range(first, STEPS):
        if time.perf_counter() - begin > seconds:
            return step
        rows = torch.randint(len(windows), (BATCH,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        loss = model(input_ids=windows[rows], labels=windows[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"byte model: step {step}, {loss.item():.3f} nats a byte", file=sys.stderr, flush=True)
    return STEPS
