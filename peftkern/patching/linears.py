"""Linears, bare and with LoRA adapters, as a plan says: alone, or with siblings that get the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import autocast_off, served
from ..runtime import backends
from . import dora, mixed
from .decode import Ready
from .forwards import Forward
from .hooks import against, direct
from .plans import DoraPlan, Plan, branch_operands, scaling_of
from .watch import Watch
from .weights import Operands, WeightCache, address_of, autocast_dtype, parameter

__all__ = [
    "Adapter",
    "LinearForward",
    "LoraForward",
    "PlannedForward",
    "active_adapters",
    "adapter_of",
]


class PlannedForward(Forward):
    """A linear that is computed as a plan says, alone or with its group."""

    __slots__ = ()

    def __init__(self, module: nn.Module, previous: Callable[..., Tensor] | None, cache: WeightCache) -> None:
        super().__init__(module, previous, cache)
        self.ready = Ready([self])

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state)
        self.ready = Ready([self])

    def let_go(self) -> None:
        """As Forward's; alone or with the group."""
        self.ready = Ready([self])
        if self.group is not None:
            self.group.let_go()

    def plan(self, x: Tensor) -> Plan | None:
        """What to compute for x; None where only the stock forward can."""
        raise NotImplementedError

    def work(self, x: Tensor) -> Plan | DoraPlan | None:
        """As `plan`, and what no `Member` can say."""
        return self.plan(x)

    def signature(self) -> tuple | None:
        """Something that stays equal as long as `work` gives the same; None where that cannot be told
        cheaply."""
        raise NotImplementedError

    def watch(self, seen: Watch) -> bool:
        """Let all be seen on which `signature` depends; whether that can be done."""
        raise NotImplementedError

    def run(self, x: Tensor, plan: Plan | DoraPlan) -> Tensor:
        """The plan alone."""
        with autocast_off(x):
            return plan.cast(plan.alone(x.to(plan.compute)))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not served(x):
            return self.otherwise(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            # what siblings leave for each other is a side effect, which no checkpointed region of a graph may
            # have
            group = None
        else:
            group = self.group
            part = None if group is None else group.fetch(self, x)
            if part is None and x.is_cpu and not torch.is_grad_enabled():
                part = self._few_rows(x)
            if part is not None:
                return part
            if group is not None and group.dissolved is None:
                part = group.prepared_part(self, x)
                if part is not None:
                    return part
            else:
                call = self.prepared(x)
                if call is not None:
                    return call(x)
        plan = self.work(x)
        if plan is None:
            return self.stock(x)
        return self.run(x, plan) if group is None else group.run(self, x, plan)

    def otherwise(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A call with more than a tensor that there are kernels for."""
        return self.stock(x, *args, **kwargs)

    def prepared(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """`run` of `work(x)`, checked and described for as long as nothing that it was made of has changed;
        None where that cannot be told cheaply."""
        if torch.is_autocast_enabled(x.device.type) or torch.is_autocast_enabled():
            return None
        part = self.signature()
        if part is None:
            return None
        signature = (type(self), x.dtype, x.shape[-1:], x.device, part)
        known, call = self.cache.prepared
        if signature != known:
            plan = self.work(x)
            call = plan.prepare(x) if type(plan) is Plan else None
            self.cache.prepared = signature, call
        return call

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """With what an earlier call prepared; None where it does not serve."""
        if self.group is not None and self.group.dissolved is None:
            return self.group.few_rows(self, x)
        parts = self.ready(x)
        return None if parts is None else parts[0]


class LinearForward(PlannedForward):
    """A bare frozen linear, 4-bit or dense."""

    __slots__ = ()

    def plan(self, x: Tensor) -> Plan | None:
        found = self.cache.operands(self.module, x)
        if found is None:
            return None
        return Plan(functional.Member(found.weight, found.bias), found.compute, found.result, found.result)

    def signature(self) -> tuple | None:
        return self.cache.signature(self.module)

    def watch(self, seen: Watch) -> bool:
        return self.cache.watch(self.module, seen)


class Adapter(NamedTuple):
    """One active vanilla adapter: its two linears, the dropout to apply now, its scaling (see
    `scaling_of`)."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    dropout_p: float
    scaling: float | Tensor


class LoraForward(PlannedForward):
    """A PEFT LoRA layer over a frozen linear, 4-bit or dense."""

    __slots__ = ()

    def otherwise(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PlannedForward's; `adapter_names` names an adapter for each sample."""
        layer, told = self.module, "adapter_names" in kwargs
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self.stock(x, *args, **kwargs) if args or kwargs or not told else self(x)
        if (
            args
            or kwargs
            or layer.disable_adapters
            or len(names) != len(x)
            or not set(names) <= {*layer.lora_A, mixed.BASE}
        ):
            return self.stock(x, *args, adapter_names=names, **kwargs)
        with mixed.names(layer, names):
            plan = self.plan(x) if served(x) else None
        return self.stock(x, adapter_names=names) if plan is None else self.run(x, plan)

    def stock(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward the module had before, which mixes the same adapters."""
        names, variants = mixed.current(self.module), self.module.lora_variant
        if names is None:
            return super().stock(*args, **kwargs)
        if (
            len(args) == 1 and not kwargs and any(name in variants for name in names)
        ):  # PEFT mixes vanilla LoRA alone
            return mixed.run(self.module, names, args[0], self._by_itself)
        return super().stock(*args, **{"adapter_names": names} | kwargs)

    def _by_itself(self, x: Tensor) -> Tensor:
        """Without its group, whose other members get other rows."""
        plan = self.work(x) if served(x) else None
        return super().stock(x) if plan is None else self.run(x, plan)

    def work(self, x: Tensor) -> Plan | DoraPlan | None:
        found = self._dora(x) if self.module.lora_variant else None
        return self.plan(x) if found is None else found

    def _dora(self, x: Tensor) -> DoraPlan | None:
        """Where one DoRA adapter is active, alone."""
        layer = self.module
        if (
            layer.merged
            or layer.disable_adapters
            or mixed.current(layer) is not None
            or not direct(layer.base_layer)
        ):
            return None
        adapter = dora.active_dora(layer)
        base = None if isinstance(adapter, str) else self.cache.operands(layer.base_layer, x)
        if base is None or adapter.a.weight.device != x.device:
            return None
        branch = functional.Adapter(*branch_operands(adapter.a.weight, adapter.b.weight, adapter.scaling))
        plan = Plan(
            functional.Member(base.weight, base.bias, [branch]),
            base.compute,
            base.result,
            _result_dtype(layer, base),
        )
        return DoraPlan(plan, adapter.magnitude, adapter.dropout)

    def plan(self, x: Tensor) -> Plan | None:
        layer = self.module
        names = mixed.current(layer)
        if layer.merged or layer.disable_adapters or not direct(layer.base_layer):
            return None
        found = self.cache.operands(layer.base_layer, x)
        adapters = None if found is None else _mixed(layer, x, names) if names is not None else _active(layer)
        if adapters is None or any(a.lora_a.device != x.device for a in adapters):
            return None
        bias = _bias(layer, found, [] if names is not None else layer.active_adapters)
        if _rounds_adapters(x, found.compute):
            to = found.compute
            adapters = [replace(a, lora_a=a.lora_a.to(to), lora_b=a.lora_b.to(to)) for a in adapters]
        return Plan(
            functional.Member(found.weight, bias, adapters),
            found.compute,
            found.result,
            _result_dtype(layer, found),
        )

    def signature(self) -> tuple | None:
        layer, parts = self.module, self.module._modules
        base = parts["base_layer"]
        if layer.merged or layer.disable_adapters or mixed.SLOT in layer.__dict__ or not direct(base):
            return None
        found = [self.cache.signature(base)]
        if found[0] is None:
            return None
        for name in layer.active_adapters:
            if name in parts["lora_A"]._modules:
                found.append(None if name in layer.lora_variant else _adapter_signature(layer, name))
        return None if None in found else tuple(found)

    def watch(self, seen: Watch) -> bool:
        layer, parts = self.module, self.module._modules
        held, active = layer.__dict__, layer.__dict__.get("_active_adapter")
        if layer.lora_variant or not isinstance(active, (str, list)) or "scaling" not in held:
            return False
        seen.module(layer)
        seen.entry(held, "_disable_adapters", "_active_adapter", "scaling", "merged_adapters", mixed.SLOT)
        seen.entry(parts, "base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant")
        for items in (layer.merged_adapters, [] if isinstance(active, str) else active):
            seen.listed(items)
        variants = layer.lora_variant
        seen.entry(held, "lora_variant")
        seen.entry(variants if isinstance(variants, dict) else variants._modules, *layer.active_adapters)
        for name in layer.active_adapters:
            low = [parts[of]._modules for of in ("lora_A", "lora_B", "lora_dropout")]
            for modules in low:
                seen.entry(modules, name)
            seen.entry(layer.scaling, name)
            if name in low[0]:
                _watch_adapter(*(modules[name] for modules in low), seen)
        return self.cache.watch(parts["base_layer"], seen)


def _watch_adapter(a: nn.Module, b: nn.Module, dropout: nn.Module, seen: Watch) -> None:
    for module in (a, b, dropout):
        seen.module(module)
    for linear in (a, b):
        seen.entry(linear._parameters, "weight", "bias")
        seen.place(linear._parameters["weight"])
    seen.entry(dropout.__dict__, "training", "p")


# Of fewer rows the casts cost more than they spare.
_ROUNDED_FROM = 128


def _rounds_adapters(x: Tensor, compute: torch.dtype) -> bool:
    """Whether fp32 adapters are rounded to the compute dtype, as autocast rounds them for stock's products: a
    GPU then multiplies once in place of three times. Outside autocast they keep their digits."""
    if compute == torch.float32 or autocast_dtype(x) is None or x.shape[-1] * _ROUNDED_FROM > x.numel():
        return False
    return backends.select(x) in ("cuda", "triton")


def _adapter_signature(layer: nn.Module, name: str) -> tuple | None:
    """Of an adapter without a bias, which is scaled anew at every call, and whose scaling is a number."""
    parts = layer._modules
    a, b = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
    dropout = parts["lora_dropout"]._modules[name]
    if not (direct(a) and direct(b) and direct(dropout)):
        return None
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and isinstance(scaling := scaling_of(layer, name), Tensor):
        return None
    of_a, of_b = a._parameters, b._parameters
    # See WeightCache.signature.
    if of_b.get("bias") is not None or "weight" not in of_a or "weight" not in of_b:
        return None
    lora_a, lora_b = address_of(of_a["weight"]), address_of(of_b["weight"])
    acts = dropout.training and type(dropout) is not nn.Identity and getattr(dropout, "p", True)
    return a, b, dropout, acts, of_a.get("bias") is None, scaling, lora_a, lora_b


def _active(layer: nn.Module) -> list[functional.Adapter] | None:
    adapters = active_adapters(layer)
    return None if isinstance(adapters, str) else [_operand(item, None) for item in adapters]


def _mixed(layer: nn.Module, x: Tensor, names: list[str]) -> list[functional.Adapter] | None:
    """One adapter a stretch of samples; None where one has no fused form, or a bias, which only its samples
    would get."""
    found = []
    for name, rows in mixed.stretches(layer, names, x):
        if name == mixed.BASE or name not in layer.lora_A:
            continue
        adapter = adapter_of(layer, name)
        if isinstance(adapter, str) or adapter.b.bias is not None:
            return None
        found.append(_operand(adapter, rows))
    return found


def _operand(item: Adapter, rows: tuple[int, int] | None) -> functional.Adapter:
    low = branch_operands(parameter(item.a, "weight"), parameter(item.b, "weight"), item.scaling)
    return functional.Adapter(*low, item.dropout_p, None, rows)


def _bias(layer: nn.Module, base: Operands, names: list[str]) -> Tensor | None:
    """The base's bias and the active adapters' lora_bias together."""
    bias = base.bias
    for name in names:
        own = layer.lora_B[name].bias if name in layer.lora_B else None
        if own is not None:
            scaled = layer.scaling[name] * own
            bias = scaled if bias is None else bias + scaled
    return bias


def active_adapters(layer: nn.Module) -> list[Adapter] | str:
    """The active adapters, or why the fused path cannot run them."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return "no active adapter"
    found = []
    for name in names:
        adapter = adapter_of(layer, name)
        if isinstance(adapter, str):
            return f"adapter {name!r}: {adapter}"
        found.append(adapter)
    return found


def adapter_of(layer: nn.Module, name: str) -> Adapter | str:
    """One adapter of the layer, or why the fused path cannot run it."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not vanilla LoRA"
    parts = layer._modules
    a, b = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
    dropout = parts["lora_dropout"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a._parameters.get("bias") is not None:
        return f"lora_A is {type(a).__name__}, lora_B is {type(b).__name__}, expected nn.Linear"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"dropout is {type(dropout).__name__}, expected nn.Dropout"
    if not (direct(a) and direct(b) and direct(dropout)):
        return against("lora_A", a) or against("lora_B", b) or against("lora_dropout", dropout)
    lora_a, lora_b = parameter(a, "weight"), parameter(b, "weight")
    if lora_a.dtype != lora_b.dtype or lora_a.shape[0] > 256:
        return (
            f"lora_A {lora_a.dtype} of rank {lora_a.shape[0]}, lora_B {lora_b.dtype}: expected one dtype "
            "and a rank up to 256"
        )
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Adapter(a, b, dropout, dropout_p, scaling_of(layer, name))


def _result_dtype(layer: nn.Module, base: Operands) -> torch.dtype:
    """PEFT's 4-bit layer adds the low-rank part uncast under CUDA autocast; its dense layer always returns
    the base's dtype."""
    if hasattr(layer, "is_target_conv_1d_layer") or not torch.is_autocast_enabled():
        return base.result
    return torch.promote_types(base.result, torch.get_autocast_dtype("cuda"))
