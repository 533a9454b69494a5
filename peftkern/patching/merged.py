"""PEFT's `merge` and `unmerge` of one layer: rounded once, in slabs of rows, and undone to the byte.

PEFT's own merge of a 4-bit layer rounds once for every adapter, and its unmerge subtracts and rounds again:
the bytes are lost.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..merging import Branch, folded_bias, merge_dense, requantize_4bit
from .hooks import Ours
from .plans import scaling_of
from .rewrite import Context, Finding, Rewrite
from .weights import FLOATS, is_4bit, repacked, unpack

__all__ = [
    "LayerMerge",
    "Merging",
    "Unmerged",
    "base_weight",
    "branches_of",
    "install_merge",
    "put_weight",
    "reason_against",
    "release_merge",
    "restore_state",
    "unmerged",
]

_MERGES = {
    ("peft.tuners.lora.layer", "Linear.merge"),
    ("peft.tuners.lora.layer", "Embedding.merge"),
    ("peft.tuners.lora.bnb", "Linear4bit.merge"),
}
_COLLECTED_FROM = 1 << 30
_SLOT = "_peftkern_unmerged"  # of the layer; no parameter of it, so that no state_dict has it


@dataclass
class Unmerged:
    """What a layer's base was before the merge: the very objects, put back by `unmerge`."""

    base: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    state: Any  # bitsandbytes keeps one on the module too

    @classmethod
    def of(cls, layer: nn.Module) -> Unmerged:
        base = layer.base_layer
        return cls(base, base.weight, getattr(base, "bias", None), getattr(base, "quant_state", None))

    def put_back(self, layer: nn.Module) -> None:
        """Restore the base; on the device where the layer is now."""
        device = layer.base_layer.weight.device
        layer.base_layer = self.base
        self.base.weight = self.weight
        if self.bias is not None:
            self.base.bias = self.bias
        if is_4bit(self.base):
            self.base.quant_state = self.state
        if self.weight.device != device:
            self.base.to(device)


class LayerMerge(Ours):
    """The `merge` or `unmerge` on a LoRA layer's instance; copies and pickles of the layer have their own."""

    __slots__ = ("layer", "name", "released")

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name, self.released = layer, name, False

    def __getstate__(self) -> tuple[Any, ...]:
        return self.layer, self.name, self.released

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.layer, self.name, self.released = state

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return self._unmerge() if self.name == "unmerge" else self._merge(*args, **kwargs)

    def _stock(self, *args: Any, **kwargs: Any) -> None:
        return getattr(type(self.layer), self.name)(self.layer, *args, **kwargs)

    def _merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        from peft.tuners.tuners_utils import check_adapters_to_merge

        layer, before = self.layer, unmerged(self.layer)
        names = check_adapters_to_merge(layer, adapter_names)
        names = [name for name in names if name in _adapters(layer)]
        if not names:
            return None
        if before is not None and not layer.merged:
            told = "its rounding residual runs as an adapter"
            raise ValueError(f"{told}: call peftkern.adapters.merge.unmerge(model) first")
        if reason_against(layer, names) is not None or (layer.merged and before is None):
            return self._stock(safe_merge=safe_merge, adapter_names=names)
        every = [*layer.merged_adapters, *names]
        origin = before or Unmerged.of(layer)
        try:
            merged = _merged(layer, origin, every, safe_merge)
        except NotFinite as error:  # in the words that callers of PEFT's own know it by
            raise ValueError(f"NaNs detected in the merged weights: {error}") from None
        put_weight(layer, origin, *merged)
        if before is None and not is_4bit(origin.base):
            _collect(origin.weight)
        layer.merged_adapters[:] = every
        return None

    def _unmerge(self) -> None:
        layer, before = self.layer, unmerged(self.layer)
        if before is None:
            return self._stock()
        before.put_back(layer)
        restore_state(layer, None, [])
        if self.released:
            release_merge(layer)
        return None


def unmerged(layer: nn.Module) -> Unmerged | None:
    """What `unmerge` would put back; None where the layer is not merged by ours."""
    return layer.__dict__.get(_SLOT)


class Merging(Rewrite):
    """PEFT's `merge` and `unmerge` of every LoRA layer that is not to be left alone."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's; a linear's row tells of it."""
        layers = [item for item in context.of(module) if item.row is not None and item.row.kind == "lora"]
        return Finding(module, None, made_of=context.excluded(name) is None) if layers else None

    def install(self, finding: Finding) -> None:
        """`release_merge` undoes it."""
        if finding.made_of:
            install_merge(finding.module)
        else:
            release_merge(finding.module)


def install_merge(layer: nn.Module) -> bool:
    """Put ours on a LoRA layer whose class has PEFT's own `merge`; whether it stands there now."""
    merge = getattr(type(layer), "merge", None)
    if merge is None or (merge.__module__, merge.__qualname__) not in _MERGES:
        return False
    for name in ("merge", "unmerge"):
        held = layer.__dict__.get(name)
        if isinstance(held, LayerMerge):
            held.released = False
        elif held is None:
            layer.__dict__[name] = LayerMerge(layer, name)
        else:
            return False  # someone else's
    return True


def release_merge(layer: nn.Module) -> None:
    """Give the layer its class's `merge` and `unmerge` back; a merged one first when it has been unmerged."""
    for name in ("merge", "unmerge"):
        held = layer.__dict__.get(name)
        if not isinstance(held, LayerMerge):
            continue
        held.released = True
        if unmerged(layer) is None:
            del layer.__dict__[name]


def reason_against(layer: nn.Module, names: Sequence[str]) -> str | None:
    """Why these adapters of the layer cannot be merged here; None where they can."""
    origin = unmerged(layer)
    base = layer.base_layer if origin is None else origin.base
    weight = getattr(base, "weight", None) if origin is None else origin.weight
    for name in names:
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            return f"adapter {name!r} is {type(variant).__name__}, which has no merged form here"
        if name in layer.lora_bias and layer.lora_bias[name] and getattr(base, "bias", None) is None:
            return f"adapter {name!r} has a bias, but the base layer has none to take it up"
    if hasattr(base, "base_layer"):
        return "its base layer is itself an adapter's"
    if getattr(getattr(base, "_hf_hook", None), "offload", False):
        return "its base layer is offloaded"
    if weight is None or weight.device.type == "meta" or weight.requires_grad:
        return "its base weight is trainable, or not there"
    if is_4bit(base):
        quantized = getattr(weight, "quant_state", None) is not None
        return None if quantized else "its base weight is not quantized yet, or lost its quant_state"
    plain = type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.dim() == 2
    return None if plain else f"its base weight is {type(weight).__name__} {weight.dtype}"


def base_weight(origin: Unmerged, layer: nn.Module) -> NF4Weight | Tensor:
    """The weight before the merge, [N, K]: 4-bit, or dense (a view where the layer keeps it transposed)."""
    if is_4bit(origin.base):
        if origin.base.weight is origin.weight and repacked(origin.base):
            unpack(origin.base)
        return NF4Weight.from_bnb(origin.weight)
    return origin.weight.data.t() if getattr(layer, "fan_in_fan_out", False) else origin.weight.data


class NotFinite(ValueError):
    """Of an adapter that holds NaN or inf, or a merged weight beyond its dtype."""


def branches_of(layer: nn.Module, names: Sequence[str]) -> list[Branch]:
    """The adapters as they run, in this order; raises NotFinite where one holds NaN or inf."""
    found = []
    for name in names:
        scaling = scaling_of(layer, name)
        if name in layer.lora_A:
            a, b, bias = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_B[name].bias
            magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None
        else:  # an embedding: its rows are words, and A is the side that has them
            a, b, bias, magnitude = (
                layer.lora_embedding_B[name].t(),
                layer.lora_embedding_A[name].t(),
                None,
                None,
            )
        parts = [part for part in (a, b, bias, magnitude) if part is not None]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NotFinite(f"adapter {name!r} holds NaN or inf; load an earlier checkpoint")
        work = torch.promote_types(b.dtype, torch.float32)
        up = b.detach().to(work) * scaling
        own = None if bias is None else bias.detach().to(work) * scaling
        found.append(Branch(up, a.detach(), None if magnitude is None else magnitude.detach(), own))
    return found


def put_weight(layer: nn.Module, origin: Unmerged, weight: NF4Weight | Tensor, bias: Tensor | None) -> None:
    """Let the layer's base have a merged weight, and remember `origin`; a plain linear takes a dense one.

    A tied weight is untied: its other owner keeps the old one.
    """
    base = origin.base
    if isinstance(weight, NF4Weight):
        base.weight = _params4bit(origin.weight, weight)
        base.quant_state = base.weight.quant_state
    elif is_4bit(base):
        base = nn.Linear(base.in_features, base.out_features, bias=origin.bias is not None, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        base.train(origin.base.training)
        if origin.bias is not None:
            base.bias = nn.Parameter(origin.bias.detach().to(weight.dtype), requires_grad=False)
    else:
        base.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
    layer.base_layer = base
    layer.__dict__[_SLOT] = origin


def restore_state(layer: nn.Module, origin: Unmerged | None, merged: Sequence[str]) -> None:
    """Say what a layer whose base was swapped is merged from, and which adapters PEFT counts as merged."""
    layer.__dict__.pop(_SLOT, None)
    if origin is not None:
        layer.__dict__[_SLOT] = origin
    layer.merged_adapters[:] = list(merged)


_kept = 0  # bytes of dense weights that merges have replaced since the last collection


def _collect(weight: Tensor) -> None:
    """Free dense weights of layers that `merge_and_unload` has dropped.

    A layer and its forward refer to each other: only the garbage collector finds them, and it counts objects.
    """
    global _kept
    _kept += weight.numel() * weight.element_size()
    if _kept > _COLLECTED_FROM:
        _kept = 0
        gc.collect()


def _adapters(layer: nn.Module) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _merged(
    layer: nn.Module,
    origin: Unmerged,
    names: Sequence[str],
    check: bool,
) -> tuple[NF4Weight | Tensor, Tensor | None]:
    """The merged weight in the form that the base has, and the merged bias where an adapter has one."""
    weight, branches = base_weight(origin, layer), branches_of(layer, names)
    if isinstance(weight, NF4Weight):
        merged: NF4Weight | Tensor = requantize_4bit(weight, branches)
    else:
        merged = torch.empty_like(origin.weight.data)
        merge_dense(weight, branches, out=merged.t() if getattr(layer, "fan_in_fan_out", False) else merged)
        if check and not bool(torch.isfinite(merged).all()):
            told = f"the weight merged with {', '.join(names)}"
            raise NotFinite(f"{told} is beyond the range of {merged.dtype}")
    has_bias = any(branch.bias is not None for branch in branches)
    return merged, folded_bias(weight, branches, origin.bias.data) if has_bias else None


def _params4bit(old: nn.Parameter, weight: NF4Weight) -> nn.Parameter:
    """bitsandbytes' parameter for other bytes in the format and the storage of `old`."""
    state, new = copy.copy(old.quant_state), copy.copy(old)
    if weight.nested:
        state.absmax, state.offset, state.state2 = (
            weight.absmax_8bit,
            weight.absmax_offset,
            copy.copy(state.state2),
        )
        state.state2.absmax = weight.nested_absmax
    else:
        state.absmax = weight.absmax
    with torch.no_grad():
        new.data = weight.packed.reshape(-1).view(old.dtype).view(old.shape)
    new.quant_state = state
    return new
