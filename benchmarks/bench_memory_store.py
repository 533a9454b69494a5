"""A training step with gradient checkpointing: plain, and with the checkpoints in the store's host tier or
in its file. On a CPU the copies run between the layers, so that what is measured is all that they and the
bookkeeping cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """One model, whose checkpoints go elsewhere in turn; its gradients are the same bits."""
    from peftkern.memory import Budgets, CheckpointStore, checkpoint_layers

    model = _model(spec)
    ids = torch.randint(0, 4096, (1, spec.m), generator=torch.Generator().manual_seed(2))
    nbytes = 2 * spec.m * spec.k * (spec.n - 1)
    everything: dict[str, Any] = {"device": "cpu", "block_bytes": 1 << 20, "min_tokens": 1, "min_elements": 1}
    room = nbytes + (2 << 20)

    def plain() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = [gradient.clone() for gradient in plain()]

    def stored(budgets: Budgets) -> Callable[[], list[Tensor]]:
        store = CheckpointStore(budgets, **everything)

        def call() -> list[Tensor]:
            with checkpoint_layers(model, store=store):
                return plain()

        return call

    def check(got: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "other gradients"

    return [
        Provider(OURS, stored(Budgets(host=room)), check),
        Provider(FILE, stored(Budgets(host=0, disk=room)), check),
        Provider(PLAIN, plain, check),
    ]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
