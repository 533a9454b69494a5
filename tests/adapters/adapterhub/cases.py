"""The tiny models of the recorded AdapterHub adapters: weights by a formula, so that two versions of
transformers have the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

__all__ = ["CASES", "IDS", "SOURCE", "build", "output"]

SOURCE = Path(__file__).parent / "recorded"
SIZE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SIZE | {"pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZE | {"num_key_value_heads": 1, "pad_token_id": 0}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
CASES = [(model, config) for model in MODELS for config in ("double_seq_bn", "seq_bn", "par_bn")]
IDS = torch.arange(1, 21).view(2, 10)


def build(name: str) -> nn.Module:
    """In fp64 and evaluation mode."""
    kind, config, options = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).double().eval()
    fill(model.named_parameters(), 0.2)
    return model


@torch.no_grad()
def fill(named: Any, scale: float) -> None:
    """Values that depend on a parameter's name and size alone."""
    for name, parameter in named:
        phase = sum((i + 1) * ord(letter) for i, letter in enumerate(name))
        values = (
            torch.sin(torch.arange(1, parameter.numel() + 1, dtype=torch.float64) * 12.9898 + phase) * scale
        )
        parameter.copy_(values.view(parameter.shape) + (1.0 if name.endswith("norm.weight") else 0.0))


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """Logits, or an encoder's last hidden state."""
    result = model(input_ids=IDS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state
