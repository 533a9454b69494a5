"""The frozen weight of a base layer as peftkern's functions take it, read at every call so that it cannot go
stale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.bnb_repacked import leaves_traces, restore
from ..formats.nf4 import NF4Weight
from .watch import Watch

__all__ = [
    "FLOATS",
    "Operands",
    "WeightCache",
    "address_of",
    "autocast_dtype",
    "forward_reason",
    "is_4bit",
    "parameter",
    "repacked",
    "slow_products",
    "unpack",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """weight, bias; the dtype to compute in; the dtype the stock layer returns."""

    weight: NF4Weight | Tensor
    bias: Tensor | None
    compute: torch.dtype
    result: torch.dtype


def is_4bit(base: nn.Module) -> bool:
    """Whether `base` is shaped like bitsandbytes' Linear4bit."""
    return (
        isinstance(base, nn.Linear) and hasattr(base, "compute_type_is_set") and hasattr(base, "quant_state")
    )


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, without the microsecond that torch's lookup takes; where FSDP shows a view of its flat
    parameter, an attribute like any other."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def forward_reason(base: nn.Module) -> str | None:
    """Why what the base's class computes is not known to be a linear of its weight and bias; None where it
    is."""
    if not isinstance(base, nn.Linear):
        return (
            f"base layer is {type(base).__module__}.{type(base).__name__}, expected nn.Linear or "
            "bitsandbytes Linear4bit"
        )
    forward = type(base).forward
    if forward is not nn.Linear.forward and not (is_4bit(base) and forward is _of_linear_4bit(type(base))):
        return (
            f"base layer's forward is {forward.__module__}.{forward.__qualname__}, expected nn.Linear's or "
            "Linear4bit's"
        )
    return None


def _of_linear_4bit(kind: type) -> Any:
    """The forward of the bitsandbytes class that this one is or comes from, None without one. By the class's
    name: torch.compile reads no function's."""
    return next(
        (base.__dict__.get("forward") for base in kind.__mro__ if base.__name__ == "Linear4bit"), None
    )


def quant_state(base: nn.Module) -> Any:
    """The state of the weight, or the module's copy where FSDP has stripped the weight's; None before
    quantization."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def repacked(base: nn.Module) -> bool:
    """Whether bitsandbytes' CPU inference path has had this weight in its own layout and it is not yet as it
    was."""
    state = quant_state(base)
    return state is not None and leaves_traces(state)


def unpack(base: nn.Module) -> str:
    """Bring a repacked weight back to the plain format; returns what was lost, "" where nothing was."""
    state = quant_state(base)
    lost = restore(base.weight, state)
    base.weight.quant_state = base.quant_state = state
    return lost


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants on x's device, None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def slow_products(dtype: torch.dtype) -> bool:
    """Whether torch's matrix products in `dtype` are naive loops on this CPU, as in bf16 and fp16 without
    AVX-512."""
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in fast and not fast[dtype]()


class WeightCache:
    """Reads a base layer's weight; keeps the last 4-bit view. Shared by a LoRA layer and its base, dropped by
    pickle and deepcopy."""

    __slots__ = ("_view", "_held", "_key", "_token", "_forward", "_usable", "prepared")

    def __init__(self) -> None:
        self._view: NF4Weight | None = None
        self._held: tuple[Tensor, ...] = ()  # what the key's identities belong to
        self._key: tuple[Any, ...] | None = None
        self._token: object = None  # another one for every view
        self._forward: Any = None
        self._usable = False
        # For which signature, and the call that holds the weight: replaced together, dropped with the view.
        self.prepared: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def operands(self, base: nn.Module, x: Tensor) -> Operands | None:
        """What to compute `base(x)` with; None where only the stock forward can."""
        # A traced graph must not depend on what eager calls keep.
        usable = forward_reason(base) is None if torch.compiler.is_compiling() else self._computes(base)
        if not usable or x.dtype not in FLOATS:
            return None
        found = self._operands_4bit(base, x) if is_4bit(base) else _operands_dense(base, x)
        if (
            found is None
            or found.weight.device != x.device
            or x.dim() == 0
            or x.shape[-1] != found.weight.shape[1]
        ):
            return None
        return found

    def _computes(self, base: nn.Module) -> bool:
        """Whether the class's forward, which may be another than when the model was patched, is that of a
        plain or 4-bit linear."""
        forward = type(base).forward
        if forward is not self._forward:
            self._forward, self._usable = forward, forward_reason(base) is None
        return self._usable

    def _operands_4bit(self, base: nn.Module, x: Tensor) -> Operands | None:
        weight = self.view(base)
        if weight is None or len(weight.shape) != 2:
            return None
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        compute = autocast_dtype(x) or base.compute_dtype or x.dtype
        return Operands(weight, parameter(base, "bias"), compute, x.dtype) if compute in FLOATS else None

    def view(self, base: nn.Module) -> NF4Weight | None:
        """The 4-bit weight, zero-copy; None where its bytes are not in the plain format."""
        if torch.compiler.is_compiling():
            weight, state = parameter(base, "weight"), quant_state(base)
            return NF4Weight.from_bnb(base) if _plain(weight, state) else None
        return self._current(base)

    def _current(self, base: nn.Module) -> NF4Weight | None:
        held = base._parameters
        weight = held.get("weight")
        if weight is None:
            weight = base.weight
        state = getattr(weight, "quant_state", None) or base.quant_state
        if state is None:
            return None
        held = (weight, state.absmax, state.code)
        sizes = (state.shape, state.blocksize)
        if state.nested:
            inner = state.state2
            held, sizes = (*held, state.offset, inner.absmax, inner.code), (*sizes, inner.blocksize)
        # bitsandbytes' parameter takes 2 us for what a plain tensor tells in 0.1 us.
        with torch._C.DisableTorchFunctionSubclass():
            key = (*map(id, held), *map(_ADDRESS, held), weight.numel(), *sizes)
        if key != self._key:
            self._view = _view(base) if _plain(weight, state) else None
            self._held, self._token, self.prepared = held, object(), (None, None)
            # A view that holds a copy (of an offset that is not fp32) does not see what is written to the
            # original.
            copied = self._view is not None and state.nested and self._view.absmax_offset is not state.offset
            self._key = None if self._view is None or copied else key
        return self._view

    def signature(self, base: nn.Module) -> tuple | None:
        """Equal as long as `operands` gives the same for one dtype of x, outside autocast and torch.compile;
        None where that cannot be told cheaply."""
        held, state = base._parameters, base.__dict__
        if type(base).forward is not self._forward:
            self._computes(base)
        if not self._usable or "quant_state" not in state or "compute_type_is_set" not in state:
            return None  # of a dense weight nothing is prepared
        if "weight" not in held or "bias" not in held:
            return None  # what stands in a parameter's place may be another tensor at every call
        if self._current(base) is None:
            return None
        bias = held["bias"]
        place = None if bias is None else address_of(bias)
        return self._token, state["compute_type_is_set"], base.compute_dtype, place

    def watch(self, base: nn.Module, seen: Watch) -> bool:
        """Let all be seen on which `signature` depends; whether that can be done: of a 4-bit weight."""
        weight, state = base._parameters.get("weight"), base.__dict__.get("quant_state")
        own = None if weight is None else getattr(weight, "__dict__", None)
        if own is None or state is None or not is_4bit(base):
            return False
        found = [*{id(each): each for each in (state, own.get("quant_state")) if each is not None}.values()]
        seen.module(base)
        seen.function(type(base))
        seen.entry(base._parameters, "weight", "bias")
        seen.entry(base.__dict__, "quant_state", "compute_type_is_set", "compute_dtype")
        seen.entry(own, "quant_state")
        seen.place(weight, base._parameters["bias"])
        for each in found:
            inner = each.state2 if each.nested else None
            seen.entry(each.__dict__, "absmax", "code", "shape", "blocksize", "nested", "offset", "state2")
            seen.entry(each.__dict__, "packing_format_for_cpu")
            seen.place(each.absmax, each.code)
            if inner is not None:
                seen.entry(inner.__dict__, "absmax", "code", "blocksize")
                seen.place(each.offset, inner.absmax, inner.code)
        return True


_ADDRESS = Tensor.data_ptr


def _plain(weight: Tensor, state: Any) -> bool:
    return (
        state is not None and not getattr(state, "packing_format_for_cpu", False) and not weight.requires_grad
    )


def _view(base: nn.Module) -> NF4Weight | None:
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be saved for a later backward
        try:
            return NF4Weight.from_bnb(base)
        except ValueError:
            return None


def _operands_dense(base: nn.Module, x: Tensor) -> Operands | None:
    weight = parameter(base, "weight")
    if type(weight) not in (nn.Parameter, Tensor) or (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if weight.requires_grad:  # views of a flat parameter that holds trainable ones too
        weight = weight.detach()
    wanted = autocast_dtype(x)
    dtype = wanted or x.dtype
    if weight.dtype != dtype:
        if wanted is None or weight.dtype not in FLOATS:
            return None
        weight = weight.to(dtype)  # as autocast does, at every call
    return Operands(weight, parameter(base, "bias"), dtype, dtype)


def address_of(tensor: Tensor) -> tuple[Any, ...]:
    """Which tensor it is, where it lies and how: a call that holds it, or reads its address and no copy of
    it, reads the same numbers as long as this is equal."""
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_contiguous()
