"""`mixed_adapters`, and the modules that hold parts of several adapters and that no fused function mixes:
there each adapter's samples run by themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from . import mixed
from .add import LoraAddForward
from .forwards import Forward, find, install, remove
from .linears import LoraForward

__all__ = ["SampleForward", "holders", "mixed_adapters", "obstacle"]


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within it, each sample of a batch runs through the adapter named for it, in training too, on one shared
    base.

    The LoRA layers' rows of one stretch of equal names make one low-rank product; samples sorted by adapter
    are fastest. Whatever else
    holds parts of the adapters follows the samples too, by one call for each adapter: a head in
    modules_to_save, LoRA on embeddings and convolutions, trainable tokens, layers that are excluded or
    variants of LoRA. Each adapter gets the gradients of its own samples. With gradient checkpointing the
    backward pass, which calls the layers again, belongs within it too.

    Args:
        model: a patched PEFT LoRA model.
        adapter_names: a name for each sample of the batch; "__base__" for none of them.
    Raises: ValueError where a name is no adapter of the model, the model is not patched, a module cannot tell
    the samples apart (before
        anything is computed, by the module's name), or (at the call) the batch's size differs.
    Source: Punica (Chen et al., 2023) for the segments; PEFT allows `adapter_names` in evaluation only.
    """
    ours = (LoraForward, LoraAddForward)
    held = dict(holders(model))
    layers = {
        name: layer
        for name, layer in held.items()
        if (found := find(layer)) is not None and isinstance(found[1], ours)
    }
    if not layers:
        raise ValueError(
            f"model: no LoRA layer of {type(model).__name__} is patched; call peftkern.patch(model) first"
        )
    known = {name for module in held.values() for name in mixed.own_adapters(module)} | {mixed.BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(
            f"adapter_names: {', '.join(map(repr, unknown))} unknown; the model has "
            f"{', '.join(sorted(known))}"
        )
    against = {
        name: reason
        for name, module in held.items()
        if (reason := obstacle(name, module, adapter_names)) is not None
    }
    if against:
        name, reason = next(iter(against.items()))
        more = f" (and {len(against) - 1} more)" if len(against) > 1 else ""
        raise ValueError(f"model: {name}{more} cannot mix adapters: {reason}")
    if any(_reentrant(module) for module in model.modules()):
        raise ValueError(
            "model: its reentrant gradient checkpointing cannot tell that a recomputation left this "
            "block; call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}), which notices'
        )
    with contextlib.ExitStack() as stack:
        for name, module in held.items():
            stack.enter_context(mixed.names(module, adapter_names, name))
            if name not in layers and find(module) is None:
                install(module, SampleForward, None)
                stack.callback(remove, module)
        yield


def _reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(module, "gradient_checkpointing", False)) and getattr(checkpoint, "keywords", {}).get(
        "use_reentrant", True
    )


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
