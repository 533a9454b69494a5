"""The private memory of a process that loads a model: at most the result and 1.2 times its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LOAD = """
import json, sys, threading, time
import torch
from peftkern.memory import load_4bit
from peftkern.memory.host import private_bytes

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private_bytes())
        time.sleep(0.0005)

folder, warm, dtype = sys.argv[1:]
load_4bit(warm, dtype=getattr(torch, dtype), device="cpu", progress=False)
before, peak, done = private_bytes(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load_4bit(folder, dtype=getattr(torch, dtype), device="cpu", progress=False)
done.set()
thread.join()
after = private_bytes()  # the thread looks now and then, and may have missed the last pages
print(json.dumps({"peak": max(peak[0], after) - before, "after": after - before}))
"""


def save(folder: Path, *, layers: int, hidden: int, vocab: int) -> Path:
    import torch

    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_private_memory_is_the_result_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    hidden, layers, vocab = 512, 16, 16_000
    size = {"bfloat16": 2, "float32": 4}[dtype]
    linears = layers * (4 * hidden * hidden + 3 * 4 * hidden * hidden)
    embedding, four_bit = vocab * hidden * size, int(linears * (1 / 2 + 1 / 64 + 4 / 64 / 256))
    seen: Any = run(save(tmp_path / "big", layers=layers, hidden=hidden, vocab=vocab), tmp_path, dtype)
    assert four_bit + embedding <= seen["after"] <= seen["peak"]
    assert seen["peak"] <= four_bit + embedding + 1.2 * embedding
    # Beside the result there is a slice and what quantizing it takes, not a dense tensor.
    assert seen["peak"] - seen["after"] <= 12 << 20


def run(folder: Path, tmp_path: Path, dtype: str) -> Any:
    warm = save(tmp_path / "warm", layers=1, hidden=64, vocab=64)
    command = [sys.executable, "-c", LOAD, str(folder), str(warm), dtype]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
