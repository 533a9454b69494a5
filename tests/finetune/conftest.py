"""A tiny Llama with a byte-level tokenizer, made on the fly, and texts for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

for _package in ("transformers", "peft", "trl", "datasets", "bitsandbytes", "matplotlib"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'peftkern[finetune]'")

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tiny_gemma2(folder: Path) -> Path:
    """As save_tiny_model, a random Gemma 2, whose scores have a soft cap that tells."""
    import transformers

    save_tiny_model(folder)
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
    sizes |= dict(
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, pad_token_id=0, sliding_window=32
    )
    caps = dict(attn_logit_softcapping=1.0, query_pre_attn_scalar=16, bos_token_id=None)
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes | caps)).save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path, *, layers: int = 2, hidden: int = 64, dtype: Any = None) -> Path:
    """Write a random Llama and a byte-level tokenizer with a chat template to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(["<eos>", *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in one order: losses can then be compared bit for bit, also with those of a process started on one
    thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with 2 layers of width 64."""
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny-model")))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain text of some 40,000 characters."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[:40000], encoding="utf-8")
    return str(path)


@pytest.fixture
def options(tiny_model: str, text_file: str, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of a few seconds."""
    return {
        "model": tiny_model,
        "data": text_file,
        "output": str(tmp_path / "out"),
        "r": 4,
        "seq_length": 64,
        "batch_size": 2,
        "grad_accumulation": 1,
        "steps": 6,
        "save_steps": 2,
        "lr": 5e-3,
        "eval_tokens": 512,
        "sample_tokens": 4,
        "dtype": "fp32",
        "patch": False,
    }


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
