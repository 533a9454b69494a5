"""What the sums take at 8B, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkern.transfer.forgetting import DeltaPenalty, FisherFactors, fisher, lora_factors, penalty

from . import tiny

SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
SHAPES |= {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
LAYERS, R = 32, 16


def llama_8b() -> nn.Module:
    """The linear layers of Llama-3-8B with LoRA, without storage."""
    with torch.device("meta"):
        layers = [
            nn.ModuleDict({name: nn.Linear(k, n, bias=False) for name, (n, k) in SHAPES.items()})
            for _ in range(LAYERS)
        ]
        model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        return tiny.peft.get_peft_model(
            model, tiny.peft.LoraConfig(r=R, target_modules=list(SHAPES)), low_cpu_mem_usage=True
        )


def test_sums_and_scratch_are_at_most_25_mb_at_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_8b()
    factors = lora_factors(model)
    assert len(factors) == 7 * LAYERS
    monkeypatch.setattr(fisher, "base_identity", lambda held: dict.fromkeys(held, "meta"))
    sums = FisherFactors(
        {name: torch.ones(layer.b.shape[0]) for name, layer in factors.items()},
        {name: torch.ones(layer.a.shape[1]) for name, layer in factors.items()},
        1,
        1,
        "true",
        "sequence",
        dict.fromkeys(factors, "meta"),
    )
    held = DeltaPenalty(model, sums)
    assert sums.bytes == 4 * LAYERS * sum(n + k for n, k in SHAPES.values()) == 10_485_760
    assert held.bytes == sums.bytes + 4 * 7 * LAYERS  # and the scaling of each layer
    largest = max(4 * R * (n + k) for n, k in SHAPES.values())
    scratch = 3 * max(penalty._CHUNK_BYTES, largest)  # stacked, weighted, gradients
    assert held.bytes + scratch <= 25e6
