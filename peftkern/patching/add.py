"""LoRA layers whose base has no fused form: the base runs as it is, the low-rank branches are added onto its
output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import autocast_off, served
from . import mixed
from .forwards import Forward
from .linears import Adapter, active_adapters, adapter_of
from .plans import branch_operands
from .weights import FLOATS, autocast_dtype

__all__ = ["FORWARDS", "LoraAddForward", "reason_against"]

# PEFT's forwards that compute base_layer(x) plus the active adapters.
FORWARDS = {
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.bnb", "Linear4bit.forward"),
    ("peft.tuners.lora.bnb", "Linear8bitLt.forward"),
    ("peft.tuners.lora.gptq", "GPTQLoraLinear.forward"),
    ("peft.tuners.lora.awq", "AwqLoraLinear.forward"),
    ("peft.tuners.lora.aqlm", "AqlmLoraLinear.forward"),
}
# Of these, the ones that cast what they return back to the base's dtype under CUDA autocast too.
_CASTING = ("GPTQLoraLinear", "Linear")


def reason_against(layer: nn.Module) -> str | None:
    """Why the branch cannot be added onto this layer's base; None where it can."""
    tensors = [*layer.base_layer.parameters(recurse=False), *layer.base_layer.buffers(recurse=False)]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return "its weight is on the meta device; load it first"
    if any(hasattr(tensor, "placements") for tensor in tensors):
        return "its weight is sharded"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "its weight is torch.float64, expected float32, bfloat16 or float16"
    return None


class LoraAddForward(Forward):
    """A PEFT LoRA layer over any base that maps [..., K] to [..., N]; hooks on the base fire, a trainable
    base gets its gradient."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, mixing = self.module, mixed.current(self.module)
        if (
            mixing is not None
            and not args
            and not kwargs
            and any(name in layer.lora_variant for name in mixing)
        ):
            return mixed.run(layer, mixing, x, self)  # PEFT mixes vanilla LoRA alone
        names = kwargs.pop("adapter_names", mixing)
        parts = None if args or kwargs or x.dtype not in FLOATS or not served(x) else _parts(layer, x, names)
        if parts is None:
            return self.stock(x, *args, **kwargs | ({} if names is None else {"adapter_names": names}))
        y = layer.base_layer(x)
        # Elsewhere autocast would cast x for both products; a base that changes the dtype by itself leaves
        # the branch to PEFT's.
        if y.dtype not in FLOATS or (y.dtype != x.dtype and autocast_dtype(x) is None):
            return _sum(y, x, parts, _plain).to(y.dtype)
        with autocast_off(x):
            return _sum(y, x.to(y.dtype), parts, _added).to(_result_dtype(layer, y.dtype))


Part = tuple[
    tuple[int, int] | None, list[Adapter]
]  # rows of the flattened x, None for all; the adapters that are added there


def _parts(layer: nn.Module, x: Tensor, names: list[str] | None) -> list[Part] | None:
    """What is added where; None where only the stock forward can."""
    if layer.disable_adapters or layer.merged or (names is not None and len(names) != len(x)):
        return None
    if names is None:
        found = active_adapters(layer)
        parts = None if isinstance(found, str) else [(None, found)]
    else:
        chosen = [(rows, name) for name, rows in mixed.stretches(layer, names, x)]
        parts = [(rows, [adapter_of(layer, name)] if name in layer.lora_A else []) for rows, name in chosen]
    fits = parts is not None and all(
        isinstance(item, Adapter) and _fits(item, x) for _, adapters in parts for item in adapters
    )
    return parts if fits else None


def _fits(adapter: Adapter, x: Tensor) -> bool:
    weight = adapter.a.weight
    return (
        weight.device == x.device
        and weight.dtype in FLOATS
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
    )


def _sum(y: Tensor, x: Tensor, parts: list[Part], add: Callable[[Tensor, Tensor, Adapter], Tensor]) -> Tensor:
    if not parts:  # a batch of no samples
        return y
    if parts[0][0] is None:
        return functools.reduce(lambda total, item: add(total, x, item), parts[0][1], y)
    flat_y, flat_x = y.flatten(0, -2), x.flatten(0, -2)
    pieces = []
    for (start, stop), adapters in parts:
        piece, rows = flat_y[start:stop], flat_x[start:stop]
        pieces.append(
            functools.reduce(lambda total, item, rows=rows: add(total, rows, item), adapters, piece)
        )
    return torch.cat(pieces).reshape(y.shape)


def _plain(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """As PEFT computes it."""
    return y + adapter.b(adapter.a(adapter.dropout(x.to(adapter.a.weight.dtype)))) * adapter.scaling


def _added(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    bias = None if adapter.b.bias is None else adapter.scaling * adapter.b.bias
    lora_a, lora_b, scaling = branch_operands(adapter.a.weight, adapter.b.weight, adapter.scaling)
    return functional.lora_add(y, x, lora_a, lora_b, bias, scaling=scaling, dropout_p=adapter.dropout_p)


def _result_dtype(layer: nn.Module, base: torch.dtype) -> torch.dtype:
    """What PEFT's forward returns on a base that returns `base`."""
    if not torch.is_autocast_enabled() or any(kind.__name__ in _CASTING for kind in type(layer).__mro__):
        return base
    return torch.promote_types(base, torch.get_autocast_dtype("cuda"))
