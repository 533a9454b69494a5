"""A training step with gradient checkpointing: plain, and with the checkpoints in the store's host tier or
in its file. On a CPU the copies run between the layers, so that what is measured is all that they and the
bookkeeping cost."""

from __future__ import annotations

from . import peers  # noqa: F401 (first: it switches peftkern's bitsandbytes hook off)

# isort: split
import torch
from torch import Tensor, nn

from .bench_step import quantize
from .harness import OURS, Provider, Spec, main

__all__ = ["build", "specs"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN, FILE = "transformers' checkpointing", "peftkern, file"


def specs(small: bool) -> list[Spec]:
    """n: layers, k: width, m: tokens."""
    layers, width, tokens = (2, 192, 64) if small else (5, 576, 512)
    return [Spec("checkpoint_store", "step", "bfloat16", layers, width, tokens)]


def _model(spec: Spec) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftkern

    torch.manual_seed(0)
    size = dict(hidden_size=spec.k, intermediate_size=spec.k * 8 // 3, num_hidden_layers=spec.n)
    heads = dict(num_attention_heads=spec.k // 64, num_key_value_heads=spec.k // 192)
    config = LlamaConfig(**size, **heads, vocab_size=4096, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    quantize(model, torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    peftkern.patch(model, fused_loss=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def build(spec: Spec) -> list[Provider]:
    """The same model for each, whose gradients are the same bits."""
    from peftkern.memory import Budgets, CheckpointStore, checkpoint_layers

    ids = torch.randint(0, 4096, (1, spec.m), generator=torch.Generator().manual_seed(2))
    room = 2 * spec.m * spec.k * (spec.n - 1) + (2 << 20)
    expected: list[Tensor] = []

    def provider(name: str, budgets: Budgets | None) -> Provider:
        model = _model(spec)
        if budgets is not None:
            sizes = {"block_bytes": 1 << 20, "min_tokens": 1, "min_elements": 1}
            checkpoint_layers(model, store=CheckpointStore(budgets, device="cpu", **sizes))

        def call() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(3)
            model(input_ids=ids, labels=ids).loss.backward()
            return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

        if budgets is None:
            expected.extend(gradient.clone() for gradient in call())
        return Provider(name, call, check)

    def check(got: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "other gradients"

    plain = provider(PLAIN, None)
    stores = [provider(OURS, Budgets(host=room)), provider(FILE, Budgets(host=0, disk=room))]
    return [*stores, plain]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
