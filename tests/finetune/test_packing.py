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
    model = BloomForCausalLM(
        BloomConfig(vocab_size=320, hidden_size=64, n_layer=1, n_head=4, eos_token_id=0, pad_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def examples(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"question {i:03d}", "completion": " answer"} for i in range(40)]
    return options | {
        "data": write_jsonl(tmp_path / "rows.jsonl", rows),
        "packing": True,
        "steps": 2,
        "quantization": "none",
    }


def test_windows_that_no_example_fills_are_trained_on(examples: dict[str, Any]) -> None:
    finetune(FinetuneConfig(**examples), quiet=True)
    metrics = [
        json.loads(line) for line in (Path(examples["output"]) / "metrics.jsonl").read_text().splitlines()
    ]
    # Three examples of 20 tokens in each window of 64.
    assert [row["tokens"] for row in metrics] == [2 * 60] * 2


def test_mixing_models_are_refused(examples: dict[str, Any], tiny_model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = save_bloom(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    with pytest.raises(InputError, match=r"does not keep the examples of a window apart .* use --no-packing"):
        finetune(FinetuneConfig(**examples | {"model": model}), quiet=True)
    finetune(FinetuneConfig(**examples | {"model": model, "packing": False}), quiet=True)


@pytest.fixture
def documents(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Texts of 20 tokens with their end, and one of 150, longer than two windows of 64."""
    rows = [{"text": f"a text, number {i:03d}."} for i in range(40)] + [{"text": "x" * 149}]
    return options | {
        "data": write_jsonl(tmp_path / "rows.jsonl", rows),
        "document_boundaries": True,
        "steps": 2,
        "quantization": "none",
    }


def test_texts_of_a_window_are_kept_apart(documents: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.finetune.trainer import RecipeTrainer

    seen = []
    step = RecipeTrainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append({name: torch.as_tensor(value) for name, value in inputs.items()})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", watched)
    finetune(FinetuneConfig(**documents), quiet=True)
    for batch in seen:
        ids, positions, labels = (batch[name][0] for name in ("input_ids", "position_ids", "labels"))
        ends = (ids == 0).nonzero()[:, 0]
        # A position is 0 where a text begins, after the end of the one before it, and nothing is predicted
        # across.
        assert (
            positions[0] == 0
            and (positions[ends[:-1] + 1] == 0).all()
            and (labels[positions == 0] == -100).all()
        )
        assert "attention_mask" not in batch and len(ids) > 100
        assert ((labels == ids) | (positions == 0)).all()


def test_no_token_of_a_long_text_is_lost(documents: dict[str, Any]) -> None:
    from peftkern.finetune.inputs import _pieces

    rows = {"input_ids": [list(range(150)), [7], [8, 9]], "labels": [list(range(150)), [7], [8, 9]]}
    pieces = _pieces(rows, 64)["input_ids"]
    assert [len(piece) for piece in pieces] == [64, 64, 22, 2] and sum(pieces[:3], []) == list(range(150))
    result = finetune(
        FinetuneConfig(**documents | {"epochs": 1.0, "steps": None, "eval_fraction": 0.02}), quiet=True
    )
    # All of the 41 texts but the one that is held out, in one pass.
    assert result.tokens in (39 * 20 + 150, 40 * 20)


def test_models_that_mix_texts_are_refused(
    documents: dict[str, Any], tiny_model: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = save_bloom(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    with pytest.raises(InputError, match="does not keep the examples of a window apart"):
        finetune(FinetuneConfig(**documents | {"model": model}), quiet=True)
