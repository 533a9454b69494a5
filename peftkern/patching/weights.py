"""The frozen weight of a base layer as peftkern's functions take it, read at every call so that it cannot go stale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bnb_repacked import leaves_traces, restore
from ..dora import row_squares
from ..nf4 import NF4Weight
from .decode import address_of

__all__ = ["FLOATS", "Operands", "WeightCache", "autocast_dtype", "is_4bit", "repacked", "slow_products", "unpack"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """weight, bias; the dtype to compute in; the dtype the stock layer returns."""

    weight: NF4Weight | Tensor
    bias: Tensor | None
    compute: torch.dtype
    result: torch.dtype


def is_4bit(base: nn.Module) -> bool:
    """Whether `base` is shaped like bitsandbytes' Linear4bit."""
    return isinstance(base, nn.Linear) and hasattr(base, "compute_type_is_set") and hasattr(base, "quant_state")


def quant_state(base: nn.Module) -> Any:
    """The state of the weight, or the module's copy where FSDP has stripped the weight's; None before quantization."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def repacked(base: nn.Module) -> bool:
    """Whether bitsandbytes' CPU inference path has had this weight in its own layout and it is not yet as it was."""
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
    """Whether torch's matrix products in `dtype` are naive loops on this CPU, as in bf16 and fp16 without AVX-512."""
    fast = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return dtype in fast and not fast[dtype]()


class WeightCache:
    """Reads a base layer's weight; keeps the last 4-bit view. Shared by a LoRA layer and its base, dropped by pickle and deepcopy."""

    __slots__ = ("_view", "_squares")

    def __init__(self) -> None:
        self._view: NF4Weight | None = None
        self._squares: tuple[Any, Tensor] | None = None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def operands(self, base: nn.Module, x: Tensor) -> Operands | None:
        """What to compute `base(x)` with; None where only the stock forward can."""
        if x.dtype not in FLOATS:
            return None
        found = self._operands_4bit(base, x) if is_4bit(base) else _operands_dense(base, x)
        if found is None or found.weight.device != x.device or x.dim() == 0 or x.shape[-1] != found.weight.shape[1]:
            return None
        return found

    def _operands_4bit(self, base: nn.Module, x: Tensor) -> Operands | None:
        weight = self.view(base)
        if weight is None or len(weight.shape) != 2:
            return None
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        compute = autocast_dtype(x) or base.compute_dtype or x.dtype
        return Operands(weight, base.bias, compute, x.dtype) if compute in FLOATS else None

    def view(self, base: nn.Module) -> NF4Weight | None:
        """The 4-bit weight, zero-copy; None where its bytes are not in the plain format."""
        weight, state = base.weight, quant_state(base)
        if torch.compiler.is_compiling():
            return NF4Weight.from_bnb(base) if _plain(weight, state) else None
        if self._view is None or not _shows(self._view, weight, state):
            self._view = _view(base) if _plain(weight, state) else None
        return self._view

    def signature(self, base: nn.Module) -> tuple | None:
        """Equal as long as `operands` gives the same for one dtype of x, outside autocast; the caller holds what was given."""
        if not is_4bit(base):
            return address_of(base._parameters.get("weight")), address_of(base._parameters.get("bias"))
        view = self.view(base)
        return None if view is None else (id(view), base.compute_type_is_set, base.compute_dtype, address_of(base._parameters.get("bias")))

    def squares(self, weight: NF4Weight | Tensor) -> Tensor:
        """||W||^2 of each row, for DoRA's norm; kept as long as the weight stays what it is."""
        if torch.compiler.is_compiling():
            return row_squares(weight)
        key = (weight.data_ptr(), weight.dtype, weight._version) if isinstance(weight, Tensor) else id(weight)
        if self._squares is None or self._squares[0] != key or (not isinstance(weight, Tensor) and weight is not self._view):
            self._squares = key, row_squares(weight)
        return self._squares[1]


def _plain(weight: Tensor, state: Any) -> bool:
    return state is not None and not getattr(state, "packing_format_for_cpu", False) and not weight.requires_grad


def _view(base: nn.Module) -> NF4Weight | None:
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be saved for a later backward
        try:
            return NF4Weight.from_bnb(base)
        except ValueError:
            return None


def _shows(view: NF4Weight, weight: Tensor, state: Any) -> bool:
    """The view keeps its tensors alive, so an equal address is the same storage and an equal identity the same tensor."""
    absmax = view.absmax if view.absmax_8bit is None else view.absmax_8bit
    return (
        state is not None and absmax is state.absmax and view.absmax_offset is state.offset and view.packed.data_ptr() == weight.data_ptr()
    )


def _operands_dense(base: nn.Module, x: Tensor) -> Operands | None:
    weight = base.weight  # a plain tensor where FSDP shows views of its flat parameter
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
    return Operands(weight, base.bias, dtype, dtype)
