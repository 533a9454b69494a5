"""On a GPU: the bits of transformers' own loading there, and no dense tensor on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.memory.loading import load_4bit
from peftkern.memory.sliced_quantize import dense_slices, quantize_slices, staging_bytes
from peftkern.memory.stored_weights import SLICE

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(130, 256), (1025, 1088), (4096, 2048)])
def test_slices_give_the_bits_of_the_whole(
    shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    format_ = dict(quant_type=quant_type, compress_statistics=nested)
    like = bnb.nn.Params4bit(torch.empty(shape, device="meta"), **format_)
    got = quantize_slices(dense_slices(dense), like, shape, dtype, "cuda")
    whole = bnb.nn.Params4bit(dense, **format_).to("cuda")
    assert torch.equal(got.data, whole.data)
    mine, theirs = (one.quant_state.as_dict(packed=True) for one in (got, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def of_transformers(folder: Path) -> Any:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.bfloat16, device_map={"": "cuda"}, quantization_config=config)


def test_the_model_and_its_peak(tmp_path: Path) -> None:
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8)
    config = transformers.LlamaConfig(**sizes, vocab_size=8000, pad_token_id=0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50MB")
    load_4bit(tmp_path, dtype=torch.bfloat16, device="cuda", progress=False)  # what is made once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_4bit(tmp_path, dtype=torch.bfloat16, device="cuda", progress=False)
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    assert peak - after <= staging_bytes(1024 * 4096, 2, nested=True, blocksize=64) + 2 * SLICE + (1 << 20)
    assert after > before
    other = of_transformers(tmp_path)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = torch.tensor([[5, 7, 11]], device="cuda")
    options = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))
