"""What the tests of decoder layers that run whole share: a small model in bf16, its runs, and what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.patching import whole_layers
from peftkern.runtime import backends

from . import models

TILED = [level for level in backends.native().isas() if level in ("avx512bf16", "amx")]
IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(1))
BF16 = torch.bfloat16


def patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = models.lora(models.llama(BF16) if model is None else model, **options).train()
    peftkern.patch(model)
    return model


@contextlib.contextmanager
def by_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layers.WholeLayer, "__call__", lambda self, *args: None)
        yield


def run(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Logits and every gradient; dropout's draws are the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    logits = model(**{"input_ids": IDS, "use_cache": False} | inputs).logits
    logits.double().square().mean().backward()
    return {"logits": logits.detach()} | models.grads(model)


def same(model: nn.Module, taken: list[bool], **inputs: Any) -> None:
    """Every layer ran whole, twice, and with the bits of the parts."""
    taken.clear()
    got, again = run(model, **inputs), run(model, **inputs)
    assert len(taken) >= 4 and all(taken)
    with by_parts():
        expected = run(model, **inputs)
    assert got.keys() == expected.keys() and len(got) > 1
    for name, value in expected.items():
        assert torch.equal(got[name], value) and torch.equal(again[name], value), name


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0]
