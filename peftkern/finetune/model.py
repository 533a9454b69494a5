"""The base model, quantized as it loads, and its LoRA adapter."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import atomic_directory, cache_dir
from .config import SAMPLE, FinetuneConfig
from .errors import InputError
from .memory import mapped_allocations
from .sample import sample_model_file
from .stock import prepare_stock

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["compute_dtype", "dense_folder", "load_model", "load_tokenizer", "resolve_model"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; "auto" is bf16 where the hardware multiplies it natively, else what it does well.

    On a CPU without bf16 instructions torch's bf16 matrix product is hundreds of times slower than the fp32 one.
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
    """What `from_pretrained` takes for --model: a hub id or folder as it is; a GGUF file or the sample as a dense folder."""
    if model == SAMPLE:
        return str(dense_folder(sample_model_file()))
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--model {model}: no such file")
        return str(dense_folder(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model {model}: this folder has no config.json: give a folder that save_pretrained wrote, or a .gguf file")
    return model


def dense_folder(gguf: Path) -> Path:
    """Convert a GGUF file to a dense bf16 safetensors folder in the cache, once."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / "models" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {gguf.name} to safetensors (once) ...", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # Left in place it would have the folder loaded as GGUF again.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without an end-of-sequence token cannot mark where texts end."""
    from transformers import AutoTokenizer

    with _load_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {path} has no eos_token: set one in its tokenizer_config.json")
    return tokenizer


def load_model(path: str, config: FinetuneConfig) -> PeftModel:
    """Load `path` quantized on the fly, tensor by tensor, add the LoRA adapter and, with --patch, peftkern's kernels."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    dtype = compute_dtype(config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _load_errors(config.model), mapped_allocations():
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}, **_quantization(config, dtype))
    targets: Any = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise InputError(f"no layer of {config.model} to adapt with --targets {' '.join(config.targets)}: {error}") from error
    if not any("lora_" in name for name, _ in model.named_parameters()):
        raise InputError(f"{config.model} has no linear layer to adapt: LoRA needs torch.nn.Linear (or 4-bit linear) layers")
    if config.patch:
        import peftkern

        print(peftkern.patch(model).summary, file=sys.stderr)
    else:
        prepare_stock(model)
    return model


@contextlib.contextmanager
def _load_errors(model: str) -> Iterator[None]:
    """The ways in which transformers says that there is no such model, or none that it knows."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model} could not be loaded: {error}") from error


def _quantization(config: FinetuneConfig, dtype: torch.dtype) -> dict[str, Any]:
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
