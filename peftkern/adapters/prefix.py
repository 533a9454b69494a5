"""Prefix tuning with PEFT's own configuration and files, computed inside attention.

PEFT puts a prefix into a new cache at every step, expanded over the batch and in the base's dtype, which
gradient checkpointing cannot repeat and a sliding window forgets. Here the model stays PEFT's `PeftModel`
with PEFT's parameters, and each attention layer joins its part of the prefix to its own softmax.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..patching.attention import release, surround
from .prefix_config import add_gate, fill, fit, is_prefix, set_zero, unfit
from .prefix_files import gate_in, mark_gated, read_gated
from .prefix_layers import Survey, keys_and_values, survey
from .prefix_state import AroundLayer, PrefixState, ShiftedPositions, gate_of

if TYPE_CHECKING:
    from peft import PeftModel, PrefixTuningConfig

__all__ = [
    "INITS",
    "PrefixReport",
    "initialize_prefix",
    "inside_attention",
    "load_prefix",
    "outside_attention",
    "position_shift",
    "prefix_model",
]

INITS = ("text", "random", "zero", "gate")
_STATE = "_peftkern_prefix"
# PEFT's methods that ours stand in place of, on the instance.
_METHODS = (
    "forward",
    "prepare_inputs_for_generation",
    "disable_adapter",
    "add_adapter",
    "load_adapter",
    "save_pretrained",
)


@dataclass(frozen=True)
class PrefixReport:
    """Which attention layers got a prefix, by name, and why the others did not."""

    layers: tuple[str, ...]
    shared: tuple[str, ...]
    refused: dict[str, str]

    @property
    def summary(self) -> str:
        """The same in one line and a line for each refusal."""
        shared = (
            f", {len(self.shared)} of them by the keys they share with an earlier one" if self.shared else ""
        )
        lines = [f"prefix inside {len(self.layers)} attention layers{shared}"]
        return "\n".join(lines + [f"  without: {name}: {reason}" for name, reason in self.refused.items()])


def prefix_model(
    base: nn.Module,
    config: PrefixTuningConfig,
    *,
    init: str = "text",
    text: str | Tensor | None = None,
    tokenizer: Any = None,
    adapter_name: str = "default",
) -> PeftModel:
    """A PEFT model of `base` with a new prefix that is computed inside attention.

    Args:
        base: a frozen transformers decoder or encoder, dense or 4-bit, patched or not; gradient checkpointing
            may be on.
        config: PEFT's. What it leaves open (num_layers, token_dim, num_attention_heads) is filled in from the
            keys that the model's attention is seen to get.
        init: "text", the keys and values that the base computes for a text, which matters most of all
            choices; "random" and "zero", PEFT's; "gate", a start that changes nothing: the text's keys and
            values behind a gate a head and layer that is 0 at first, and beside which the tokens keep their
            own positions.
        text: for "text" and "gate": a string, for which `tokenizer` is needed, or token ids [P or more]. The
            first `num_virtual_tokens` tokens are taken.
    Returns: peft.PeftModel, whose only trainable parameters are the prefix's.
    Raises: ValueError where the model has no layer for a prefix, the text is too short or missing, or an
    argument is unknown.
    Source: Prefix-Tuning (Li and Liang, 2021); "gate": LLaMA-Adapter (Zhang et al., 2023).
    """
    from peft import get_peft_model

    _check_init(init, text, tokenizer, config)
    surveyed = survey(base)
    wanted = fill(config, surveyed)
    with _checkpointing_unseen(base):
        model = get_peft_model(base, config, adapter_name=adapter_name)
        fit(model, adapter_name, surveyed, wanted)
    _install(model, surveyed)
    if init == "zero":
        set_zero(model.prompt_encoder[adapter_name])
    if init in ("text", "gate"):
        initialize_prefix(model, text, tokenizer=tokenizer, adapter_name=adapter_name, gate=init == "gate")
    return model


def load_prefix(
    base: nn.Module,
    folder: str | Path,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """A PEFT model of `base` with the prefix that `folder` holds, PEFT's or a gated one of ours, computed
    inside attention.

    Raises ValueError where the folder holds no prefix, or one of another shape.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    if not is_prefix(config):
        raise ValueError(f"{folder} holds an adapter of the kind {config.peft_type}, expected PREFIX_TUNING")
    surveyed = survey(base)
    config.inference_mode = not is_trainable
    wanted = fill(config, surveyed)
    with _checkpointing_unseen(base):
        model = get_peft_model(base, config, adapter_name=adapter_name)
        fit(model, adapter_name, surveyed, wanted)
    _install(model, surveyed)
    if gate_in(folder):
        add_gate(model.prompt_encoder[adapter_name], config, surveyed)
    model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    return model


def inside_attention(model: PeftModel) -> PrefixReport:
    """Compute the prefixes of a PEFT model inside attention from now on; `outside_attention` gives them back
    to PEFT.

    Changes this instance alone: around the attention functions of its layers, positions before its backbone,
    and the PEFT model's own methods that call, add, load and save. Parameters, state_dict and the files of a
    prefix without a gate stay PEFT's. Raises ValueError where no adapter is a prefix or no layer fits it.
    """
    if not any(is_prefix(config) for config in model.peft_config.values()):
        raise ValueError(
            f"model: none of its adapters {list(model.peft_config)} is a prefix; make one with"
            " PrefixTuningConfig"
        )
    return _install(model, survey(model.get_base_model()))


def position_shift(model: nn.Module) -> int:
    """By how much the tokens' positions are moved by the active prefix of a PEFT model; 0 for any other
    model.
    """
    state = _state(model)
    return 0 if state is None else state.shift()


def outside_attention(model: PeftModel) -> None:
    """Undo `inside_attention`. Raises ValueError for a gated prefix, which PEFT does not have."""
    state = _state(model)
    if state is None:
        return
    gated = [name for name in state.serving if gate_of(model.prompt_encoder[name]) is not None]
    if gated:
        raise ValueError(
            f"model: the prefix {gated[0]!r} has a gate, which PEFT's prefix tuning does not have: delete"
            " that adapter first"
        )
    for module in model.modules():
        release(module)
    state.handle.remove()
    for name in (*_METHODS, _STATE):
        model.__dict__.pop(name, None)


@torch.no_grad()
def initialize_prefix(
    model: PeftModel,
    text: str | Tensor,
    *,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    gate: bool = False,
) -> None:
    """Set a prefix to the keys and values that the base computes for the first tokens of a text; with `gate`,
    behind a gate of 0.

    Without a gate the model then gives, token for token, what the base gives after that text. Raises
    ValueError for a text of fewer tokens than the prefix has, or a prefix with a projection, which cannot be
    inverted.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    config, encoder, state = model.peft_config[name], model.prompt_encoder[name], _state(model)
    if state is None:
        raise ValueError("model: its prefix is not inside attention; call inside_attention(model) first")
    if config.prefix_projection:
        raise ValueError(
            "text: a prefix_projection cannot be set to given keys and values: drop it, or use init='random'"
            " or 'zero'"
        )
    count, ids = config.num_virtual_tokens, _tokens(text, tokenizer)
    if ids.shape[1] < count:
        raise ValueError(
            f"text: has {ids.shape[1]} tokens, the prefix {count}: give a longer text, or fewer"
            " num_virtual_tokens"
        )
    if gate:
        add_gate(encoder, config, state.surveyed)
    first = -count if gate and state.surveyed.rotary else 0
    ids = ids[:, :count].to(encoder.embedding.weight.device)
    with _disable_adapter(model):  # its positions too
        pairs = keys_and_values(model.get_base_model(), state.surveyed, ids, first_position=first)
    weight = encoder.embedding.weight.view(count, config.num_layers, 2, config.num_attention_heads, -1)
    for index, (k, v) in pairs.items():
        if index in state.serving[name]:
            for slot, value in enumerate((k, v)):
                weight[:, index, slot, : value.shape[0], : value.shape[2]] = value.transpose(0, 1).to(weight)


# ---- putting it in


def _install(model: PeftModel, surveyed: Survey) -> PrefixReport:
    state = _state(model)
    if state is None:
        state = model.__dict__[_STATE] = PrefixState(model, surveyed)
        for layer in surveyed.layers:
            surround(layer.module, AroundLayer(state, layer))
        hook = ShiftedPositions(state, surveyed.backbone)
        state.handle = surveyed.backbone.register_forward_pre_hook(hook, with_kwargs=True)
        for name, method in zip(_METHODS, _OURS, strict=True):
            if hasattr(type(model), name):  # only causal language models prepare inputs
                model.__dict__[name] = functools.partial(method, model)
    return _serve(model)


def _serve(model: PeftModel) -> PrefixReport:
    """Note for each prefix which layers get it; the report is of the active one."""
    state, surveyed = _state(model), _state(model).surveyed
    refused = dict(surveyed.refused)
    for name, config in model.peft_config.items():
        if not is_prefix(config) or name not in model.prompt_encoder:
            continue
        reasons = {layer.name: unfit(layer, config) for layer in surveyed.layers}
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        state.serving[name] = frozenset(
            layer.index for layer in surveyed.layers if layer.name not in left_out
        )
        if not state.serving[name]:
            raise ValueError(
                f"prefix {name!r} fits no layer: {next(iter(left_out.values()))}; set token_dim and"
                " num_attention_heads to match"
            )
        if name == model.active_adapter:
            refused |= left_out
    serving = state.serving.get(model.active_adapter, frozenset())
    layers = [layer for layer in surveyed.layers if layer.index in serving]
    shared = tuple(layer.name for layer in layers if layer.source != layer.index)
    return PrefixReport(tuple(layer.name for layer in layers), shared, refused)


def _forward(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """The base's forward: the prefix is inside it. Positional arguments are those of PEFT's forward."""
    names = [
        name
        for name in inspect.signature(type(model).forward).parameters
        if name not in ("self", "args", "kwargs")
    ]
    given = dict(zip(names, args, strict=False)) | kwargs
    given.pop("task_ids", None)
    return model.base_model(**{name: value for name, value in given.items() if value is not None})


def _prepare_inputs(model: PeftModel, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
    return model.base_model_prepare_inputs_for_generation(*args, **kwargs)


@contextlib.contextmanager
def _disable_adapter(model: PeftModel) -> Iterator[None]:
    state, disabled = _state(model), getattr(model, "_adapters_disabled", False)
    before, state.enabled, model._adapters_disabled = state.enabled, False, True
    try:
        yield
    finally:
        state.enabled, model._adapters_disabled = before, disabled


def _add_adapter(model: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's, of a prefix of this model's layers."""
    state = _state(model)
    wanted = fill(peft_config, state.surveyed) if is_prefix(peft_config) else None
    with _checkpointing_unseen(model):
        result = type(model).add_adapter(model, adapter_name, peft_config, *args, **kwargs)
        if wanted is not None:
            fit(model, adapter_name, state.surveyed, wanted)
    _serve(model)
    return result


def _load_adapter(
    model: PeftModel,
    model_id: str,
    adapter_name: str,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """PEFT's, and of a gated prefix in a local folder."""
    from peft import PeftConfig

    gated = gate_in(model_id)
    known = adapter_name in model.peft_config
    if known and gated != (gate_of(model.prompt_encoder[adapter_name]) is not None):
        raise ValueError(
            f"{model_id} holds a prefix {'with' if gated else 'without'} a gate, unlike the adapter"
            f" {adapter_name!r}"
        )
    config = model.peft_config[adapter_name] if known else PeftConfig.from_pretrained(model_id)
    if is_trainable and getattr(config, "prefix_projection", False):
        raise ValueError(
            f"{model_id}: of a prefix_projection PEFT saves the result alone, which cannot be trained on:"
            " start anew"
        )
    if not gated:
        result = type(model).load_adapter(model, model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        _serve(model)
        return result
    if not known:
        config.inference_mode = not is_trainable
        model.add_adapter(adapter_name, config)
        add_gate(model.prompt_encoder[adapter_name], config, _state(model).surveyed)
    read_gated(model_id, model.prompt_encoder[adapter_name])
    if not is_trainable:
        model.eval()
    return None


def _save_pretrained(model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    for name in kwargs.get("selected_adapters") or list(model.peft_config):
        gate = gate_of(model.prompt_encoder[name]) if name in _state(model).serving else None
        if gate is not None:
            mark_gated(Path(save_directory) / ("" if name == "default" else name), gate)


_OURS = (_forward, _prepare_inputs, _disable_adapter, _add_adapter, _load_adapter, _save_pretrained)


def _state(model: nn.Module) -> PrefixState | None:
    return model.__dict__.get(_STATE)


def _tokens(text: str | Tensor, tokenizer: Any) -> Tensor:
    """Ids [1, N] of a text."""
    if isinstance(text, str):
        return tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"]
    ids = torch.as_tensor(text)
    return ids[None] if ids.dim() == 1 else ids[:1]


def _check_init(init: str, text: str | Tensor | None, tokenizer: Any, config: PrefixTuningConfig) -> None:
    if init not in INITS:
        raise ValueError(f"init: got {init!r}, expected one of {', '.join(INITS)}")
    if not is_prefix(config):
        raise ValueError(f"config: got a {type(config).__name__}, expected peft.PrefixTuningConfig")
    if init in ("text", "gate") and text is None:
        raise ValueError(
            f"text: init={init!r} takes the keys and values of a text: give one of the kind to adapt to, or"
            " init='random'"
        )
    if isinstance(text, str) and tokenizer is None:
        raise ValueError("tokenizer: is needed to read a text that is a string; give it, or give token ids")


@contextlib.contextmanager
def _checkpointing_unseen(model: nn.Module) -> Iterator[None]:
    """PEFT refuses a prefix where gradient checkpointing is on, which its own cannot bear and ours can."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True
