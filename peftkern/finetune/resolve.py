"""What --model and --dtype name: a folder, a tokenizer, a dtype of torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .constants import SAMPLE
from .conversion import dense_folder
from .errors import InputError
from .loading import check_folder, load_errors
from .sample import sample_model_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["compute_dtype", "load_tokenizer", "resolve_model"]

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
