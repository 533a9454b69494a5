"""Which modules of a model can be patched, and why others cannot. PEFT and bitsandbytes are recognized by
structure, never imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..runtime import backends
from . import add
from .dora import active_dora
from .forwards import find
from .hooks import against, has_hooks
from .linears import LinearForward, LoraForward, active_adapters
from .report import Row
from .rewrite import Context, Finding, Rewrite
from .weights import FLOATS, WeightCache, forward_reason, is_4bit, repacked, slow_products, unpack

__all__ = [
    "Linears",
    "against_4bit_weight",
    "against_base",
    "against_device",
    "against_forward",
    "is_lora",
    "replaced_on_instance",
]

_PEFT_FORWARDS = {
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.bnb", "Linear4bit.forward"),
}


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is shaped like a PEFT LoRA layer."""
    return all(
        hasattr(module, name)
        for name in ("base_layer", "lora_A", "lora_B", "scaling", "lora_dropout", "active_adapters")
    )


class Linears(Rewrite):
    """LoRA layers, 4-bit linears and (with `dense`) frozen dense linears."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's."""
        layers = _layers(context)
        if id(module) in layers.inside:
            return None
        if is_lora(module):
            return _lora(name, module, context)
        if is_4bit(module) or (
            type(module) is nn.Linear and not _trainable(module) and _wants_dense(module, context.dense)
        ):
            return _linear(name, module, context)
        return None


class _Layers:
    """What the linears of a model have in common. inside: modules of adapters, which are no linears of their
    own; told: names of bases whose LoRA layer's row tells of them; weights: one cache for a LoRA layer and
    its base."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if is_lora(layer)]
        self.inside = {id(child) for layer in layers for child in _adapter_modules(layer)}
        self.told: set[str] = set()
        self.weights: dict[int, WeightCache] = {}

    def cache(self, base: nn.Module) -> WeightCache:
        return self.weights.setdefault(id(base), WeightCache())


def _layers(context: Context) -> _Layers:
    if Linears not in context.shared:
        context.shared[Linears] = _Layers(context.model)
    return context.shared[Linears]


def _adapter_modules(layer: nn.Module) -> list[nn.Module]:
    dicts = (child for name, child in layer.named_children() if name.startswith("lora_"))
    return [module for child in dicts for module in child.modules()]


def _trainable(module: nn.Module) -> bool:
    return module.weight.requires_grad


def _wants_dense(module: nn.Module, dense: bool | None) -> bool:
    if dense is not None:
        return dense
    dtype = module.weight.dtype
    return module.weight.device.type == "cpu" and backends.available("cpu")[0] and slow_products(dtype)


def _lora(name: str, layer: nn.Module, context: Context) -> Finding:
    base, layers = layer.base_layer, _layers(context)
    static = context.excluded(name) or against_forward(layer)
    against_fusion = None if static else _fusion_reason(layer)
    note = "" if static or against_fusion else _prepare(base)
    against_fusion = against_fusion or (None if static else _weight_reason(base))
    if against_fusion:  # the branch may still be added onto what the base gives
        static, note = _addition_reason(layer), f"on its stock base: {against_fusion}"
    adapters = () if static else active_adapters(layer)
    reason = static or (adapters if isinstance(adapters, str) else None)
    got, forward = ("lora_add", add.LoraAddForward) if against_fusion else ("qlora_linear", LoraForward)
    if reason and not static and not against_fusion and not isinstance(active_dora(layer), str):
        got, reason = "dora_linear", None
    row = _row(
        name,
        "lora",
        base,
        got,
        reason,
        note,
        adapters=tuple(a for a in layer.active_adapters if a in layer.lora_A),
    )
    if row.got in ("qlora_linear", "dora_linear"):
        layers.told.add(f"{name}.base_layer")
    if static is not None:
        return Finding(layer, row)
    return Finding(layer, row, forward, layers.cache(base))


def _fusion_reason(layer: nn.Module) -> str | None:
    forward = type(layer).forward
    if (forward.__module__, forward.__qualname__) not in _PEFT_FORWARDS:
        return (
            f"base layer is {type(layer.base_layer).__module__}.{type(layer.base_layer).__name__}, which "
            "has no fused form"
        )
    return against_base(layer.base_layer) or against("the base layer", layer.base_layer)


def _addition_reason(layer: nn.Module) -> str | None:
    """Why not even the low-rank branch is ours."""
    found = add.reason_against(layer)
    return found or against_device(next(layer.lora_A.parameters(), torch.empty(0, device="cpu")))


def _linear(name: str, module: nn.Module, context: Context) -> Finding:
    layers = _layers(context)
    reason = context.excluded(name) or against_base(module)
    note = "" if reason else _prepare(module)
    reason = reason or _weight_reason(module)
    row = _row(name, "linear", module, "linear_4bit" if is_4bit(module) else "linear", reason, note)
    row = None if name in layers.told else row
    return Finding(module, row) if reason else Finding(module, row, LinearForward, layers.cache(module))


def _row(
    name: str,
    kind: str,
    base: nn.Module,
    got: str,
    reason: str | None,
    note: str,
    adapters: tuple[str, ...] = (),
) -> Row:
    n, k = getattr(base, "out_features", None), getattr(base, "in_features", None)
    shape = (n, k) if isinstance(n, int) and isinstance(k, int) else None
    return Row(name, kind, _describe(base), "stock" if reason else got, shape, adapters, reason, note)


def _describe(base: nn.Module) -> str:
    if not is_4bit(base):
        weight = getattr(base, "weight", None)
        dtype = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else "no weight"
        return dtype if isinstance(base, nn.Linear) else f"{type(base).__name__} {dtype}"
    nested = ", nested" if getattr(base.weight, "compress_statistics", False) else ""
    return f"{getattr(base.weight, 'quant_type', '4-bit')}{nested}"


def against_forward(layer: nn.Module) -> str | None:
    """The class's forward must be one whose meaning is known: PEFT's own, inherited or not."""
    forward = type(layer).forward
    origin = (forward.__module__, forward.__qualname__)
    if origin not in add.FORWARDS:
        return f"{type(layer).__name__}.forward is {'.'.join(origin)}, which has no fused form"
    return replaced_on_instance(layer)


def against_base(base: nn.Module) -> str | None:
    """Why a base layer is not known to be a linear of its weight and bias, or has to be called."""
    reason = forward_reason(base)
    if reason:
        return reason
    if has_hooks(base):
        return "a hook is registered on the base layer"
    return replaced_on_instance(base)


def replaced_on_instance(module: nn.Module) -> str | None:
    """Whether a forward that is not ours stands on the instance, in words."""
    if find(module) is not None or "forward" not in module.__dict__ or "_old_forward" in module.__dict__:
        return None
    return (
        "its forward was replaced on the instance by "
        f"{getattr(module.forward, '__qualname__', type(module.forward).__name__)}"
    )


def _prepare(base: nn.Module) -> str:
    """Bring back a weight that bitsandbytes repacked; a note for the report where it did."""
    if not (is_4bit(base) and repacked(base)):
        return ""
    try:
        lost = unpack(base)
    except (ImportError, AttributeError, ValueError, RuntimeError):
        return ""
    return f"unpacked from bitsandbytes' CPU inference layout: {lost or 'nothing was lost'}"


def _weight_reason(base: nn.Module) -> str | None:
    weight = base.weight
    if weight.device.type == "meta":
        return "its weight is on the meta device; load it first"
    if is_4bit(base):
        return against_4bit_weight(base) or against_device(weight)
    if type(weight) is not nn.Parameter:
        return f"its weight is {type(weight).__module__}.{type(weight).__name__}, expected a plain parameter"
    if weight.requires_grad:
        return "its base weight is trainable"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, expected float32, bfloat16 or float16"
    return against_device(weight)


def against_4bit_weight(base: nn.Module) -> str | None:
    """Why a 4-bit weight cannot be read; None where it can."""
    try:
        weight = NF4Weight.from_bnb(base)
    except ValueError as error:
        return str(error)
    expected = (base.out_features, base.in_features)
    return (
        None
        if weight.shape == expected
        else f"its weight was quantized as {weight.shape}, the layer is {expected}"
    )


def against_device(weight: Tensor) -> str | None:
    """Why there are no kernels for the device of `weight`; None where there are."""
    if weight.device.type == "cpu" or backends.select(weight) != "reference":
        return None
    return f"no kernels for {weight.device.type} in this version"
