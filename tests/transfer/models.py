"""Tiny random models for the tests of rates, unfreezing and cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

WORDS = 96


def llama(*, layers: int = 4, hidden: int = 32, tied: bool = False) -> nn.Module:
    """A Llama in fp32."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )


def bert(*, layers: int = 3) -> nn.Module:
    """A BERT classifier of three classes in fp32, without dropout."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """The model with LoRA on every linear layer; B is not zero, so that A has gradients."""
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options))
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
