"""--adapter prefix: prefix tuning inside attention, begun from the first words of the training data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..memory.planner.shapes import Shape
    from .config import FinetuneConfig

__all__ = ["NAME", "add", "check", "load", "planned"]

NAME = "prefix"
_INITS = ("text", "random", "zero", "gate")
_ROWS = 1000  # of the data at most are read for the text to begin with


@dataclass(frozen=True)
class _Options:
    """What stands in brackets: the prefix's length and how it begins."""

    tokens: int = 32
    init: str = "text"


def check(config: FinetuneConfig) -> None:
    """Raise InputError where --adapter cannot be read, or an option is given that a prefix does not have."""
    _options(config.adapter)
    default = type(config).__dataclass_fields__
    for name in ("r", "dropout"):
        if getattr(config, name) != default[name].default:
            raise InputError(
                f"--{name} is no option of --adapter prefix: drop it; its length is given as"
                " prefix[tokens=50]"
            )
    for name in ("layer_rates", "unfreeze"):
        if getattr(config, name) != default[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} treats layers apart, and the prefix is one parameter for all of them: drop it"
            )


def add(base: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """The base with a new prefix."""
    from peft import PrefixTuningConfig

    from ..adapters.prefix import prefix_model

    options = _options(config.adapter)
    text = _first_tokens(config, options.tokens) if options.init in ("text", "gate") else None
    try:
        made = PrefixTuningConfig(num_virtual_tokens=options.tokens, task_type="CAUSAL_LM")
        return prefix_model(base, made, init=options.init, text=text)
    except ValueError as error:
        raise InputError(f"--adapter {config.adapter} does not fit {config.model}: {error}") from error


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with a saved prefix, PEFT's own too."""
    from ..adapters.prefix import load_prefix

    return load_prefix(base, folder)


def planned(config: FinetuneConfig, shape: Shape) -> dict[str, Any]:
    """The prefix as the planner counts it; InputError where its formulas do not hold."""
    options = _options(config.adapter)
    reason = "its attention has a soft cap on its scores" if shape.dense_attention else ""
    if options.init == "gate":
        reason = "init=gate puts one beside attention's output"
    if reason:
        raise InputError(
            f"--adapter {config.adapter}: the planner knows a prefix that is joined to fused attention alone,"
            f" and {reason}: drop --fit, or choose another --adapter"
        )
    return {"rank": 0, "prefix": options.tokens}


def _first_tokens(config: FinetuneConfig, count: int) -> Any:
    """Ids of the first tokens of the training data."""
    import torch

    from .data import first_rows
    from .resolve import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    ids: list[int] = []
    for row in first_rows(config.data, _ROWS):
        ids += tokenizer(_text(row))["input_ids"]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise InputError(
        f"--adapter {config.adapter}: the first {_ROWS} rows of --data have {len(ids)} tokens, the prefix"
        f" {count}: give a shorter one (prefix[tokens=20]), or let it begin otherwise (prefix[init=random])"
    )


def _text(row: dict[str, Any]) -> str:
    """The words of a row, without a chat template's marks."""
    parts = [row[key] for key in ("text", "prompt", "completion", "messages") if key in row]
    turns = [turn["content"] for part in parts if not isinstance(part, str) for turn in part]
    words = [part for part in parts if isinstance(part, str)] + turns
    return "\n".join(word if isinstance(word, str) else json.dumps(word) for word in words)


def _options(value: str) -> _Options:
    """What --adapter says: prefix, or prefix[tokens=50,init=random]."""
    _, bracket, inside = value.partition("[")
    if bracket and not inside.endswith("]"):
        raise InputError(
            f"--adapter {value}: the bracket is not closed; write for example prefix[tokens=50,init=text]"
        )
    given: dict[str, Any] = {}
    for pair in filter(None, inside.removesuffix("]").split(",")):
        name, equals, text = (part.strip() for part in pair.partition("="))
        if name == "tokens" and text.isdecimal() and 1 <= int(text) < 2**16:
            given[name] = int(text)
        elif name == "init" and text in _INITS:
            given[name] = text
        else:
            raise InputError(
                f"--adapter {value}: {pair.strip()!r} is no option of a prefix; it has tokens=1 or more and"
                f" init={', '.join(_INITS)}"
            )
    return _Options(**given)
