"""The base model, quantized as it loads, and its adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..memory.heap import mapped_allocations
from ..memory.loading import load_4bit, reads_in_slices
from .adapters import add_adapter, is_lora
from .config import SAMPLE, FinetuneConfig
from .conversion import dense_folder
from .errors import InputError
from .loading import check_folder, load_errors, require_all_weights
from .processes import say
from .sample import sample_model_file
from .stock import prepare_stock

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "compute_dtype",
    "load_base",
    "load_model",
    "load_tokenizer",
    "quantization_options",
    "resolve_model",
]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; "auto" is bf16 where the hardware multiplies it natively, else what it does
    well.

    On a CPU without bf16 instructions torch's bf16 matrix product is hundreds of times slower than the fp32
    one.
    """
    cuda = torch.cuda.is_available()
    if name == "fp16" and not cuda:
        raise InputError("--dtype fp16 needs a CUDA GPU: use bf16 or fp32 on a CPU")
    if name != "auto":
        return _DTYPES[name]
    if cuda:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def resolve_model(model: str) -> str:
    """What `from_pretrained` takes for --model: a hub id or folder as it is; a GGUF file or the sample as a
    dense folder."""
    if model == SAMPLE:
        return str(dense_folder(sample_model_file()))
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--model {model}: no such file")
        return str(dense_folder(path))
    if os.path.isdir(path):
        check_folder(model, path)
    elif os.path.exists(path):
        raise InputError(
            f"--model {model} is a file, but no .gguf file: give the folder that holds it, with its "
            "config.json and tokenizer"
        )
    return model


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without an end-of-sequence token cannot mark where texts end."""
    from transformers import AutoTokenizer

    with load_errors(path, path, files="config.json and tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {path} has no eos_token: set one in its tokenizer_config.json")
    return tokenizer


def load_base(path: str, config: FinetuneConfig, *, on_host: bool = False) -> PreTrainedModel:
    """Load `path` quantized on the fly, from slices of its files; raises InputError unless every weight is in
    its files.

    on_host: it stays on the host, from where its layers are to be streamed.
    """
    dtype = compute_dtype(config.dtype)
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() and not on_host else "cpu"
    with load_errors(config.model, path):
        if config.quantization != "none" and reads_in_slices(_fetched(path)):
            base, report = load_4bit(
                path,
                device=device,
                dtype=dtype,
                quant_type=config.quantization,
                nested=config.double_quant,
                keep_cache=True,
                output_loading_info=True,
            )
        else:
            base, report = _load_whole(path, config, dtype, device)
    unused = require_all_weights(config.model, base, report)
    if unused:
        say(unused)
    return base


def _fetched(path: str) -> str:
    """The folder of a hub id, downloaded where it is not; what cannot be had is left to `from_pretrained`,
    which tells."""
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "model*.safetensors"])
    except Exception:  # noqa: BLE001  whatever the hub's client raises
        return path


def _load_whole(
    path: str, config: FinetuneConfig, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """By transformers, a tensor at a time: code of the model's own, pickled weights, no quantization."""
    from transformers import AutoModelForCausalLM

    with mapped_allocations():
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **quantization_options(config, dtype),
        )


def load_model(path: str, config: FinetuneConfig, *, on_host: bool = False) -> PeftModel:
    """Load the base model, add the adapter of --adapter and, with --patch, peftkern's kernels."""
    model = add_adapter(load_base(path, config, on_host=on_host), config)
    if config.patch:
        import peftkern

        try:
            say(peftkern.patch(model).summary)
        except ValueError as error:
            if is_lora(config):
                raise
            say(f"Nothing of this model was patched, it runs as it is: {error}")
    else:
        prepare_stock(model)
    return model


def quantization_options(config: FinetuneConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes to quantize as it loads; nothing with --quantization none."""
    if config.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    }
