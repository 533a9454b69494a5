"""The store and layers on the host, on a tiny model of each architecture: the bits of a plain step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.memory import Budgets, CheckpointStore, checkpoint_layers, layers_on_host

from ..patching import models, zoo

QUICK = ("gemma3", "t5", "qwen3-moe")  # norms after blocks and a scaled embedding; two stacks; experts
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.CASES]


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    result = zoo.output(model)
    zoo.losses(result).mean().backward()
    return {"output": result.detach()} | models.grads(model)


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name in got if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_a_plain_step(name: str) -> None:
    case = zoo.CASES[name]
    model = zoo.build(name, four_bit=case.four_bit, lora_dropout=0.0 if case.experts else 0.1)
    for patched in (False, True):
        if patched:
            peftkern.patch(model)
        expected = step(model)
        store = CheckpointStore(
            Budgets(host=1 << 20), device="cpu", block_bytes=1024, min_tokens=1, min_elements=1
        )
        with layers_on_host(model, device="cpu", min_bytes=64):
            assert differing(step(model), expected) == []
            with checkpoint_layers(model, store=store):
                assert differing(step(model), expected) == []
                assert store.report()["host"]["peak"] > 0
        with checkpoint_layers(model, store=store):
            assert differing(step(model), expected) == []
        assert differing(step(model), expected) == []
