"""Loading: quantized layer by layer, sample conversion, dtype choice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkern.finetune import FinetuneConfig, InputError
from peftkern.finetune.model import compute_dtype, load_model, resolve_model
from peftkern.memory.stored_weights import StoredTensor
from peftkern.ops.attention.config import available

from .conftest import save_tiny_gemma2, save_tiny_model

# Peak of the anonymous memory while loading: pages of the mapped weight file are the page cache's, and can be
# dropped at any time.
LOAD = """
import sys, threading, time
import bitsandbytes.functional, peft, transformers, torch
from transformers import AutoModelForCausalLM
from peftkern.finetune import FinetuneConfig
from peftkern.finetune.model import load_model

def anonymous():
    status = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon:"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

folder, warm = sys.argv[1:]
config = {"patch": False, "dtype": "fp32", "r": 1}
load_model(warm, FinetuneConfig(model=warm, **config).resolved())
before, peak, done = anonymous(), [0.0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(folder, FinetuneConfig(model=folder, **config).resolved())
done.set()
thread.join()
after = anonymous()  # the thread looks now and then, and may have missed the last pages
print(max(peak[0], after) - before, after - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_loading_peaks_near_the_quantized_size(tmp_path: Path) -> None:
    folder, warm = (
        save_tiny_model(tmp_path / "big", layers=16, hidden=512, dtype=torch.bfloat16),
        save_tiny_model(tmp_path / "warm"),
    )
    # in millions, or MiB at one byte each
    weights = 16 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1024) / 2**20
    command = [sys.executable, "-c", LOAD, str(folder), str(warm)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, after = map(float, done.stdout.split()[-2:])
    # Half a byte and its block maxima a weight, one dense layer on the way, and the adapter, embeddings and
    # bookkeeping: 24 + 9 + 8 MiB
    # of 144 MiB as fp32.
    assert 0.5 * weights <= after <= peak <= 0.53 * weights + 4 * weights / 16 + 8


def test_hub_ids_are_read_in_slices_too(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_model, repository / "snapshots" / ("a" * 40))
    read: list[str] = []
    slices = StoredTensor.slices
    monkeypatch.setattr(StoredTensor, "slices", lambda self: read.append(self.name) or slices(self))
    model = load_model("some/llama", FinetuneConfig(model="some/llama", patch=False).resolved())
    assert len(read) == 2 * 9 + 2 and model.peft_config["default"].base_model_name_or_path == "some/llama"


def test_linears_are_four_bit_and_the_rest_is_not(tiny_model: str) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load_model(
        tiny_model, FinetuneConfig(model=tiny_model, patch=False, r=3, alpha=6.0, rslora=True).resolved()
    )
    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 2 * 7 and not any("lm_head" in name for name in quantized)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    scaling = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert list(scaling) == pytest.approx([6 / 3**0.5])


def test_patched_model_takes_peftkerns_path(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_model, FinetuneConfig(model=tiny_model).resolved())
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    attention = 2 * (available() and half)  # a kernel of ours on some CPUs, for each of its layers
    assert f"{25 + attention} of {25 + attention} modules patched (14 qlora_linear" in capsys.readouterr().err


def test_dtype_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert compute_dtype("auto") is expected
    assert compute_dtype("bf16") is torch.bfloat16
    with pytest.raises(InputError, match="fp16 needs a CUDA GPU"):
        compute_dtype("fp16")


def test_missing_gguf() -> None:
    with pytest.raises(FileNotFoundError, match=r"--model nowhere\.gguf: no such file"):
        resolve_model("nowhere.gguf")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_soft_cap_on_scores_is_never_left_out(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where transformers gives such a model torch's SDPA, as 5.17 does."""
    transformers = pytest.importorskip("transformers")
    folder, losses = save_tiny_gemma2(tmp_path / "gemma2"), []
    for sdpa in (False, True):
        monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", sdpa)
        options = {"model": str(folder), "quantization": quantization, "dtype": "fp32"}
        model = load_model(str(folder), FinetuneConfig(**options).resolved()).eval()
        assert model.config._attn_implementation == "eager"
        ids = torch.arange(1, 41)[None]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == losses[1] and "soft cap on scores" in "".join(capsys.readouterr())
