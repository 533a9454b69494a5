"""Tiny models with a LoRA adapter that has moved, and a few examples for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peftkern[peft]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'peftkern[peft]'"
)

VOCABULARY = 48


def base(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Module:
    """A Llama of width 16 with two layers."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def lora(model: nn.Module, *, moved: bool = True, **options: Any) -> nn.Module:
    """The model with LoRA on every projection; with `moved` its B are no longer 0."""
    plain = dict(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, peft.LoraConfig(**plain | options), autocast_adapter_dtype=False)
    if moved:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batches(sizes: tuple[int, ...] = (2, 1, 2), *, length: int = 9, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of so many examples, the last of each with two positions of padding behind it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[-1, -2:], mask[-1, -2:] = -100, 0
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def one_by_one(made: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same examples in batches of one."""
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in made
        for i in range(len(batch["input_ids"]))
    ]
