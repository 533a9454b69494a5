"""Tiny models with two adapters of every kind of LoRA, their weights random, saved as PEFT saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(1))


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
        pad_token_id=0,
    )
    return _spread(transformers.LlamaForCausalLM(config).eval())


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _spread(transformers.GPT2LMHeadModel(config).eval())


class Convolutions(nn.Module):
    """Two convolutions and a linear, for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def _spread(model: nn.Module) -> nn.Module:
    """transformers' 0.02 leaves a model this small all but linear."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wte" not in name and "embed" not in name:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


class Kind(NamedTuple):
    """A base, and the configurations of two adapters on it."""

    base: Callable[[], nn.Module]
    one: dict[str, Any]
    other: dict[str, Any]


ATTENTION = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 20}}
KINDS = {
    "lora": Kind(
        llama,
        {"r": 4, "target_modules": ATTENTION},
        {"r": 3, "lora_alpha": 9, "target_modules": ["v_proj", "down_proj"]},
    ),
    "rslora": Kind(
        llama,
        {"target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": "all-linear"},
    ),
    "patterns": Kind(
        llama,
        {"target_modules": ATTENTION} | PATTERNS,
        {"target_modules": ATTENTION, "use_rslora": True},
    ),
    "lora_bias": Kind(
        llama,
        {"target_modules": ATTENTION, "lora_bias": True},
        {"r": 3, "target_modules": ATTENTION},
    ),
    "lora_biases": Kind(
        llama,
        {"target_modules": ATTENTION, "lora_bias": True},
        {"r": 3, "target_modules": ["k_proj", "v_proj"], "lora_bias": True},
    ),
    "regex": Kind(
        llama,
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ATTENTION, "layers_to_transform": [0]},
    ),
    "conv1d": Kind(
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "embeddings": Kind(
        llama,
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"r": 3, "target_modules": ["embed_tokens"]},
    ),
    "conv2d": Kind(
        convolutions,
        {"target_modules": ["first", "second", "head"]},
        {"r": 3, "target_modules": ["first", "head"]},
    ),
}
REPLACING = {
    "modules_to_save": Kind(
        llama,
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION},
    ),
    "bias": Kind(
        llama,
        {"target_modules": ATTENTION, "bias": "lora_only"},
        {"target_modules": ATTENTION, "bias": "lora_only"},
    ),
}


def adapted(kind: Kind, config: dict[str, Any], seed: int) -> nn.Module:
    """A PEFT model on the kind's base, each of its adapter's tensors random."""
    language = kind.base is not convolutions
    options = {"r": 4, "lora_alpha": 8} | config | ({"task_type": "CAUSAL_LM"} if language else {})
    model = peft.get_peft_model(kind.base(), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            magnitude = "magnitude" in name
            parameter.data = (
                parameter.data * (1 + 0.2 * noise) if magnitude else parameter.data + 0.15 * noise
            )
    return model


def saved(kind: Kind, folder: Path) -> tuple[Path, Path]:
    """The folders of the kind's two adapters."""
    for name, config, seed in (("a", kind.one, 3), ("b", kind.other, 4)):
        adapted(kind, config, seed).save_pretrained(folder / name)
    return folder / "a", folder / "b"


def output(model: nn.Module) -> Tensor:
    """What the model computes for a fixed input."""
    with torch.no_grad():
        if any(isinstance(module, Convolutions) for module in model.modules()):
            return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)))
        return model(input_ids=IDS).logits


def loaded(kind: Kind, folder: Path) -> nn.Module:
    """The kind's base with the adapter in a folder, as PEFT loads it."""
    return peft.PeftModel.from_pretrained(kind.base(), folder).eval()
