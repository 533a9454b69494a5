"""Llamas of any size with a 4-bit base and adapters, patched, whose weights nobody has filled: for
counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPES: dict[str, dict[str, Any]] = {
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
    "14b": dict(
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=151_936,
        head_dim=128,
    ),
    "32b": dict(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152_064,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
}


def config(**sizes: Any) -> Any:
    """A LlamaConfig; small where nothing is given."""
    small = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=1 << 20,
    )
    return transformers.LlamaConfig(**small | sizes)


def build(
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    nested: bool = True,
    four_bit: bool = True,
    patch: bool = True,
    adapter_dtype: torch.dtype | None = torch.float32,
    **lora: Any,
) -> nn.Module:
    """A PEFT model on the CPU in training mode; weights are memory that was never touched, so a layer of a
    70B shape costs nothing.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if four_bit:
        for name, old in list(model.named_modules()):
            if type(old) is nn.Linear and "head" not in name:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _linear(old, dtype, nested))
        model.is_loaded_in_4bit = True
    materialize(model)
    model.tie_weights()
    model.requires_grad_(False)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    for parameter in adapted.parameters():
        if parameter.requires_grad and adapter_dtype is not None:
            parameter.data = parameter.data.to(adapter_dtype)
    if patch:
        peftkern.patch(adapted, fused_loss=True)
    return adapted.train()


def materialize(model: nn.Module) -> None:
    """Memory for every parameter and buffer that is still on the meta device; rotary tables are computed."""
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None and tensor.is_meta:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                if tensor.dim() == 1:
                    new.fill_(1)
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            if not hasattr(module, "config"):  # a factor
                module._buffers.update(
                    {k: torch.ones(v.shape, dtype=v.dtype) for k, v in module._buffers.items()}
                )
                continue
            again = type(module)(module.config)
            module._buffers.update(again._buffers)
            module.__dict__.update({k: v for k, v in again.__dict__.items() if isinstance(v, Tensor)})


def _linear(old: nn.Linear, dtype: torch.dtype, nested: bool) -> nn.Module:
    options = dict(compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    with torch.device("cpu"):
        new = bnb.nn.Linear4bit(1, 1, bias=False, **options)
    new.in_features, new.out_features = old.in_features, old.out_features
    blocks = old.in_features * old.out_features // 64
    code = torch.linspace(-1, 1, 16)
    state = dict(shape=old.weight.shape, code=code, blocksize=64, quant_type="nf4", dtype=dtype)
    if nested:
        inner = bnb.functional.QuantState(
            absmax=torch.zeros(-(-blocks // 256)),
            code=torch.linspace(-1, 1, 256),
            blocksize=256,
            dtype=torch.float32,
        )
        outer = dict(absmax=torch.zeros(blocks, dtype=torch.uint8), offset=torch.zeros(()), state2=inner)
    else:
        outer = dict(absmax=torch.zeros(blocks))
    new.weight = bnb.nn.Params4bit(
        torch.zeros((blocks * 32, 1), dtype=torch.uint8),
        requires_grad=False,
        bnb_quantized=True,
        module=new,
        quant_state=bnb.functional.QuantState(**state, **outer),
        blocksize=64,
        compress_statistics=nested,
        quant_type="nf4",
    )
    new.quant_state = new.weight.quant_state
    if old.bias is not None:
        new.bias = nn.Parameter(torch.zeros(old.out_features, dtype=dtype), requires_grad=False)
    return new
