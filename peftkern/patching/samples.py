"""Modules that hold parts of several adapters and that no fused function mixes: each adapter's samples run by
themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from . import mixed
from .forwards import Forward

__all__ = ["SampleForward", "holders", "obstacle"]


class SampleForward(Forward):
    """A module whose stock forward runs once for each adapter of the batch, on that adapter's samples."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = mixed.current(self.module)
        if names is None or self.module.__dict__.get("_disable_adapters", False):
            return self.stock(*args, **kwargs)
        if len(args) != 1 or any(isinstance(value, Tensor) for value in kwargs.values()):
            raise ValueError(
                f"{mixed.label(self.module)}: got {len(args)} positional arguments, {sorted(kwargs)}; "
                f"{mixed.ONE_TENSOR}"
            )
        return mixed.run(self.module, names, args[0], lambda part: self.stock(part, **kwargs))


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model that holds parts of adapters by their names: PEFT's layers, and what it wraps
    to train it."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if _holds(module) and id(module) not in inside:
            inside |= {id(child) for child in (module._modules.get("token_adapter"),) if child is not None}
            yield name, module


def _holds(module: nn.Module) -> bool:
    parts = (*getattr(type(module), "adapter_layer_names", ()), "lora_A")
    return "_adapters" in module.__dict__ or (
        "base_layer" in module._modules and any(hasattr(module, part) for part in parts)
    )


def obstacle(name: str, module: nn.Module, wanted: Sequence[str]) -> str | None:
    """Why the module cannot run each sample with its own adapter; None where it can."""
    merged = [
        *getattr(module, "merged_adapters", ()),
        *getattr(module._modules.get("token_adapter"), "merged_adapters", ()),
    ]
    if merged:
        return f"{', '.join(map(repr, merged))} is merged into its weight; call unmerge_adapter() first"
    if not mixed.own_adapters(module) & set(wanted) and not set(
        getattr(module, "active_adapters", ())
    ) & mixed.own_adapters(module):
        return None  # it runs its base
    if "experts" in name.split("."):
        return "it gets the tokens that a router chose, not samples"
    if hasattr(module, "parameter_name") or type(module).__name__ == "MultiheadAttention":
        return f"{type(module).__name__} does more than map one tensor of samples"
    variants = getattr(module, "lora_variant", {})
    found = next(
        (
            type(variants[key]).__name__
            for key in wanted
            if key in variants and "ALora" in type(variants[key]).__name__
        ),
        None,
    )
    if found is not None:
        return f"{found} wants to know where in each sample it begins"
    if any(
        inner is not module and _holds(inner) and inner is not module._modules.get("token_adapter")
        for inner in module.modules()
    ):
        return "a part of it holds adapters itself"
    if module.training and any(
        isinstance(inner, nn.modules.batchnorm._BatchNorm) for inner in module.modules()
    ):
        return "it normalizes over the samples of a batch"
    return None
