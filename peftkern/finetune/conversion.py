"""GGUF files as dense safetensors folders, converted once."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import torch

from ..files import atomic_directory, cache_dir, clear_temporaries, locked
from .errors import InputError
from .loading import load_errors, require_all_weights

__all__ = ["dense_folder"]

_PART = re.compile(r"-\d{5}-of-(\d{5})$")


def dense_folder(gguf: Path) -> Path:
    """Convert a GGUF file to a dense bf16 safetensors folder in the cache, once; raises InputError if it is
    not whole."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / "models" / f"{gguf.stem}-{key}"
    if not folder.is_dir():
        _check(gguf)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Two runs at once convert one after the other: the second finds the folder, and removes none that is
        # being read.
        with locked(folder.parent / f".{folder.name}.lock", wait=True):
            if not folder.is_dir():
                clear_temporaries(folder.parent, folder.name)
                _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {gguf.name} to safetensors (once) ...", file=sys.stderr)
    with load_errors(str(gguf), str(gguf)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True
        )
    require_all_weights(str(gguf), model, report)
    # Left in place it would have the folder loaded as GGUF again.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        what = "is empty" if not magic else f"is no GGUF file (it begins with {magic!r})"
        raise InputError(f"--model {gguf} {what}: download or convert it again")
    part = _PART.search(gguf.stem)
    if part and int(part[1]) > 1:
        raise InputError(
            f"--model {gguf} is one of {int(part[1])} parts: join them first "
            "(llama.cpp's `llama-gguf-split --merge`) and give the whole file"
        )
