"""A merged model as a folder that loads without PEFT, or with a residual adapter beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import atomic_directory
from ..formats.nf4 import NF4Weight
from ..merging import merge_dense
from ..patching import unpatch
from ..patching.weights import is_4bit
from .merge import RESIDUAL, Source
from .merge_original import Originals
from .merge_report import MergeReport

__all__ = ["ADAPTER_FOLDER", "bytes_on_disk", "save_merged"]

ADAPTER_FOLDER = "adapter"  # inside the output, of the residual


def save_merged(
    model: Any,
    folder: str | Path,
    report: MergeReport,
    *,
    tokenizer: Any = None,
    original: Source | None = None,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write a model that `merge` has merged, as transformers loads it: whole, or not at all.

    The model is used up: its LoRA layers are taken out. "dense" has no 4-bit layer left: those without an
    adapter are dequantized, or read from `original` where the merge was into that. "residual" writes the
    adapter that goes with the base into `folder/adapter`.

    Args:
        model: a PeftModel of a transformers model.
        folder: to write; an existing one is replaced once the new one is complete.
        report: what `merge` gave.
        tokenizer: written beside it where given.
        original: as `merge` had it, for base="original".
        also: writes further files into the folder it is given.
    Raises: OSError where the disk is full or the folder cannot be written; ValueError where the model has
        nothing that fits the report.
    """
    folder = Path(folder)
    with atomic_directory(folder) as temporary:
        if report.form == "residual":
            _save_residual(model, temporary, folder)
            plain = model.unload()
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="All adapters are already merged")
                plain = model.merge_and_unload()
        with contextlib.suppress(ValueError):
            unpatch(plain)
        if report.form == "dense":
            _dequantize_rest(plain, Originals(original) if report.base == "original" else None)
            _forget_quantization(plain)
        plain.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if also is not None:
            also(temporary)


def bytes_on_disk(model: Any, form: str) -> int:
    """What `save_merged` will write of the weights, about; shared ones count once, adapters not at all."""
    total, seen = 0, set()
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or "lora_" in f"{name}.{key}":
                continue
            seen.add(id(parameter))
            if not (key == "weight" and is_4bit(module)):
                total += parameter.numel() * parameter.element_size()
            elif form == "dense":
                total += model.dtype.itemsize * module.in_features * module.out_features
            else:
                total += NF4Weight.from_bnb(module).nbytes
    return total


def _save_residual(model: Any, temporary: Path, final: Path) -> None:
    model.peft_config[RESIDUAL].base_model_name_or_path = os.path.abspath(final)
    target = temporary / ADAPTER_FOLDER
    model.save_pretrained(target, selected_adapters=[RESIDUAL])
    inner = target / RESIDUAL
    for path in inner.iterdir():
        shutil.move(str(path), target / path.name)
    inner.rmdir()


@torch.no_grad()
def _dequantize_rest(model: nn.Module, originals: Originals | None) -> None:
    """Plain linears in the place of the 4-bit ones that had no adapter."""
    for name, module in list(model.named_modules()):
        if not is_4bit(module):
            continue
        weight = NF4Weight.from_bnb(module)
        rows = None if originals is None else originals.rows(name, tuple(weight.shape), weight.device)
        has_bias = module.bias is not None
        dense = nn.Linear(module.in_features, module.out_features, bias=has_bias, device="meta")
        values = merge_dense(weight, (), dtype=model.dtype, base=rows)
        dense.weight = nn.Parameter(values, requires_grad=False)
        if has_bias:
            dense.bias = nn.Parameter(module.bias.detach().to(model.dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)


def _forget_quantization(model: Any) -> None:
    """Else transformers would save, and load, the dense model as a 4-bit one."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
