"""RMSNorm and rotary embeddings of a model: recognized by what they compute on a probe, not by a class's name; patched per instance."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops.rms_norm import reference as rms_norm_reference
from ..ops.rope import reference as rope_reference
from .forwards import Forward, _served, install
from .weights import FLOATS

__all__ = ["Block", "NormForward", "NormMode", "RopeForward", "RopeMode", "install_blocks", "norm_candidates", "rope_candidates"]

_ROTARY = "apply_rotary_pos_emb"
_ON_CPU = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are when a model is patched


class NormMode(NamedTuple):
    """What an RMSNorm module computes: `functional.rms_norm`'s arguments, where its eps stands, and whether x may have another dtype than
    the weight."""

    eps_name: str
    offset: float
    cast: str
    mixed: bool


class RopeMode(NamedTuple):
    """Whether the module's own function also turns a part of each head and copies the rest."""

    partial: bool


class Block(NamedTuple):
    """A module that was looked at: its name, what it would run ("rms_norm" or "rope") and how, or the reason why it cannot."""

    name: str
    module: nn.Module
    got: str
    mode: NormMode | RopeMode | None
    reason: str | None


def install_blocks(found: Iterable[Block]) -> int:
    """Patch those without a reason against it; how many. `peftkern.unpatch` and `forwards.remove` undo it."""
    kinds = {"rms_norm": NormForward, "rope": RopeForward}
    usable = [block for block in found if block.reason is None]
    for block in usable:
        install(block.module, kinds[block.got], block.mode)
    return len(usable)


def _replaced(module: nn.Module) -> str | None:
    """Someone else's forward on the instance; ours, and what accelerate's hooks keep of the class's, are none."""
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(slot)
    if forward is None or isinstance(forward, Forward):
        return None
    if getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module:
        return None
    return f"its forward was replaced by {getattr(forward, '__qualname__', type(forward).__qualname__)}"


# ---- norms


def norm_candidates(model: nn.Module) -> list[Block]:
    """Every module with a 1-D weight and an eps, in the model's order: those whose class computes on a probe, bit for bit, what
    `functional.rms_norm` is defined as, and the others with the reason. LayerNorm keeps torch's own fused kernel and is not listed."""
    found = []
    for name, module in model.named_modules():
        eps_name = _eps_name(module)
        weight = module._parameters.get("weight")
        if eps_name is None or not isinstance(weight, Tensor) or weight.dim() != 1 or isinstance(module, nn.LayerNorm):
            continue
        mode = _norm_mode(module, eps_name)
        reason = mode if isinstance(mode, str) else None
        found.append(Block(name, module, "rms_norm", None if reason else mode, reason))
    return found


def _eps_name(module: nn.Module) -> str | None:
    return next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _norm_mode(module: nn.Module, eps_name: str) -> NormMode | str:
    replaced = _replaced(module)
    if replaced:
        return replaced
    eps = getattr(module, eps_name)
    if not isinstance(eps, float):
        return f"its {eps_name} is {eps!r}, expected a float"
    if set(name for name, value in module._parameters.items() if value is not None) != {"weight"} or module._modules:
        return f"{type(module).__name__} has other parameters than a weight, or submodules"
    try:
        matches = {dtypes: _matching(module, eps, *dtypes) for dtypes in _PROBES}
    except Exception as error:  # a class of any origin may want other arguments or attributes
        return f"{type(module).__name__}.forward failed on a probe: {type(error).__name__}: {error}"
    for cast, offset in _MODES:
        if all((cast, offset) in matches[same] for same in _PROBES[:2]):
            return NormMode(eps_name, offset, cast, (cast, offset) in matches[_PROBES[2]])
    return f"{type(module).__name__}.forward is no RMSNorm that peftkern knows: on a probe no order of casting gives its bits"


_MODES = (("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0))
_PROBES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))  # of x and the weight


def _matching(module: nn.Module, eps: float, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[tuple[str, float]]:
    """The modes whose reference gives, on random rows of several sizes and a random weight, the bits of the class's own forward."""
    size, options = module.weight.shape[0], dict(generator=torch.Generator().manual_seed(0), **_ON_CPU)
    x = torch.randn(2, 4, size, **options) * torch.tensor([1.0, 30.0, eps**0.5, 0.01], **_ON_CPU)[:, None]  # eps must matter in one
    weight = torch.randn(size, **options).to(weight_dtype)
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__, _parameters={"weight": nn.Parameter(weight, requires_grad=False)})
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = x.to(dtype)
        y = type(module).forward(probe, x)
        results = {mode: rms_norm_reference.forward(x, weight, eps, mode[1], mode[0])[0] for mode in _MODES}
    return [mode for mode, ours in results.items() if isinstance(y, Tensor) and y.dtype == ours.dtype and torch.equal(y, ours)]


class NormForward(Forward):
    """An RMSNorm; `cache` holds its NormMode. The weight and eps are read at each call."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, mode = self.module, self.cache
        weight = module._parameters.get("weight")
        if args or kwargs or type(weight) is not nn.Parameter or not self._serves(x, weight):
            return self.stock(x, *args, **kwargs)
        return functional.rms_norm(x, weight, eps=getattr(module, mode.eps_name), offset=mode.offset, cast=mode.cast)

    def joined(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """norm(s) and s = residual + x, x itself without a residual: in one launch where the operands are alike."""
        if residual is not None and (x.dtype, x.shape, x.device) != (residual.dtype, residual.shape, residual.device):
            x, residual = residual + x, None
        weight, mode = self.module._parameters.get("weight"), self.cache
        if type(weight) is not nn.Parameter or not self._serves(x, weight):
            s = x if residual is None else residual + x
            return self(s), s
        return functional.add_rms_norm(x, residual, weight, eps=getattr(self.module, mode.eps_name), offset=mode.offset, cast=mode.cast)

    def _serves(self, x: Tensor, weight: Tensor) -> bool:
        if x.dtype not in FLOATS or weight.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != weight.shape[0]:
            return False
        return x.device == weight.device and (self.cache.mixed or x.dtype == weight.dtype) and _served(x)


# ---- rotary embeddings


def rope_candidates(model: nn.Module) -> list[Block]:
    """Every module whose class's forward calls the global function `apply_rotary_pos_emb`, in the model's order."""
    found = []
    for name, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward)
        if _ROTARY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            continue
        mode = _rope_mode(module)
        reason = mode if isinstance(mode, str) else None
        found.append(Block(name, module, "rope", None if reason else mode, reason))
    return found


def _rope_mode(module: nn.Module) -> RopeMode | str:
    forward = type(module).forward
    replaced = _replaced(module)
    if replaced:
        return replaced
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return f"{type(module).__name__}.forward is wrapped by a decorator"
    function = forward.__globals__.get(_ROTARY)
    if not callable(function):
        return f"{_ROTARY} is no function of the module that defines {type(module).__name__}"
    try:
        if not _rotates_halves(function, 16):
            return f"{_ROTARY} of {forward.__module__} is not the rotate_half convention: it differs on a probe"
    except Exception as error:  # any signature is possible
        return f"{_ROTARY} of {forward.__module__} failed on a probe: {type(error).__name__}: {error}"
    try:
        return RopeMode(_rotates_halves(function, 8))
    except RuntimeError:  # the usual function takes whole heads only
        return RopeMode(False)


def _rotates_halves(function: Callable[..., Any], rotary: int) -> bool:
    """Whether it gives, in fp32 and bf16, what ours is defined as, for angles whose halves differ."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        options = dict(generator=torch.Generator().manual_seed(0), **_ON_CPU)
        q, k = (torch.randn(2, heads, 5, 16, **options).to(dtype) for heads in (3, 1))
        cos, sin = (torch.randn(2, 5, rotary, **options).to(dtype) for _ in range(2))
        with torch.no_grad():
            theirs, ours = function(q, k, cos, sin), (torch.empty_like(q), torch.empty_like(k))
            rope_reference.rope(q, k, cos, sin, False, *ours)
        if not isinstance(theirs, tuple) or len(theirs) != 2:
            return False
        for their, our in zip(theirs, ours, strict=True):
            if (their.shape, their.dtype) != (our.shape, our.dtype) or not torch.allclose(their, our, rtol=tolerance, atol=tolerance):
                return False
    return True


def _rotary(stock: Callable[..., tuple[Tensor, Tensor]], partial: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Ours in `stock`'s place; calls that it does not serve go to `stock`."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs.get("unsqueeze_dim", 1) != 1 or kwargs.keys() - {"unsqueeze_dim"} or not _turns(q, k, cos, sin, partial):
            return stock(q, k, cos, sin, *args, **kwargs)
        return functional.rope(q, k, cos, sin)

    return apply_rotary_pos_emb


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, partial: bool) -> bool:
    if q.dtype not in FLOATS or not q.dtype == k.dtype == cos.dtype == sin.dtype or not q.device == k.device == cos.device == sin.device:
        return False
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.requires_grad or sin.requires_grad:
        return False
    (b, _, s, d), rotary = q.shape, cos.shape[2]
    if (k.shape[0], k.shape[2], k.shape[3]) != (b, s, d) or cos.shape[0] not in (1, b) or cos.shape[1] != s:
        return False
    return rotary % 2 == 0 and (rotary == d or (partial and rotary < d)) and _served(q)


class RopeForward(Forward):
    """An attention module's own forward, whose code sees our function under the name `apply_rotary_pos_emb`; `cache` holds its RopeMode.

    Made again by copying and unpickling, and when the class has another forward than the one it was made of. torch.compile traces into it.
    """

    __slots__ = ("_function", "_names", "_stock_rotary")

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None, cache: RopeMode) -> None:
        super().__init__(module, previous, cache)
        self._build()

    def __setstate__(self, state: tuple[nn.Module, Callable[..., Any] | None, RopeMode]) -> None:
        super().__setstate__(state)
        self._build()  # of the module, which is being copied or loaded itself, the class alone is needed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._refresh()
        return self._function(self.module, *args, **kwargs)

    def _build(self) -> None:
        forward = type(self.module).forward
        scope = _scope(forward)
        self._stock_rotary = forward.__globals__[_ROTARY]
        scope[_ROTARY] = _rotary(self._stock_rotary, self.cache.partial)
        self._function = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        self._function.__kwdefaults__ = forward.__kwdefaults__
        self._names = _global_names(forward.__code__)

    def _refresh(self) -> None:
        """What others have put into the module's globals since then is seen; a rotary function of theirs is used."""
        forward = type(self.module).forward
        if self._function.__code__ is not forward.__code__:
            self._build()
        scope = self._function.__globals__
        ours, source = scope[_ROTARY], forward.__globals__
        if source[_ROTARY] is not self._stock_rotary:
            ours = self._stock_rotary = source[_ROTARY]
        scope.update({name: source[name] for name in self._names if name in source})
        scope[_ROTARY] = ours


def _global_names(code: types.CodeType) -> frozenset[str]:
    """Names that may be looked up among the globals, in functions defined inside too; without the rotary function's."""
    inner = (_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner) - {_ROTARY}


def _scope(forward: types.FunctionType) -> dict[str, Any]:
    """A copy of its globals. Without `__name__`: by it torch.compile (2.13) names the module as the source of what it reads here,
    and its guards would watch the module's rotary function in place of ours."""
    scope = dict(forward.__globals__)
    scope.pop("__name__", None)
    return scope
