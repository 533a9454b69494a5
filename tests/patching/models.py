"""Tiny random models for the patching tests, and the same computation in fp64."""

from __future__ import annotations

import copy
import inspect
import io
import types
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftkern

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def llama(
    dtype: torch.dtype = torch.float32,
    *,
    four_bit: bool = True,
    seed: int = 0,
    bias: bool = False,
    layers: int = 2,
    inner: int = 80,
    **four_bit_options,
) -> nn.Module:
    """A Llama of width 64; with `four_bit` all linears but lm_head are bitsandbytes NF4, nested."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=bias,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "proj" in name:
            nn.init.normal_(parameter, std=0.1)  # transformers' 0.02 leaves a model this small all but linear
    model = model.to(dtype)
    if four_bit:
        quantize(model, compute_dtype=dtype, **four_bit_options)
    return model


def quantize(
    model: nn.Module,
    *,
    compute_dtype: torch.dtype | None,
    nested: bool = True,
    quant_type: str = "nf4",
    storage=torch.uint8,
) -> None:
    """Replace every projection by a bitsandbytes Linear4bit, as transformers does on loading."""
    for name, old in list(model.named_modules()):
        if type(old) is not nn.Linear or not name.endswith("_proj"):
            continue
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent), child, linear_4bit(old, compute_dtype, nested, quant_type, storage)
        )
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def linear_4bit(
    old: nn.Linear, compute_dtype=None, nested=True, quant_type="nf4", storage=torch.uint8
) -> nn.Module:
    options = dict(
        compute_dtype=compute_dtype, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, **options)
    kept = dict(compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    new.weight = bnb.nn.Params4bit(old.weight.data.clone(), requires_grad=False, module=new, **kept)
    new.bias = old.bias
    return new.to("cpu").requires_grad_(False)


def lora(model: nn.Module, **options) -> nn.Module:
    """The PEFT model with every projection targeted and a lora_B that is not zero."""
    adapted = peft.get_peft_model(model, config(**options))
    randomize(adapted)
    return adapted


def config(**options) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    )


def arguments(config: peft.LoraConfig) -> dict[str, Any]:
    """How PEFT's own layers are told of a configuration beside r and lora_alpha: since 0.19 by the whole,
    before by name."""
    if "config" in inspect.signature(peft.tuners.lora.LoraLayer.update_layer).parameters:
        return {"config": config}
    names = ("lora_dropout", "init_lora_weights", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
    return {name: getattr(config, name) for name in names}


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def linears(report: peftkern.PatchReport) -> dict[str, int]:
    """What the linears and LoRA layers got, without the blocks around them."""
    return dict(Counter(row.got for row in report.rows if row.kind in ("lora", "linear")))


def first(model: nn.Module) -> nn.Module:
    """The LoRA layer of the first o_proj, which belongs to no group."""
    return next(
        module for name, module in lora_layers(model).items() if name.endswith("layers.0.self_attn.o_proj")
    )


def run(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    """logits, loss and the gradient of every parameter that has one, from one forward and backward."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach()} | grads(model)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


COPIES = ("deepcopy", "pickle")


def copied(model: nn.Module, how: str) -> nn.Module:
    """A copy made by `copy.deepcopy`, or by saving the whole module and loading it."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def in_fp64(model: nn.Module) -> nn.Module:
    """The same model with dense fp64 weights (the exact dequantized values) and norms that do not round to
    fp32 inside."""
    double = copy.deepcopy(model)
    for name, old in list(double.named_modules()):
        if isinstance(old, bnb.nn.Linear4bit):
            parent, _, child = name.rpartition(".")
            setattr(double.get_submodule(parent), child, _dense(old))
        elif type(old).__name__ == "LlamaRMSNorm":
            old.forward = types.MethodType(_rms_norm, old)
    # PEFT's 4-bit layer and its dense layer compute the same; only their bases differ.
    return double.double()


def _dense(old: nn.Module) -> nn.Linear:
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    with peftkern.use_backend("reference"):
        new.weight = nn.Parameter(
            peftkern.NF4Weight.from_bnb(old).dequantize(torch.float32), requires_grad=False
        )
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.data.clone(), requires_grad=old.bias.requires_grad)
    return new


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative norm of the error of each tensor."""
    assert got.keys() == exact.keys()
    return {name: ((got[name].double() - e).norm() / e.norm()).item() for name, e in exact.items()}


def set_compute_dtype(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    """Set another compute dtype; None leaves it to the first input, as a bare `Linear4bit(in, out)` does."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = compute_dtype, compute_dtype is not None
