"""A model in 4 bits from a folder of dense weights, with little more memory than the result takes."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .heap import mapped_allocations
from .stored_weights import StoredWeights, WeightsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_4bit", "reads_in_slices"]

_SHOWN = 4  # names in a message


def load_4bit(
    model: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quant_type: str = "nf4",
    nested: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    skip_modules: list[str] | None = None,
    revision: str | None = None,
    keep_cache: bool = False,
    progress: bool = True,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """Load a causal language model with 4-bit linear layers, quantized slice by slice as its files are read.

    The model is the one that `AutoModelForCausalLM.from_pretrained` gives with a `BitsAndBytesConfig`, bit
    for bit. Private memory beside it is one slice of 1 M elements and the fp32 absmax of one tensor. A
    checkpoint that bitsandbytes has quantized keeps its bits, quant type and nesting.

    Args:
        model: a folder that holds config.json and safetensors files, or a hub id that is in the local cache.
        device: of all parameters; default: the current CUDA device, else the CPU.
        dtype: of embeddings, norms and all else that is not quantized, and the one weights are rounded to
            before they are; default: config.json's, else the first stored one.
        quant_type, nested: "nf4" or "fp4"; whether absmax is quantized too.
        compute_dtype: in which bitsandbytes' own forward multiplies; default: `dtype`.
        quant_storage: the dtype under which the packed bytes are stored.
        skip_modules: names of modules that stay dense; default: transformers' choice (the output head).
        revision: of a hub id.
        keep_cache: leave the files in the page cache for the next run to find; otherwise each tensor's pages
            are dropped once it is read.
        progress: show a bar of bytes, on terminals only, unless transformers' bars are switched off.
        output_loading_info: as in `from_pretrained`: give (model, missing and other keys), and check nothing.
        options: what else `from_pretrained` takes (attn_implementation, ...).
    Returns: the model, in evaluation mode.
    Raises: WeightsError (a ValueError) where a file is missing, cut or garbled, or where weights are missing
        or have other shapes than config.json says; ValueError for a checkpoint or an argument that is not
        served.

    >>> model = load_4bit("my-model", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: got {quant_type!r}, expected 'nf4' or 'fp4'")
    quantization = dict(
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=quant_storage,
        llm_int8_skip_modules=skip_modules,
    )
    folder = _folder(model, revision)
    with (
        _progress(folder.name, progress) as bar,
        StoredWeights(folder, keep_cache=keep_cache, on_read=bar.update) as stored,
        mapped_allocations(),
    ):
        bar.reset(stored.nbytes)
        loaded, info = _load(folder, stored, quantization, device=device, dtype=dtype, **options)
    loaded.config._name_or_path = loaded.name_or_path = str(model)
    if output_loading_info:
        return loaded, info
    _check(model, loaded, info)
    return loaded


def _load(
    folder: Path,
    stored: StoredWeights,
    quantization: dict[str, Any],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    model_class, config = _model_class(folder)
    dtype = dtype or _default_dtype(config, stored)
    quantization["bnb_4bit_compute_dtype"] = quantization["bnb_4bit_compute_dtype"] or dtype
    return model_class.from_pretrained(
        None,
        config=config,
        dtype=dtype,
        device_map={"": _device(device)},
        output_loading_info=True,
        generation_config=_generation_config(folder),
        **_weights(stored, config, quantization, options.get("key_mapping")),
        **options,
    )


def _check(model: str | os.PathLike[str], loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise WeightsError unless all weights came from the files; warn of what was not used or stays dense."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise WeightsError(
            f"{model}: its files lack {_listing(missing)}, which would be random numbers: download or "
            "convert the model again, or correct config.json (architectures, number of layers)"
        )
    shapes = [*(str(key) for key in info["mismatched_keys"]), *_other_shapes(loaded)]
    if shapes:
        raise WeightsError(f"{model}: weights have other shapes than config.json says: {_listing(shapes)}")
    unused = sorted(info["unexpected_keys"])
    if unused:
        warnings.warn(f"{model}: not used from its files: {_listing(unused)}", stacklevel=3)
    _tell_dense_experts(loaded)


def reads_in_slices(folder: str | os.PathLike[str]) -> bool:
    """Whether `load_4bit` serves this folder: safetensors of a model that transformers has the code of, dense
    or quantized by bitsandbytes to 4 bits."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors*")):
        return False
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return "auto_map" not in raw and not _other_quantization(raw.get("quantization_config"))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _weights(
    stored: StoredWeights,
    config: PretrainedConfig,
    quantization: dict[str, Any],
    key_mapping: dict[str, str] | None,
) -> dict[str, Any]:
    """What from_pretrained takes instead of files."""
    from transformers import BitsAndBytesConfig

    from .sliced_quantizer import LazyWeights, SlicedConfig

    weights = LazyWeights(stored.tensors, key_mapping)
    if getattr(config, "quantization_config", None) is not None:
        return {"state_dict": weights.state_dict}
    sliced = SlicedConfig(BitsAndBytesConfig(load_in_4bit=True, **quantization), weights)
    return {"state_dict": weights.state_dict, "quantization_config": sliced}


def _folder(model: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        raise ValueError(
            f"{model}: a GGUF file: `peftkern finetune --model` converts it, or give a safetensors folder"
        )
    if path.exists():
        raise ValueError(f"{model}: is a file: give the folder that holds it, with its config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{model}: neither a folder nor a hub id in the local cache: download it first "
            f"(`hf download {model}`)"
        ) from error


def _model_class(folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The causal language model that a folder's config.json names, and its config (the text part's)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{folder}: {config.model_type} is no causal language model that transformers has the code of"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = {one.__name__: one for one in (found if isinstance(found, (list, tuple)) else [found])}
    named = [classes[name] for name in config.architectures or () if name in classes]
    model_class = (named or list(classes.values()))[0]
    text = config.sub_configs.get("text_config")
    if text is not None and model_class.config_class is text:
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    return model_class, config


def _config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: has no config.json: give a folder that save_pretrained wrote")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        own = "trust_remote_code" in str(error)
        reason = "brings Python code of its own, which is not run here: load it by from_pretrained"
        raise WeightsError(
            f"{folder}: {reason if own else f'its config.json is not understood ({str(error)[:300]})'}"
        ) from error
    other = _other_quantization(getattr(config, "quantization_config", None))
    if other:
        raise ValueError(
            f"{folder}: is quantized by {other}: give its dense checkpoint, or one that bitsandbytes "
            "quantized to 4 bits"
        )
    return config


def _other_quantization(quantization: Any) -> str:
    """The method that a checkpoint is quantized with, "" if with none or with bitsandbytes to 4 bits."""
    if quantization is None:
        return ""
    plain = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(plain.get("quant_method") or "bitsandbytes")
    if method == "bitsandbytes" and not plain.get("load_in_8bit"):
        return ""
    return f"{method} to 8 bits" if method == "bitsandbytes" else method


def _default_dtype(config: PretrainedConfig, stored: StoredWeights) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    floats = (tensor.dtype for tensor in stored.tensors.values() if tensor.dtype.is_floating_point)
    return next(floats, torch.float32)


def _device(device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


def _generation_config(folder: Path) -> Any:
    """Of the folder's generation_config.json, else what config.json says of it, as from_pretrained does."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextlib.contextmanager
def _progress(name: str, shown: bool) -> Iterator[Any]:
    """One bar of bytes, in the place of transformers' bar of tensors."""
    from tqdm import tqdm
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tqdm(
            desc=f"Loading {name}", unit="B", unit_scale=True, disable=None if shown and was else True
        ) as bar:
            yield bar
    finally:
        if was:
            logging.enable_progress_bar()


def _other_shapes(model: PreTrainedModel) -> Iterator[str]:
    """4-bit weights of another shape than their layer: transformers' check passes over them."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight: {tuple(state.shape)}, expected {(module.out_features, module.in_features)}"


def _tell_dense_experts(model: PreTrainedModel) -> None:
    named = model.named_parameters()
    dense = [parameter for name, parameter in named if parameter.ndim == 3 and "experts" in name]
    if dense:
        size = sum(parameter.numel() * parameter.element_size() for parameter in dense) / 1e9
        warnings.warn(
            f"{len(dense)} parameters of experts stay dense, {size:.2f} GB: bitsandbytes "
            "quantizes linear layers",
            stacklevel=4,
        )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({', '.join(names[:_SHOWN])}{more})"
