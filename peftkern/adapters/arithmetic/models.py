"""Adapters taken from a model that holds them, and given to one."""

from __future__ import annotations

from typing import Any

from torch import nn

from .lora import LoraWeights
from .lora_files import assemble, state_of

__all__ = ["add_to_model", "of_model"]


def of_model(model: nn.Module, name: str = "default") -> LoraWeights:
    """An adapter that a PeftModel holds; its tensors are the model's own, not copies.

    Raises: ValueError where the model has no LoRA adapter of this name.
    """
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if name not in configs:
        raise ValueError(
            f"name: the model has no adapter {name!r}; it has {', '.join(map(repr, configs)) or 'none'}",
        )
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in configs[name].to_dict().items()
    }
    config = {key: value.value if hasattr(value, "value") else value for key, value in config.items()}
    if config.get("peft_type") != "LORA":
        raise ValueError(f"name: adapter {name!r} is of kind {config.get('peft_type')}, expected LORA")
    config = {key: value for key, value in config.items() if key != "runtime_config"}
    return assemble(name, config, get_peft_model_state_dict(model, adapter_name=name), f"adapter {name!r}")


def add_to_model(model: nn.Module, adapter: LoraWeights, name: str) -> None:
    """Give a PeftModel this adapter under a new name, inactive. A patched model runs it after the next
    `peftkern.patch(model)` where it adapts modules that had no LoRA before; on the others it runs at once.

    Raises: ValueError where the name is taken, or the adapter does not fit the model.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    if name in model.peft_config:
        raise ValueError(f"name: the model already has an adapter {name!r}; choose another")
    known = set(LoraConfig.__dataclass_fields__)
    values = {key: value for key, value in adapter.config.items() if key in known}
    config = LoraConfig(**_fields(values))
    try:
        model.add_adapter(name, config)
        outcome = set_peft_model_state_dict(model, state_of(adapter), adapter_name=name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"adapter: {adapter.name} does not fit this model ({str(error).splitlines()[0]})"
        ) from error
    if outcome.unexpected_keys:
        raise ValueError(
            f"adapter: {adapter.name} has tensors that the model has no place for, as"
            f" {outcome.unexpected_keys[0]}"
        )


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration read from JSON, with peft_type left to LoraConfig."""
    return {
        key: value
        for key, value in values.items()
        if key not in ("peft_type", "auto_mapping", "peft_version")
    }
