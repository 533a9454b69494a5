"""Attention modules, patched per instance through the global names their class's forward looks up: rotary
embeddings, and attention itself in fp32 where torch multiplies 16-bit matrices in naive loops."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import autocast_off, transformed
from ..ops.rope import reference as rope_reference
from .blocks import ON_CPU, Block, replacement
from .forwards import find, install, remove, served
from .weights import FLOATS, autocast_dtype, slow_products
from .wrappers import UNKNOWN, WrappedForward, innermost

__all__ = [
    "AttentionForward",
    "RopeMode",
    "WideMode",
    "around_of",
    "in_fp32",
    "install_attention",
    "release",
    "restore_surrounded",
    "rope_candidates",
    "surround",
    "surroundable",
    "surrounded_alone",
    "wide_candidates",
]

_ROTARY = "apply_rotary_pos_emb"
_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_AROUND = "_peftkern_around_attention"  # of the module, which holds what `surround` put there


class RopeMode(NamedTuple):
    """Whether the module's own rotary function also turns a part of each head and copies the rest."""

    partial: bool

    name = _ROTARY

    def replace(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """What the module's forward finds under `name`."""
        return _rotary(stock, self.partial)


class WideMode(NamedTuple):
    """The dtypes in whose place attention is computed in fp32; and what stands around the attention function,
    as `surround` takes it."""

    slow: tuple[torch.dtype, ...]
    around: Callable[..., Any] | None = None

    name = _FUNCTIONS

    def replace(self, stock: Any) -> Any:
        """As RopeMode's."""
        return _Interfaces(stock, self.slow, self.around)


def install_attention(found: Iterable[Block]) -> int:
    """Patch those without a reason against it, each module once for all it got; how many got something."""
    modes: dict[int, list[NamedTuple]] = {}
    modules: dict[int, nn.Module] = {}
    for block in found:
        if block.reason is None:
            modules[id(block.module)] = block.module
            modes.setdefault(id(block.module), []).append(block.mode)
    for key, module in modules.items():
        _install(module, modes[key])
    return len(modules)


def _install(module: nn.Module, modes: list[NamedTuple]) -> None:
    """What stands around the module's attention function stays there."""
    around = module.__dict__.get(_AROUND)
    if around is not None:
        slow = next((mode.slow for mode in modes if isinstance(mode, WideMode)), ())
        modes = [*(mode for mode in modes if not isinstance(mode, WideMode)), WideMode(slow, around)]
    install(module, AttentionForward, tuple(modes)).build()


# ---- rotary embeddings


def rope_candidates(model: nn.Module) -> list[Block]:
    """Every module whose class's forward calls the global function `apply_rotary_pos_emb`, in the model's
    order."""
    found = []
    for name, module in model.named_modules():
        if not _uses(module, _ROTARY):
            continue
        mode = _rope_mode(module)
        reason = mode if isinstance(mode, str) else None
        found.append(Block(name, module, "rope", None if reason else mode, reason))
    return found


def _rope_mode(module: nn.Module) -> RopeMode | str:
    reason = _not_ours(module)
    if reason:
        return reason
    forward = innermost(type(module).forward)
    function = forward.__globals__.get(_ROTARY)
    if not callable(function):
        return f"{_ROTARY} is no function of the module that defines {type(module).__name__}"
    try:
        if not _rotates_halves(function, 16):
            return (
                f"{_ROTARY} of {forward.__module__} is not the rotate_half convention: it differs on a probe"
            )
    except Exception as error:  # any signature is possible
        return f"{_ROTARY} of {forward.__module__} failed on a probe: {type(error).__name__}: {error}"
    try:
        return RopeMode(_rotates_halves(function, 8))
    except RuntimeError:  # the usual function takes whole heads only
        return RopeMode(False)


def _rotates_halves(function: Callable[..., Any], rotary: int) -> bool:
    """Whether it gives, in fp32 and bf16, what ours is defined as, for angles whose halves differ."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        options = dict(generator=torch.Generator().manual_seed(0), **ON_CPU)
        q, k = (torch.randn(2, heads, 5, 16, **options).to(dtype) for heads in (3, 1))
        cos, sin = (torch.randn(2, 5, rotary, **options).to(dtype) for _ in range(2))
        with torch.no_grad():
            theirs, ours = function(q, k, cos, sin), (torch.empty_like(q), torch.empty_like(k))
            rope_reference.rope(q, k, cos, sin, False, *ours)
        if not isinstance(theirs, tuple) or len(theirs) != 2:
            return False
        for their, our in zip(theirs, ours, strict=True):
            if (their.shape, their.dtype) != (our.shape, our.dtype) or not torch.allclose(
                their, our, rtol=tolerance, atol=tolerance
            ):
                return False
    return True


def _rotary(
    stock: Callable[..., tuple[Tensor, Tensor]], partial: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Ours in `stock`'s place; calls that it does not serve go to `stock`."""

    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain = len(args) == 4 and (
            not kwargs or (kwargs.keys() == {"unsqueeze_dim"} and kwargs["unsqueeze_dim"] == 1)
        )
        if not plain or not all(isinstance(value, Tensor) for value in args) or not _turns(*args, partial):
            return stock(*args, **kwargs)  # whatever its parameters are called
        return functional.rope(*args)

    return apply_rotary_pos_emb


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, partial: bool) -> bool:
    if (
        not served(q)
        or q.dtype not in FLOATS
        or not q.dtype == k.dtype == cos.dtype == sin.dtype
        or not q.device == k.device == cos.device == sin.device
    ):
        return False
    if (
        q.dim() != 4
        or k.dim() != 4
        or cos.dim() != 3
        or cos.shape != sin.shape
        or cos.requires_grad
        or sin.requires_grad
    ):
        return False
    (b, _, s, d), rotary = q.shape, cos.shape[2]
    if (k.shape[0], k.shape[2], k.shape[3]) != (b, s, d) or cos.shape[0] not in (1, b) or cos.shape[1] != s:
        return False
    return rotary % 2 == 0 and (rotary == d or (partial and rotary < d))


# ---- attention in fp32


def wide_candidates(model: nn.Module) -> list[Block]:
    """Every module whose class's forward asks transformers' `ALL_ATTENTION_FUNCTIONS` for its function, in
    the model's order; none where torch's 16-bit products are fast, or no weight is in 16 bits.

    On a CPU without AVX-512's bf16 instructions scaled_dot_product_attention's backward takes 75 ms in bf16
    and 12 ms in fp32 (2 x 256 tokens, 9 heads of 64, 3 of keys; Zen 3, one thread); `python -m
    benchmarks.bench_attention`.
    """
    slow = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if slow_products(dtype))
    if not any(p.dtype in slow and p.device.type == "cpu" for p in model.parameters()):
        return []
    found = []
    for name, module in model.named_modules():
        if _uses(module, _FUNCTIONS):
            reason = _not_ours(module) or _no_interfaces(module)
            found.append(Block(name, module, "fp32_attention", None if reason else WideMode(slow), reason))
    return found


def _no_interfaces(module: nn.Module) -> str | None:
    functions = innermost(type(module).forward).__globals__.get(_FUNCTIONS)
    return (
        None if callable(getattr(functions, "get_interface", None)) else f"{_FUNCTIONS} has no get_interface"
    )


class _Interfaces:
    """transformers' attention functions, the eager and the SDPA one in fp32, `around` around each; all else
    of it as it is."""

    def __init__(
        self, stock: Any, slow: tuple[torch.dtype, ...], around: Callable[..., Any] | None = None
    ) -> None:
        self._stock, self._slow, self._around = stock, slow, around

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = self._stock.get_interface(name, default)
        kind = "eager" if function is default else "sdpa" if _is_sdpa(name, function) else "other"
        if self._around is not None:
            function = functools.partial(self._around, function, kind)
        return (
            functools.partial(in_fp32, function, self._slow) if self._slow and kind != "other" else function
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __getitem__(self, name: str) -> Any:
        return self._stock[name]


def _is_sdpa(name: str, function: Callable[..., Any]) -> bool:
    return name == "sdpa" and function.__module__.startswith("transformers.")


def in_fp32(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    slow: tuple[torch.dtype, ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`function` on fp32 operands, its results rounded to what it would have returned."""
    result = autocast_dtype(query) or query.dtype
    if (
        result not in slow
        or not _pays(query, key, value)
        or kwargs.get("dropout")
        or kwargs.get("cache") is not None
    ):
        return function(module, query, key, value, attention_mask, **kwargs)
    operands = [_wide(each) for each in (query, key, value, attention_mask)]
    with autocast_off(query):
        output, weights = function(module, *operands, **{name: _wide(each) for name, each in kwargs.items()})
    return output.to(result), None if weights is None else weights.to(result)


def _pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """One token against a cache, without gradients, reads the keys once: casting them would take as long."""
    if not (
        query.device.type == key.device.type == value.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
    ):
        return False
    return query.shape[2] > 1 or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    )


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# ---- something around the attention function


def surround(module: nn.Module, around: Callable[..., Any]) -> Callable[..., Any] | None:
    """Let `around(function, kind, module, query, key, value, attention_mask, **kwargs)` run in place of the
    attention function that the module's class looks up; kind is "eager", "sdpa" or "other". It stays through
    `patch` and `unpatch`, until `release`. Returns what was there before.

    Raises ValueError where the module cannot be served (see `surroundable`).
    """
    reason = surroundable(module)
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")
    before = module.__dict__.get(_AROUND)
    module.__dict__[_AROUND] = around
    _install(module, _modes(module))
    return before


def release(module: nn.Module) -> None:
    """Undo `surround`; what `patch` did stays."""
    if module.__dict__.pop(_AROUND, None) is None:
        return
    modes = [mode for mode in _modes(module) if not isinstance(mode, WideMode) or mode.slow]
    if modes:
        _install(module, [WideMode(mode.slow) if isinstance(mode, WideMode) else mode for mode in modes])
    else:
        remove(module)


def restore_surrounded(model: nn.Module) -> None:
    """Put back what was around attention functions where the forward that held it was taken off."""
    for module in model.modules():
        if _AROUND in module.__dict__ and not _modes(module):
            _install(module, [])


def surrounded_alone(module: nn.Module) -> bool:
    """Whether the module has a forward of ours for nothing but what stands around its attention function."""
    modes = _modes(module)
    return _AROUND in module.__dict__ and len(modes) == 1 and not modes[0].slow


def around_of(module: nn.Module) -> Callable[..., Any] | None:
    """What `surround` has put around the module's attention function; None where nothing is."""
    return module.__dict__.get(_AROUND)


def surroundable(module: nn.Module) -> str | None:
    """Why `surround` cannot serve a module; None where it can."""
    if not _uses(module, _FUNCTIONS):
        return f"its forward does not ask transformers' {_FUNCTIONS}"
    return _not_ours(module) or _no_interfaces(module)


def _modes(module: nn.Module) -> list[NamedTuple]:
    held = find(module)
    return list(held[1].cache) if held is not None and isinstance(held[1], AttentionForward) else []


# ---- the forward of all


def _uses(module: nn.Module, name: str) -> bool:
    """Whether the class's forward, or what it wraps, looks up a global function of this name."""
    forward = type(module).forward
    functions = (innermost(forward), inspect.unwrap(forward))
    return any(name in getattr(getattr(function, "__code__", None), "co_names", ()) for function in functions)


def _not_ours(module: nn.Module) -> str | None:
    """Why the class's forward cannot be run with other globals."""
    wrapped = f"{type(module).__name__}.forward {UNKNOWN}"
    return replacement(module) or (wrapped if innermost(type(module).forward) is None else None)


class AttentionForward(WrappedForward):
    """An attention module's own forward, whose code sees ours under the names of the modes in `cache`.
    torch.compile traces into it."""

    __slots__ = ("_stock", "_code", "_names", "_replacements", "scope")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._refresh()
        surrounded = any(isinstance(mode, WideMode) and mode.around is not None for mode in self.cache)
        if self._function is None and surrounded:
            raise RuntimeError(
                f"{type(self.module).__name__}.forward was replaced since something was put around its "
                "attention function, and cannot be "
                "served any more: remove that (a prefix, say), or the replacement"
            )
        if self._function is None or (transformed() and not surrounded):
            return self.stock(*args, **kwargs)
        return self._function(self.module, *args, **kwargs)

    def inside(self, stock: types.FunctionType) -> Callable[..., Any] | None:
        """`stock` with other globals, `scope`."""
        source = stock.__globals__
        if any(mode.name not in source for mode in self.cache):
            return None
        self._stock, self._code, self.scope = stock, stock.__code__, _scope(stock)
        self._replacements = [
            (mode.name, source[mode.name], mode.replace(source[mode.name])) for mode in self.cache
        ]
        self.scope.update({name: ours for name, _, ours in self._replacements})
        self._names = tuple(name for name in _global_names(stock.__code__) if name in source)
        function = types.FunctionType(
            stock.__code__, self.scope, stock.__name__, stock.__defaults__, stock.__closure__
        )
        function.__kwdefaults__ = stock.__kwdefaults__
        return function

    def _refresh(self) -> None:
        """What others have put into the module's globals since then is seen; while a function of theirs is
        under our names, it is used."""
        if type(self.module).forward is not self._seen or (
            self._function is not None and self._stock.__code__ is not self._code
        ):
            self.build()
        if self._function is None:
            return
        scope, source = self.scope, self._stock.__globals__
        for name in self._names:
            scope[name] = source[name]
        for (name, stock, ours), mode in zip(self._replacements, self.cache, strict=True):
            if source[name] is stock:
                scope[name] = ours
            elif isinstance(mode, WideMode) and mode.around is not None:
                scope[name] = WideMode((), mode.around).replace(source[name])


def _global_names(code: types.CodeType) -> frozenset[str]:
    """Names that may be looked up among the globals, in functions defined inside too."""
    inner = (_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _scope(forward: types.FunctionType) -> dict[str, Any]:
    """A copy of its globals. Without `__name__`: by it torch.compile (2.13) names the module as the source of
    what it reads here, and its guards would watch the module's rotary function in place of ours."""
    scope = dict(forward.__globals__)
    scope.pop("__name__", None)
    return scope
