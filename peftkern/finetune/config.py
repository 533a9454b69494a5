"""Everything a fine-tuning run depends on, in one frozen record."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

from .adapters import DEFAULT, check_adapter, is_lora
from .constants import ALL, ALL_LINEAR, COMPLETIONS, FILTERS, SAMPLE
from .errors import InputError
from .forgetting_options import check_forgetting

__all__ = ["ALL", "ALL_LINEAR", "COMPLETIONS", "FILTERS", "LENGTH", "SAMPLE", "FinetuneConfig"]

# What the sample model needs on 2 CPU cores to finish within five minutes, and what suits a model of some
# billions.
_SAMPLE_DEFAULTS = {
    "seq_length": 256,
    "batch_size": 2,
    "grad_accumulation": 1,
    "lr": 1e-3,
    "steps": 40,
    "eval_tokens": 4096,
    "save_steps": 10,
}
_GENERAL_DEFAULTS = {
    "seq_length": 1024,
    "batch_size": 1,
    "grad_accumulation": 8,
    "lr": 2e-4,
    "eval_tokens": 32768,
    "save_steps": 25,
}

# How a run is started, not what it computes: these may differ between a run and its resumption.
_NOT_COMPARED = (
    "output",
    "resume",
    "overwrite",
    "compare",
    "save_steps",
    "keep_checkpoints",
    "longest_first",
    "shard",
)
# What runs did that were stored before there was the option.
_BEFORE = {
    "adapter": DEFAULT,
    "filter_data": [],
    "document_boundaries": False,
    "source_data": [],
    "fisher": "true",
    "row_losses": False,
    "optimizer": "adamw",
}
# What a resumption may change, because a run can be extended and because memory may not suffice: neither
# changes which rows a step takes.
LENGTH = ("steps", "epochs")
_MEMORY = ("gradient_checkpointing", "batch_size", "grad_accumulation", "fit", "fit_ram", "fit_disk")
_MEMORY += ("pad_to_multiple_of",)

# The least value of each option that is a whole number.
_WHOLE = {
    "r": 1,
    "seq_length": 2,
    "batch_size": 1,
    "grad_accumulation": 1,
    "steps": 1,
    "seed": 0,
    "first_layer": 0,
    "eval_tokens": 1,
    "sample_tokens": 0,
    "save_steps": 1,
    "source_steps": 1,
    "keep_checkpoints": 1,
    "pad_to_multiple_of": 1,
}
_QUANTIZATIONS = ("nf4", "fp4", "none")
_SCHEDULES = ("cosine", "linear", "constant_with_warmup", "slanted")
_WARMUPS = {"slanted": 0.1}  # ULMFiT's cut_frac
_WARMUP = 0.05
# --unfreeze: a number of steps, or LAYER:STEP pairs.
_UNFREEZE = re.compile(r"\d+|\d+:\d+(,\d+:\d+)*")
_DTYPES = ("auto", "bf16", "fp16", "fp32")
_OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "adamw")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of `finetune`; None means "choose for me" and is filled by `resolved()`. Lists of one may be
    given as a string."""

    model: str = SAMPLE
    data: str | tuple[str, ...] = (SAMPLE,)
    eval_data: str | tuple[str, ...] = ()
    filter_data: str | tuple[str, ...] = ()
    source_data: str | tuple[str, ...] = ()
    output: str = "out"
    adapter: str = DEFAULT
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False
    dora: bool = False
    quantization: str = "nf4"
    double_quant: bool = True
    dtype: str = "auto"
    trust_remote_code: bool = False
    seq_length: int | None = None
    packing: bool | None = None
    document_boundaries: bool = False
    loss_on: str | None = None
    batch_size: int | None = None
    grad_accumulation: int | None = None
    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    warmup: float | None = None
    schedule: str = "cosine"
    layer_rates: float | None = None
    lora_plus: float | None = None
    unfreeze: str | None = None
    first_layer: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str | None = None
    gradient_checkpointing: bool = False
    fit: str | None = None
    fit_ram: str | None = None
    fit_disk: str | None = None
    longest_first: bool = False
    pad_to_multiple_of: int | None = None
    shard: bool = False
    seed: int = 0
    forget_budget: float | None = None
    ewc: float | None = None
    l2_sp: float | None = None
    replay: float | None = None
    fisher: str = "true"
    source_steps: int | None = None
    eval_fraction: float = 0.05
    eval_tokens: int | None = None
    prompt: str | None = None
    sample_tokens: int = 32
    save_steps: int | None = None
    keep_checkpoints: int = 2
    row_losses: bool = False
    patch: bool = True
    resume: bool = False
    overwrite: bool = False
    compare: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "eval_data", "filter_data", "source_data", "targets"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        self._check_strings()
        self._check_numbers()
        for name, allowed in (
            ("quantization", _QUANTIZATIONS),
            ("schedule", _SCHEDULES),
            ("dtype", _DTYPES),
            ("optimizer", (None, *_OPTIMIZERS)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{_flag(name)} must be one of {', '.join(filter(None, allowed))}; got "
                    f"{getattr(self, name)!r}"
                )
        if self.loss_on not in (None, COMPLETIONS, ALL):
            raise InputError(f"--loss-on must be {COMPLETIONS} or {ALL}, got {self.loss_on!r}")
        if self.steps is not None and self.epochs is not None:
            raise InputError("give --steps or --epochs, not both")
        if self.resume and self.overwrite:
            raise InputError("give --resume (go on) or --overwrite (start again), not both")
        if self.row_losses and self.filter_data:
            raise InputError(
                "--row-losses numbers the rows as they are in --data: drop --filter-data, or write a "
                "filtered file"
                " first (peftkern data --filter)"
            )
        if self.compare and not self.patch:
            raise InputError("--compare sets peftkern against the unpatched libraries: drop --no-patch")
        if not set(self.filter_data) <= set(FILTERS):
            raise InputError(
                f"--filter-data must be of {', '.join(FILTERS)}; got {' '.join(self.filter_data)}"
            )
        if self.unfreeze is not None and not _UNFREEZE.fullmatch(self.unfreeze):
            raise InputError(
                "--unfreeze must be the steps between two layers (10), or LAYER:STEP pairs (24:0,12:40), got"
                f" {self.unfreeze!r}"
            )
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            others = " ".join(target for target in self.targets if target != ALL_LINEAR)
            raise InputError(
                f"--targets: {ALL_LINEAR} stands for all linear layers: give it alone, or drop it and keep"
                f" {others}"
            )
        if self.shard and self.optimizer not in (None, "adamw"):
            raise InputError(
                f"--optimizer {self.optimizer}: bitsandbytes' optimizers take no parameters in shards: with"
                " --shard use adamw, of which each process then holds its part"
            )
        if self.shard and not is_lora(self):
            raise InputError(f"--shard is for LoRA, and --adapter is {self.adapter}: drop one of them")
        self._check_sizes()
        check_adapter(self)
        check_forgetting(self)
        if not self._on_sample() and not self.eval_data and not self.eval_fraction:
            raise InputError("nothing to evaluate on: give --eval-data, or an --eval-fraction above 0")

    def _check_strings(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not _is_unicode(text):
                    raise InputError(
                        f"{_flag(field.name)} must be valid Unicode (half a surrogate pair or no UTF-8), got"
                        f" {text!a}"
                    )
                if isinstance(text, str) and not text and field.name != "prompt":
                    raise InputError(
                        f"{_flag(field.name)} must not be empty: leave the option out for its default"
                    )
            if (
                isinstance(value, tuple)
                and not value
                and field.name not in ("eval_data", "filter_data", "source_data")
            ):
                raise InputError(f"{_flag(field.name)} needs at least one value")

    def _check_sizes(self) -> None:
        from ..memory.planner.budgets import bytes_of  # which takes errors from this package

        for name in ("fit", "fit_ram", "fit_disk"):
            if getattr(self, name) is not None:
                bytes_of(getattr(self, name), _flag(name))

    def _check_numbers(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{_flag(name)} must be a whole number of at least {least}, got {value!r}")
            if value is not None and value >= 2**31:
                raise InputError(f"{_flag(name)} must be less than 2^31, got {value}")
        for name in (
            "alpha",
            "forget_budget",
            "ewc",
            "l2_sp",
            "replay",
            "epochs",
            "lr",
            "max_grad_norm",
            "layer_rates",
            "lora_plus",
        ):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise InputError(f"{_flag(name)} must be greater than 0 and finite, got {value!r}")
        if not (_is_number(self.weight_decay) and 0 <= self.weight_decay < math.inf):
            raise InputError(f"--weight-decay must be at least 0 and finite, got {self.weight_decay!r}")
        if self.layer_rates is not None and self.layer_rates < 1:
            raise InputError(
                "--layer-rates must be the rate at the top over that at the bottom, 1 or more, got"
                f" {self.layer_rates!r}"
            )
        for name in ("dropout", "warmup", "eval_fraction"):
            value = getattr(self, name)
            if (name, value) != ("warmup", None) and not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{_flag(name)} must be at least 0 and less than 1, got {value!r}")

    def _on_sample(self) -> bool:
        return self.data == (SAMPLE,)

    def resolved(self) -> FinetuneConfig:
        """Fill every "choose for me" that does not need the data: the sample has its own preset."""
        preset = _SAMPLE_DEFAULTS if self.model == SAMPLE and self._on_sample() else _GENERAL_DEFAULTS
        chosen = {
            name: value for name, value in preset.items() if getattr(self, name) is None and name != "steps"
        }
        if self.steps is None and self.epochs is None:
            chosen |= {"steps": preset["steps"]} if "steps" in preset else {"epochs": 1.0}
        if self.warmup is None:
            chosen["warmup"] = _WARMUPS.get(self.schedule, _WARMUP)
        if self.alpha is None and is_lora(self):
            chosen["alpha"] = 2.0 * self.r
        if self.optimizer is None:
            chosen["optimizer"] = "adamw" if self.shard else _default_optimizer()
        if self._on_sample() and not self.eval_data:
            chosen["eval_data"] = (SAMPLE,)
        return dataclasses.replace(self, **chosen)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def to_arguments(self) -> list[str]:
        """The command-line arguments that give this configuration."""
        arguments: list[str] = []
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), _flag(field.name)
            if isinstance(value, bool):
                arguments.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                arguments += [flag, *value] if value else []
            elif value is not None:
                arguments += [flag, str(value)]
        return arguments

    def differences(self, stored: dict[str, Any], processes: tuple[int, int] = (1, 1)) -> list[str]:
        """Lines "option: stored, now" for every option that changes what is computed and may not change in a
        resumption. processes: in how many the stored run began, and how many there are now."""
        ours, stored = self.to_dict(), _BEFORE | stored
        lines = [
            f"{_flag(key)}: {stored.get(key)!r} in the stored run, {value!r} now"
            for key, value in ours.items()
            if key not in (*_NOT_COMPARED, *LENGTH, *_MEMORY) and stored.get(key) != value
        ]
        rows, now = (
            (options.get("batch_size"), options.get("grad_accumulation")) for options in (stored, ours)
        )
        before, after = (f" x {n} processes" if max(processes) > 1 else "" for n in processes)
        if None in rows or rows[0] * rows[1] * processes[0] != now[0] * now[1] * processes[1]:
            lines.append(
                f"--batch-size and --grad-accumulation: {rows[0]} x {rows[1]}{before} in the stored "
                f"run, {now[0]} x"
                f" {now[1]}{after} now (others with the same product will do)"
            )
        return lines

    def changes(self, stored: dict[str, Any]) -> dict[str, list[Any]]:
        """The options that a resumption changes, as [stored, now]."""
        ours = self.to_dict()
        return {
            key: [stored.get(key), ours[key]] for key in (*LENGTH, *_MEMORY) if stored.get(key) != ours[key]
        }


def _default_optimizer() -> str:
    """bitsandbytes' paged 8-bit AdamW on a GPU: its states are a quarter, and may move to the host."""
    import torch

    served = torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    return _OPTIMIZERS[0] if served else "adamw"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
