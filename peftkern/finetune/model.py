"""The base model, quantized as it loads, and its adapter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ..memory.heap import mapped_allocations
from ..memory.loading import load_4bit, reads_in_slices
from .adapters import add_adapter, is_lora
from .config import FinetuneConfig
from .loading import load_errors, require_all_weights
from .processes import say
from .resolve import compute_dtype, load_tokenizer, resolve_model
from .stock import prepare_stock

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "compute_dtype",
    "load_base",
    "load_model",
    "load_tokenizer",
    "quantization_options",
    "resolve_model",
]


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
    _keep_the_soft_cap(base)
    return base


def _keep_the_soft_cap(base: PreTrainedModel) -> None:
    """torch's SDPA has no soft cap on scores; where transformers (5.17, Gemma 2) takes it nevertheless, the
    cap would be left out without a word."""
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        base.set_attn_implementation("eager")
        say("Attention runs eager: this transformers would leave out the model's soft cap on scores.")


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
