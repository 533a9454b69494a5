"""The model of `long_context`: random 4-bit weights of a shape, and all that its options put on it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from .layers import bnb_linear
from .step import TARGETS

__all__ = ["SHAPES", "build", "planned"]

SHAPES = {
    "tiny": (64, 128, 4, 2, 1, 300),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "14b": (5120, 13824, 48, 40, 8, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def build(args: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """The patched model with all that the options ask for, and the handles that hold memory on the host."""
    from peft import LoraConfig, get_peft_model

    import peftkern
    from peftkern import memory

    model = _base(args)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        target_modules=TARGETS,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    handles: list[Any] = []
    if args.layers_on_host:
        handles.append(
            memory.layers_on_host(model, device=args.device, min_bytes=1 if args.shape == "tiny" else 65536)
        )
    if args.embedding_on_host:
        handles.append(memory.embedding_on_host(model, device=args.device))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, args.adapter_dtype))
    counts = peftkern.patch(model, fused_loss=True).counts
    if counts.get("qlora_linear", 0) != 7 * SHAPES[args.shape][2]:
        raise RuntimeError(f"patched {counts}, expected every LoRA layer")
    if args.loss_tile_mib:
        memory.tile_loss(model, budget=args.loss_tile_mib << 20)
    if args.rebuild_norms:
        memory.rebuild_norms(model)
    if args.mlp_tile_mib:
        memory.tile_mlps(model, budget=args.mlp_tile_mib << 20)
    if args.attention_groups:
        memory.attention_by_groups(model)
    least = {"min_tokens": 1, "min_elements": 1} if args.shape == "tiny" else {}
    store = memory.CheckpointStore(_budgets(args), device=args.device, directory=args.directory, **least)
    memory.checkpoint_layers(model, store=store)
    return model, [*handles, store]


def _budgets(args: argparse.Namespace) -> Any:
    from peftkern.memory import Budgets

    if args.checkpoints == "device":
        return Budgets(device=1 << 50, pinned=0, host=0)
    if args.checkpoints == "disk":
        return Budgets(pinned=0, host=0, disk=args.disk_gb * 10**9)
    return Budgets(disk=args.disk_gb * 10**9)


def _base(args: argparse.Namespace) -> nn.Module:
    """Random weights, made and quantized one linear at a time on the device; with --layers-on-host each
    layer goes to the host at once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = dict(zip(_SIZES, SHAPES[args.shape], strict=True))
    config = LlamaConfig(
        **sizes,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(args.device)
    generator = torch.Generator(args.device).manual_seed(0)
    for layer in model.model.layers:
        _fill(layer, args.device, generator)
        if args.layers_on_host:
            _to_host(layer)
    _fill(model, args.device, generator)
    return model


def _fill(root: nn.Module, device: str, generator: torch.Generator) -> None:
    """Meta parameters to random ones; linears of layers to NF4, nested."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.is_meta and name != "lm_head":
                setattr(parent, name, bnb_linear(_random(child.weight, device, generator)))
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _random(parameter, device, generator)
                value = value.fill_(1.0) if parameter.dim() == 1 else value
                setattr(parent, name, nn.Parameter(value, requires_grad=False))


def _random(like: Tensor, device: str, generator: torch.Generator) -> Tensor:
    value = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return value.normal_(0, 0.02, generator=generator)


def _to_host(layer: nn.Module) -> None:
    for module in layer.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            module.weight.data = module.weight.data.cpu()
            state.to("cpu")


def planned(args: argparse.Namespace, length: int) -> int:
    """Bytes that the planner promises for the allocator's peak, on the card at hand."""
    from peftkern.memory import loss_tile, mlp_tile
    from peftkern.memory.planner import RunOptions, llama_shape, predict

    hidden, intermediate, layers, heads, kv_heads, words = SHAPES[args.shape]
    shape = llama_shape(
        args.shape,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=words,
    )
    options = RunOptions(
        length=length,
        rank=args.rank,
        adapter_bytes=getattr(torch, args.adapter_dtype).itemsize,
        keep_layers=None if args.checkpoints == "device" else 1,
        mlp_tile=mlp_tile(args.mlp_tile_mib << 20, hidden, intermediate) if args.mlp_tile_mib else None,
        loss_tile=loss_tile(args.loss_tile_mib << 20, words) if args.loss_tile_mib else None,
        kv_groups=args.attention_groups,
        rebuild_norms=args.rebuild_norms,
        embedding_on_host=args.embedding_on_host,
        layers_on_host=args.layers_on_host,
    )
    return predict(shape, options)
