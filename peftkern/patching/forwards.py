"""The forwards that `patch` puts on module instances. Whatever a call asks for beyond the plain case goes to the stock forward."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, functional
from .weights import Operands, WeightCache, autocast_dtype

__all__ = ["Forward", "LinearForward", "LoraForward", "find", "install", "remove"]

_SLOTS = ("forward", "_old_forward")  # accelerate's hooks call `_old_forward`; ours goes inside them


class Forward:
    """A callable bound to its module by a plain attribute: deepcopy and pickle of the module carry it along, correctly rebound."""

    __slots__ = ("module", "previous", "cache")

    def __init__(self, module: nn.Module, previous: Callable[..., Tensor] | None, cache: WeightCache) -> None:
        self.module, self.previous, self.cache = module, previous, cache

    def __getstate__(self) -> tuple[nn.Module, Callable[..., Tensor] | None, WeightCache]:
        return self.module, self.previous, self.cache

    def __setstate__(self, state: tuple[nn.Module, Callable[..., Tensor] | None, WeightCache]) -> None:
        self.module, self.previous, self.cache = state

    def stock(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward the module had before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class LinearForward(Forward):
    """A bare frozen linear, 4-bit or dense."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if args or kwargs or not _served(x) else self.cache.operands(self.module, x)
        if found is None:
            return self.stock(x, *args, **kwargs)
        with _autocast_off(x):
            return functional.linear_4bit(x.to(found.compute), found.weight, found.bias).to(found.result)


class Adapter(NamedTuple):
    """One active vanilla adapter: its two linears, the dropout to apply now, its scaling."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    dropout_p: float
    scaling: float


class LoraForward(Forward):
    """A PEFT LoRA layer over a frozen linear, 4-bit or dense."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.module
        if args or kwargs or layer.disable_adapters or layer.merged or not _served(x) or has_hooks(layer.base_layer):
            return self.stock(x, *args, **kwargs)
        adapters = active_adapters(layer)
        found = self.cache.operands(layer.base_layer, x) if isinstance(adapters, list) else None
        if found is None or any(item.a.weight.device != x.device for item in adapters):
            return self.stock(x)
        with _autocast_off(x):
            y = _fused(x, found, adapters[0])
        for item in adapters[1:]:
            y = y + _low_rank(x, item).to(y.dtype)
        return y.to(_result_dtype(layer, found))


def active_adapters(layer: nn.Module) -> list[Adapter] | str:
    """The active adapters, or why the fused path cannot run them."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return "no active adapter"
    found = []
    for name in names:
        adapter = _adapter(layer, name)
        if isinstance(adapter, str):
            return f"adapter {name!r}: {adapter}"
        found.append(adapter)
    return found


def _adapter(layer: nn.Module, name: str) -> Adapter | str:
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not vanilla LoRA"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
        return f"lora_A is {type(a).__name__}, lora_B is {type(b).__name__}, expected nn.Linear"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"dropout is {type(dropout).__name__}, expected nn.Dropout"
    if has_hooks(a) or has_hooks(b) or has_hooks(dropout):
        return "a hook is registered on lora_A, lora_B or lora_dropout"
    if a.weight.dtype != b.weight.dtype or a.weight.shape[0] > 256:
        return f"lora_A {a.weight.dtype} of rank {a.weight.shape[0]}, lora_B {b.weight.dtype}: expected one dtype and a rank up to 256"
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Adapter(a, b, dropout, dropout_p, layer.scaling[name])


def _fused(x: Tensor, base: Operands, adapter: Adapter) -> Tensor:
    bias = base.bias
    if adapter.b.bias is not None:
        scaled = adapter.scaling * adapter.b.bias
        bias = scaled if bias is None else bias + scaled
    return functional.qlora_linear(
        x.to(base.compute),
        base.weight,
        bias,
        adapter.a.weight,
        adapter.b.weight,
        scaling=adapter.scaling,
        dropout_p=adapter.dropout_p,
    ).to(base.result)


def _low_rank(x: Tensor, adapter: Adapter) -> Tensor:
    """A further adapter's contribution, as PEFT computes it."""
    return adapter.b(adapter.a(adapter.dropout(x.to(adapter.a.weight.dtype)))) * adapter.scaling


def _result_dtype(layer: nn.Module, base: Operands) -> torch.dtype:
    """PEFT's 4-bit layer adds the low-rank part uncast under CUDA autocast; its dense layer always returns the base's dtype."""
    if hasattr(layer, "is_target_conv_1d_layer") or not torch.is_autocast_enabled():
        return base.result
    return torch.promote_types(base.result, torch.get_autocast_dtype("cuda"))


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or changes what this module sees: then it must really be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _served(x: Tensor) -> bool:
    """Whether there are kernels for x's device; elsewhere the stock forward is faster than our reference."""
    return x.device.type == "cpu" or (x.device.type != "meta" and backends.select(x) != "reference")


def _autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The operands are cast already; a kernel's own fp32 arithmetic must not be autocast."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def find(module: nn.Module) -> tuple[str, Forward] | None:
    """The slot of the instance that holds our forward, and the forward."""
    for slot in _SLOTS:
        value = module.__dict__.get(slot)
        if isinstance(value, Forward):
            return slot, value
    return None


def install(module: nn.Module, kind: type[Forward], cache: WeightCache) -> Forward:
    """Put a forward of `kind` on the instance; one that is there already stays."""
    held = find(module)
    if held is not None and type(held[1]) is not kind:
        remove(module)
        held = None
    if held is not None:
        held[1].cache = cache
        return held[1]
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = kind(module, module.__dict__.get(slot), cache)
    setattr(module, slot, forward)
    return forward


def remove(module: nn.Module) -> bool:
    """Give the instance back the forward it had; whether there was one of ours."""
    held = find(module)
    if held is None:
        return False
    slot, forward = held
    if forward.previous is not None:
        setattr(module, slot, forward.previous)
    elif slot == "forward":
        del module.forward
    else:
        setattr(module, slot, types.MethodType(type(module).forward, module))
    return True
