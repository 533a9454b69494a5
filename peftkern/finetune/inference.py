"""An adapter, or a base alone, put to use: text from it, and its perplexity on texts."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import base_changes
from .config import FinetuneConfig
from .errors import InputError
from .stock import prepare_stock, stock_kernels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Generation", "LoadedModel", "complete", "loaded", "perplexities"]

# What of a run's options its adapter is used with, unless said otherwise. Trust is not among them: whoever
# loads an adapter
# of others must not run code because a file of theirs says so.
_TAKEN = ("model", "quantization", "double_quant", "dtype", "seq_length", "loss_on", "eval_tokens")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How text is made: greedily at temperature 0, else by sampling."""

    tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens must be at least 1, got {self.tokens}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature must be 0 (greedy) or greater, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be greater than 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, with its adapter or without."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: FinetuneConfig
    has_adapter: bool

    def base(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the base answers alone."""
        return self.model.disable_adapter() if self.has_adapter else contextlib.nullcontext()

    def autocast(self) -> torch.autocast:
        """The precision that a run evaluates in."""
        from .model import compute_dtype

        dtype = compute_dtype(self.config.dtype)
        return torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype is not torch.float32)


@contextlib.contextmanager
def loaded(adapter: str | None, **options: Any) -> Iterator[LoadedModel]:
    """The adapter in the folder `adapter` on its base, or the base --model alone; `options`: fields of
    FinetuneConfig, None as in the run.

    Raises InputError where the folder holds no adapter, the base cannot be loaded, or neither is given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if adapter is None and "model" not in given:
        raise InputError("give --adapter (the --output of a run), or --model for a base alone")
    config = FinetuneConfig(
        **({"data": ("-",)} | (_of_run(Path(adapter)) if adapter else {}) | given)
    ).resolved()
    with stock_kernels(config):
        yield _load(Path(adapter) if adapter else None, config)


def _of_run(adapter: Path) -> dict[str, Any]:
    """The options by which the adapter was made: its run's where run.json is there, else the base that PEFT
    notes."""
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise InputError(
            f"--adapter {adapter} has no adapter_config.json: give the --output of a finished run, or "
            "a folder PEFT saved"
        )
    try:
        values = {"model": json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")}
        if (adapter / "run.json").is_file():
            record = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
            values |= {key: value for key, value in record["config"].items() if key in _TAKEN}
            for change in base_changes(record.get("base", {}), values["model"]):
                print(f"Beware: {change} since the adapter was trained.", file=sys.stderr)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--adapter {adapter} holds damaged JSON ({error}): give another folder") from None
    return {key: value for key, value in values.items() if value is not None}


def _load(adapter: Path | None, config: FinetuneConfig) -> LoadedModel:
    from .loss import install_model_loss
    from .model import load_base, load_tokenizer, resolve_model

    path = resolve_model(config.model)
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if own else path, trust_remote_code=config.trust_remote_code)
    model: Any = load_base(path, config)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if config.patch:
        import peftkern

        try:
            print(peftkern.patch(model).summary, file=sys.stderr)
        except ValueError as error:
            print(f"Nothing of this model was patched, it runs as it is: {error}", file=sys.stderr)
    else:
        prepare_stock(model)
    install_model_loss(model)
    model.eval()
    return LoadedModel(model, tokenizer, config, adapter is not None)


def _with_adapter(base: Any, adapter: Path) -> Any:
    from safetensors import SafetensorError

    from .adapters import load_adapter

    try:
        return load_adapter(base, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"--adapter {adapter} could not be loaded onto this base: "
            f"{reason[0] if reason else type(error).__name__}. "
            "Give the base it was trained on with --model, or another adapter"
        ) from error


def complete(loaded: LoadedModel, prompt: str, how: Generation, *, stream: bool = True) -> str:
    """Continue `prompt`; returns the continuation, and with `stream` prints it to stdout as it comes.

    Raises InputError where the prompt is empty or, with `how.tokens` more, longer than the model's context.
    """
    from transformers import TextStreamer, set_seed

    model, tokenizer = loaded.model, loaded.tokenizer
    # A prompt that a chat template wrote begins with the token that the tokenizer would put before it once
    # more.
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not begun).to(model.device)
    length, context = (
        inputs["input_ids"].shape[1],
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if not length:
        raise InputError("the prompt is empty: there is nothing to continue")
    if context and length + how.tokens > context:
        raise InputError(
            f"the prompt has {length} tokens, and {how.tokens} more exceed the model's context of "
            f"{context}: shorten one of them"
        )
    set_seed(how.seed)
    sampling = (
        {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p}
        if how.temperature
        else {"do_sample": False}
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad(), loaded.autocast():
        output = model.generate(
            **inputs, max_new_tokens=how.tokens, pad_token_id=pad, streamer=streamer, **sampling
        )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def perplexities(loaded: LoadedModel, sources: tuple[str, ...]) -> dict[str, float]:
    """The perplexity on each of `sources` (as --eval-data), by name, as a run evaluates."""
    from .data import evaluation_names, load_data
    from .inputs import prepare_evaluations
    from .trainer import spread

    config = loaded.config
    rows = {name: load_data(source, option="--data") for name, source in evaluation_names(sources).items()}
    windows = max(1, config.eval_tokens // config.seq_length)
    prepared = prepare_evaluations(config, rows, loaded.tokenizer)
    return {name: _perplexity(loaded, spread(dataset, windows)) for name, dataset in prepared.items()}


def _perplexity(loaded: LoadedModel, dataset: Dataset) -> float:
    total, count = 0.0, 0
    for row in dataset:
        ids, labels = (
            torch.tensor([row[key]], device=loaded.model.device) for key in ("input_ids", "labels")
        )
        with torch.no_grad():
            total += _loss(loaded, ids, labels)
        count += int((labels[:, 1:] != -100).sum())
    if not count:
        raise InputError(
            "no token of this text is left to evaluate on: give more text, or a greater --seq-length"
        )
    return math.exp(total / count) if total / count < 700 else math.inf


def _loss(loaded: LoadedModel, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Summed negative log-likelihood of the labels of one sequence, without its logits where that is
    possible."""
    from .loss import summed_nll

    model = loaded.model
    if loaded.has_adapter and model.active_peft_config.is_prompt_learning:
        with loaded.autocast():
            logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
        flat = logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum").item()
    base = model.get_base_model() if loaded.has_adapter else model
    with loaded.autocast():
        return summed_nll(base, {"input_ids": ids, "labels": labels}).item()
