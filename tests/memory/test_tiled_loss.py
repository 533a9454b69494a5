"""The fused loss within a budget of logits' bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.memory import tile_loss
from peftkern.ops.linear_cross_entropy import cpu
from peftkern.ops.linear_cross_entropy.budget import logits_bytes

from ..patching import models

IDS = torch.randint(0, 96, (2, 200), generator=torch.Generator().manual_seed(1)) % 64


def model() -> nn.Module:
    config = models.transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    adapted = models.lora(models.transformers.LlamaForCausalLM(config))
    peftkern.patch(adapted, fused_loss=True)
    return adapted


def train(adapted: nn.Module) -> dict[str, Tensor]:
    adapted.zero_grad(set_to_none=True)
    loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | models.grads(adapted)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each block of logits."""
    seen, original = [], cpu._logits_buffer

    def counted(size: int, dtype: torch.dtype) -> Tensor:
        seen.append(size // 96)
        return original(size, dtype)

    monkeypatch.setattr(cpu, "_logits_buffer", counted)
    return seen


def test_logits_stay_within_the_budget_and_the_numbers_are_the_same(blocks: list[int]) -> None:
    adapted = model()
    whole = train(adapted)
    assert tile_loss(adapted, budget=130 * 96 * 4) == 128
    tiled = train(adapted)
    assert blocks[0] == 398 and blocks[1] <= 128
    for name, value in whole.items():
        torch.testing.assert_close(
            tiled[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name
        )
    peftkern.patch(adapted, fused_loss=True)
    train(adapted)
    assert tile_loss(adapted, budget=None) is None
    train(adapted)
    assert blocks[2] <= 128 and blocks[3] == 398


def test_a_budget_may_hold_more_rows_than_the_ops_own_choice() -> None:
    assert cpu.block_rows(96, 4) == 512
    with logits_bytes(4096 * 96 * 4):
        assert cpu.block_rows(96, 4) == 4096
    with logits_bytes(1):
        assert cpu.block_rows(96, 4) == 16
    assert cpu.block_rows(96, 4) == 512


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no fused loss; call peftkern.patch"):
        tile_loss(models.lora(models.llama()), budget=1 << 20)
    with pytest.raises(ValueError, match="64 rows of the logits of 96 words take 24576"):
        tile_loss(model(), budget=1000)
