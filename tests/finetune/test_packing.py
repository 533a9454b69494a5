"""Examples that share a window are kept apart, or packing is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.finetune import FinetuneConfig, InputError, finetune

from .conftest import write_jsonl


def save_bloom(folder: Path) -> str:
    """A model whose attention looks at distances only, so that it cannot see where an example begins."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=64, n_layer=1, n_head=4, eos_token_id=0, pad_token_id=0))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def examples(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"question {i:03d}", "completion": " answer"} for i in range(40)]
    return options | {"data": write_jsonl(tmp_path / "rows.jsonl", rows), "packing": True, "steps": 2, "quantization": "none"}


def test_windows_that_no_example_fills_are_trained_on(examples: dict[str, Any]) -> None:
    finetune(FinetuneConfig(**examples), quiet=True)
    metrics = [json.loads(line) for line in (Path(examples["output"]) / "metrics.jsonl").read_text().splitlines()]
    # Three examples of 20 tokens in each window of 64.
    assert [row["tokens"] for row in metrics] == [2 * 60] * 2


def test_mixing_models_are_refused(examples: dict[str, Any], tiny_model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = save_bloom(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    with pytest.raises(InputError, match=r"does not keep the examples of a window apart .* use --no-packing"):
        finetune(FinetuneConfig(**examples | {"model": model}), quiet=True)
    finetune(FinetuneConfig(**examples | {"model": model, "packing": False}), quiet=True)
