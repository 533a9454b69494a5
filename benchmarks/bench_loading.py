"""The private memory of a process that loads a model in 4 bits: peftkern.memory.load_4bit, and transformers'
own loading.

Each loading runs in a process of its own. Counted is RssAnon, which leaves out mapped pages of files. The
model is random. `--host-of-8b` loads the shape of Llama-3.1-8B from a sparse file (zeros, no disk) onto the
meta device: what is left on the host is what loading onto a GPU takes there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["measure", "save_random", "save_sparse"]

_MIB = 1 << 20
_MODEL = dict(
    vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
)
_8B = dict(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
)


def save_random(folder: Path, **sizes: Any) -> Path:
    """A bf16 Llama with tied embeddings in shards of 100 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


def save_sparse(folder: Path, **sizes: Any) -> Path:
    """A bf16 Llama of zeros whose file takes no disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def measure(folder: Path, warm: Path, provider: str, dtype: str, device: str = "cpu") -> dict[str, float]:
    """{"peak", "after" (bytes above those before loading), "seconds"} of a process of its own."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--child",
        str(folder),
        str(warm),
        provider,
        dtype,
        device,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _child(folder: str, warm: str, provider: str, dtype: str, device: str) -> None:
    import torch

    from peftkern.memory.host import private_bytes

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], private_bytes())

    load = {"peftkern": _ours, "transformers": _transformers}[provider]
    load(warm, getattr(torch, dtype), "cpu" if device == "meta" else device)
    before, peak, done = private_bytes(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    model = load(folder, getattr(torch, dtype), device)
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    after = private_bytes()
    print(json.dumps({"peak": max(peak[0], after) - before, "after": after - before, "seconds": seconds}))
    del model


def _ours(folder: str, dtype: Any, device: str) -> Any:
    from peftkern.memory import load_4bit

    return load_4bit(folder, dtype=dtype, device=device)


def _transformers(folder: str, dtype: Any, device: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, quantization_config=config
    )


def _expected(itemsize: int, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of the 4-bit model, and of its largest tensor, the embedding."""
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    linears = layers * (3 * hidden * hidden + 3 * hidden * inner)  # key and value of half the heads
    embedding = sizes["vocab_size"] * hidden * itemsize
    return int(linears * (1 / 2 + 1 / 64 + 4 / 64 / 256)) + embedding, embedding


def _report(name: str, seen: dict[str, float], limit: float) -> None:
    peak, after = seen["peak"] / _MIB, seen["after"] / _MIB
    print(
        f"{name:34} peak {peak:8.1f} MiB  after {after:8.1f} MiB  limit {limit / _MIB:8.1f} MiB  "
        f"{seen['seconds']:6.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host-of-8b", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: then the host's share is measured")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(*args.child)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        warm = save_random(
            root / "warm",
            **_MODEL | dict(hidden_size=64, intermediate_size=64, vocab_size=64, num_hidden_layers=1),
        )
        if args.host_of_8b:
            seen = measure(save_sparse(root / "8b", **_8B), warm, "peftkern", "bfloat16", "meta")
            return _report("8B's shape, host, peftkern", seen, 1.5e9)
        folder = save_random(root / "model", **_MODEL)
        for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
            model, largest = _expected(itemsize, _MODEL)
            for provider in ("peftkern", "transformers"):
                limit = model + 1.2 * largest if args.device == "cpu" else 1.5e9
                _report(
                    f"{dtype}, {provider}, {args.device}",
                    measure(folder, warm, provider, dtype, args.device),
                    limit,
                )


if __name__ == "__main__":
    main()
