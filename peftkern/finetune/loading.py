"""What goes wrong while other people's models are loaded, as one message each that names the file and the
remedy."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .memory import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_folder", "load_errors", "require_all_weights"]

_SHOWN = 5  # names in a message
_LENGTH = 400  # characters of another library's message


@contextlib.contextmanager
def load_errors(model: str, path: str, *, files: str = "config.json and weights") -> Iterator[None]:
    """Turn whatever the libraries raise over the `files` of a model into an InputError; running out of memory
    stays what it is."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"--model {model} could not be loaded: {_damage(Path(path)) or _reason(error, files)}"
        ) from error


def check_folder(model: str, path: Path) -> None:
    """Raise InputError if the folder `path` holds no model, or an adapter."""
    adapter, config = path / "adapter_config.json", path / "config.json"
    if adapter.is_file():
        base = _adapted(adapter)
        raise InputError(
            f"--model {model} holds a LoRA adapter ({adapter.name}), which training would leave out: "
            + (
                f"give its base model (--model {base}), or "
                if base and not config.is_file()
                else "move the adapter's files away, or "
            )
            + "merge the adapter into the base (`peftkern merge`) and give the merged model"
        )
    if not config.is_file():
        raise InputError(
            f"--model {model}: this folder has no config.json: give a folder that save_pretrained "
            "wrote, or a .gguf file"
        )


def require_all_weights(model: str, base: PreTrainedModel, report: dict[str, Any]) -> str:
    """Raise InputError if weights were initialized at random; returns a line on weights of the files that
    were not used, or ""."""
    missing, mismatched = (
        sorted(report["missing_keys"]),
        [*map(str, report["mismatched_keys"]), *_quantized_otherwise(base)],
    )
    if missing:
        raise InputError(
            f"--model {model}: its files lack {_listing(missing)}, which would be random numbers: "
            "download or convert the model again, "
            f"whole and with its output head, or correct config.json (architectures, number of layers)"
        )
    if mismatched:
        raise InputError(
            f"--model {model}: weights have other shapes than config.json says: {_listing(mismatched)}"
        )
    if getattr(base, "_hf_peft_config_loaded", False):
        raise InputError(
            f"--model {model} holds a LoRA adapter beside the base model, which training would leave "
            "out: give the base model alone, or "
            "merge the adapter into it (`peftkern merge`)"
        )
    unused = sorted(report["unexpected_keys"])
    return f"--model {model}: not used from its files: {_listing(unused)}." if unused else ""


def _quantized_otherwise(base: PreTrainedModel) -> Iterator[str]:
    """4-bit weights of another shape than their layer: quantized as they load, they pass transformers'
    check."""
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight: {tuple(state.shape)}, expected {(module.out_features, module.in_features)}"


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({', '.join(names[:_SHOWN])}{more})"


def _adapted(adapter: Path) -> str | None:
    """The base model that an adapter's configuration names."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) else None


def _reason(error: Exception, files: str) -> str:
    """The part of a library's message that tells the cause."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, which is run only with --trust-remote-code (read the code "
            f"first). {text[:_LENGTH]}"
        )
    if "Unrecognized configuration class" in text:
        return (
            "it is no causal language model that transformers knows: "
            f"{text.partition('Model type should be')[0][:_LENGTH]}"
        )
    shortened = text if len(text) <= _LENGTH else text[:_LENGTH] + " ..."
    known = isinstance(error, (OSError, ValueError))
    return (
        shortened
        if known and text
        else f"{type(error).__name__}: {shortened}. Check its {files}, or download it again"
    )


def _damage(path: Path) -> str | None:
    """The first file of a model's folder that is not what its name says."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else ():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            return (
                f"{file}:{error.lineno}: not JSON ({error.msg}, column {error.colno}): download or copy "
                "this file again"
            )
        except (OSError, ValueError, RecursionError) as error:
            return f"{file}: cannot be read ({error}): download or copy this file again"
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        fault = _safetensors_fault(file)
        if fault:
            return f"{file}: {fault}: download or copy this file again"
    return None


def _safetensors_fault(file: Path) -> str | None:
    size = file.stat().st_size
    if size < 8:
        return "empty or cut" if size else "empty"
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        if length > size - 8:
            return "cut, or no safetensors file (its header is longer than the file)"
        try:
            header = json.loads(content.read(length))
            end = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
                default=0,
            )
        except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError) as error:
            return f"its header is garbled ({error})"
    if end != size - 8 - length:
        return f"cut or padded ({size} bytes, {end + 8 + length} expected)"
    return None
