"""RMSNorms of a model: recognized by what they compute on a probe, not by a class's name; patched per
instance."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import served
from ..ops.rms_norm import reference as rms_norm_reference
from .forwards import Forward
from .reads import Reads, RecognizedForward, reads
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .weights import FLOATS
from .wrappers import UNKNOWN, innermost

__all__ = [
    "ON_CPU",
    "NormForward",
    "NormMode",
    "Norms",
    "name_of_eps",
    "replacement",
]

ON_CPU = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are when a model is patched


class NormMode(NamedTuple):
    """What an RMSNorm module computes: `functional.rms_norm`'s arguments, where its eps stands, and whether x
    may have another dtype than the weight."""

    eps_name: str
    offset: float
    cast: str
    mixed: bool


def replacement(module: nn.Module) -> str | None:
    """Someone else's forward on the instance; ours, and what accelerate's hooks keep of the class's, are
    none."""
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(slot)
    if forward is None or isinstance(forward, Forward):
        return None
    if (
        getattr(forward, "__func__", None) is type(module).forward
        and getattr(forward, "__self__", None) is module
    ):
        return None
    return f"its forward was replaced by {getattr(forward, '__qualname__', type(forward).__qualname__)}"


def _reads(module: nn.Module, eps_name: str) -> Reads | str:
    return reads(module, skip=frozenset({"weight", eps_name}))


# ---- norms


class Norms(Rewrite):
    """Modules with a 1-D weight and an eps: those whose class computes on a probe, bit for bit, what
    `functional.rms_norm` is defined as, and the others with the reason. LayerNorm keeps torch's own fused
    kernel and is not listed."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's."""
        weight = module._parameters.get("weight")
        if name_of_eps(module) is None or not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        if isinstance(module, nn.LayerNorm) or context.excluded(name):
            return None
        mode, seen = _recognized(module)
        if isinstance(mode, str):
            return Finding(module, block_row(name, "norm", "rms_norm", mode))
        return Finding(module, block_row(name, "norm", "rms_norm"), NormForward, mode, seen)


def _recognized(module: nn.Module) -> tuple[NormMode | str, Reads | str]:
    """What the module computes, or why it is no norm of ours; and what that depends on besides the weight and
    eps."""
    eps_name = name_of_eps(module)
    mode = _norm_mode(module, eps_name) if eps_name else "it has no eps"
    seen = mode if isinstance(mode, str) else _reads(module, eps_name)
    return (seen, seen) if isinstance(seen, str) else (mode, seen)


def name_of_eps(module: nn.Module) -> str | None:
    """The attribute that holds a norm's eps; None without one."""
    return next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _norm_mode(module: nn.Module, eps_name: str) -> NormMode | str:
    replaced = replacement(module)
    if replaced:
        return replaced
    eps = getattr(module, eps_name)
    if not isinstance(eps, float):
        return f"its {eps_name} is {eps!r}, expected a float"
    if innermost(type(module).forward) is None:
        return f"{type(module).__name__}.forward {UNKNOWN}"
    if (
        set(name for name, value in module._parameters.items() if value is not None) != {"weight"}
        or module._modules
    ):
        return f"{type(module).__name__} has other parameters than a weight, or submodules"
    try:
        matches = {dtypes: _matching(module, eps, *dtypes) for dtypes in _PROBES}
    except Exception as error:  # a class of any origin may want other arguments or attributes
        return f"{type(module).__name__}.forward failed on a probe: {type(error).__name__}: {error}"
    for cast, offset in _MODES:
        if all((cast, offset) in matches[same] for same in _PROBES[:2]):
            return NormMode(eps_name, offset, cast, (cast, offset) in matches[_PROBES[2]])
    return (
        f"{type(module).__name__}.forward is no RMSNorm that peftkern knows: on a probe no order of "
        "casting gives its bits"
    )


_MODES = (("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0))
# of x and the weight
_PROBES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))


def _matching(
    module: nn.Module, eps: float, dtype: torch.dtype, weight_dtype: torch.dtype
) -> list[tuple[str, float]]:
    """The modes whose reference gives, on random rows of several sizes and a random weight, the bits of the
    class's own forward."""
    size, options = module.weight.shape[0], dict(generator=torch.Generator().manual_seed(0), **ON_CPU)
    # eps must matter in one
    x = torch.randn(2, 4, size, **options) * torch.tensor([1.0, 30.0, eps**0.5, 0.01], **ON_CPU)[:, None]
    weight = torch.randn(size, **options).to(weight_dtype)
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__, _parameters={"weight": nn.Parameter(weight, requires_grad=False)})
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = x.to(dtype)
        y = innermost(type(module).forward)(probe, x)
        results = {mode: rms_norm_reference.forward(x, weight, eps, mode[1], mode[0])[0] for mode in _MODES}
    return [
        mode
        for mode, ours in results.items()
        if isinstance(y, Tensor) and y.dtype == ours.dtype and torch.equal(y, ours)
    ]


class NormForward(RecognizedForward):
    """An RMSNorm; `cache` holds its NormMode. The weight and eps are read at each call."""

    __slots__ = ("_stock",)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self._function is not self._ours or type(self.module).forward is not self._seen:
            return super().__call__(x, *args, **kwargs)
        return self._run(self.module, x)

    def inside(self, stock: types.FunctionType) -> Callable[..., Any]:
        """`stock` as one kernel."""

        def forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return stock(module, x, *args, **kwargs) if args or kwargs else self._run(module, x)

        self._stock = stock
        return forward

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        found = self.operands(x)
        if found is None:
            return self._stock(module, x)
        weight, eps, mode = found
        return functional.rms_norm(x, weight, eps=eps, offset=mode.offset, cast=mode.cast)

    def look(self) -> tuple[NormMode | None, Reads | str]:
        mode, seen = _recognized(self.module)
        return (None if isinstance(mode, str) else mode), seen

    def joined(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """norm(s) and s = residual + x, x itself without a residual: in one launch where the operands are
        alike."""
        if residual is not None and (x.dtype, x.shape, x.device) != (
            residual.dtype,
            residual.shape,
            residual.device,
        ):
            x, residual = residual + x, None
        found = self.operands(x) if self.bare() else None
        if found is None:
            s = x if residual is None else residual + x
            return self(s), s
        weight, eps, mode = found
        return functional.add_rms_norm(x, residual, weight, eps=eps, offset=mode.offset, cast=mode.cast)

    def operands(self, x: Tensor) -> tuple[Tensor, float, NormMode] | None:
        """Weight, eps and how they are used; None where only the stock forward can serve."""
        module, mode = self.module, self.now() if served(x) else None
        weight = module._parameters.get("weight")
        if mode is None or type(weight) is not nn.Parameter:
            return None
        eps, dtype = module.__dict__.get(mode.eps_name), x.dtype
        if (
            type(eps) is not float
            or dtype not in FLOATS
            or weight.dtype not in FLOATS
            or not x.shape
            or x.shape[-1] != weight.shape[0]
        ):
            return None
        if x.device != weight.device or not (mode.mixed or dtype == weight.dtype):
            return None
        return weight, eps, mode
