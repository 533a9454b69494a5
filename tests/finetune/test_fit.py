"""Models whose tables are too small for the tokens of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.finetune import FinetuneConfig, InputError, finetune


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**options | {"steps": 1, "quantization": "none"} | changes), quiet=True)


def save_gpt2(folder: Path, tokenizer_of: str, *, vocabulary: int) -> str:
    """A GPT-2 of 128 learned positions; its tokenizer has 257 tokens."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": vocabulary}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, bos_token_id=0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return str(folder)


def test_learned_positions_limit_the_window(options: dict[str, Any], tiny_model: str, tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "model", tiny_model, vocabulary=257)
    with pytest.raises(InputError, match="--seq-length 129 is more than the 128 positions"):
        run(options, model=model, seq_length=129)
    run(options, model=model, seq_length=128)


def test_rotary_positions_only_note_it(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(options, seq_length=600)
    assert "more than the 512 positions that" in capsys.readouterr().err


def test_tokenizer_of_another_model(options: dict[str, Any], tiny_model: str, tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "model", tiny_model, vocabulary=200)
    with pytest.raises(
        InputError, match=r"gives the token id 2\d\d, but the model has embeddings for 200 tokens only"
    ):
        run(options, model=model)
