"""Attention modules, patched per instance through the global names their class's forward looks up: rotary
embeddings, and attention itself in fp32 where torch multiplies 16-bit matrices in naive loops."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import autocast_off, transformed
from .blocks import replacement
from .forwards import find, install, remove
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .weights import autocast_dtype, slow_products
from .wrappers import UNKNOWN, WrappedForward, innermost

__all__ = [
    "AttentionForward",
    "WideAttention",
    "WideMode",
    "against_other_globals",
    "around_of",
    "hold_modes",
    "in_fp32",
    "release",
    "restore_surrounded",
    "surround",
    "surroundable",
    "surrounded_alone",
    "uses",
    "with_around",
]

_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_AROUND = "_peftkern_around_attention"  # of the module, which holds what `surround` put there
_HELD = "_peftkern_held_modes"  # of a module that is no attention, which holds what `hold_modes` put there


class WideMode(NamedTuple):
    """The dtypes in whose place attention is computed in fp32; and what stands around the attention function,
    as `surround` takes it."""

    slow: tuple[torch.dtype, ...]
    around: Callable[..., Any] | None = None

    name = _FUNCTIONS

    def replace(self, stock: Any) -> Any:
        """What the module's forward finds under `name`."""
        return _Interfaces(stock, self.slow, self.around)


def _install(module: nn.Module, modes: list[NamedTuple]) -> None:
    install(module, AttentionForward, with_around(module, modes))


def with_around(module: nn.Module, modes: list[NamedTuple]) -> tuple[NamedTuple, ...]:
    """The modes, and what stands around the module's attention function, which stays there."""
    around = module.__dict__.get(_AROUND)
    if around is None:
        return tuple(modes)
    slow = next((mode.slow for mode in modes if isinstance(mode, WideMode)), ())
    return (*(mode for mode in modes if not isinstance(mode, WideMode)), WideMode(slow, around))


# ---- attention in fp32


class WideAttention(Rewrite):
    """Modules whose class's forward asks transformers' `ALL_ATTENTION_FUNCTIONS` for its function; none where
    torch's 16-bit products are fast, or no weight is in 16 bits.

    On a CPU without AVX-512's bf16 instructions scaled_dot_product_attention's backward takes 75 ms in bf16
    and 12 ms in fp32 (2 x 256 tokens, 9 heads of 64, 3 of keys; Zen 3, one thread); `python -m
    benchmarks.bench_attention`.
    """

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's. The module's forward turns by our rotary function too, where `Rotary` found that."""
        slow = context.shared.get(WideAttention)
        if slow is None:
            slow = context.shared[WideAttention] = _slow_dtypes(context.model)
        if not slow or not uses(module, _FUNCTIONS) or context.excluded(name):
            return None
        reason = against_other_globals(module) or _no_interfaces(module)
        row = block_row(name, "attention", "fp32_attention", reason)
        if reason:
            return Finding(module, row)
        rotary = context.forward_of(module, AttentionForward)
        modes = [mode for mode in (rotary.made_of if rotary else ()) if not isinstance(mode, WideMode)]
        return Finding(module, row, AttentionForward, with_around(module, [*modes, WideMode(slow)]))


def _slow_dtypes(model: nn.Module) -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes whose products are slow here, where the model has weights of one of them."""
    slow = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if slow_products(dtype))
    return slow if any(p.dtype in slow and p.device.type == "cpu" for p in model.parameters()) else ()


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
        elif _HELD in module.__dict__ and not _modes(module):
            install(module, AttentionForward, module.__dict__[_HELD])


def surrounded_alone(module: nn.Module) -> bool:
    """Whether the module has a forward of ours for nothing but what stands around its attention function."""
    modes = _modes(module)
    return _HELD in module.__dict__ or (
        _AROUND in module.__dict__ and len(modes) == 1 and not getattr(modes[0], "slow", True)
    )


def around_of(module: nn.Module) -> Callable[..., Any] | None:
    """What `surround` has put around the module's attention function; None where nothing is."""
    return module.__dict__.get(_AROUND)


def hold_modes(module: nn.Module, modes: tuple[NamedTuple, ...] | None) -> None:
    """Let a module that is no attention see ours under the names of the modes, through `patch` and `unpatch`;
    None takes them off."""
    if modes is not None:
        module.__dict__[_HELD] = modes
        install(module, AttentionForward, modes)
    elif module.__dict__.pop(_HELD, None) is not None:
        remove(module)


def surroundable(module: nn.Module) -> str | None:
    """Why `surround` cannot serve a module; None where it can."""
    if not uses(module, _FUNCTIONS):
        return f"its forward does not ask transformers' {_FUNCTIONS}"
    return against_other_globals(module) or _no_interfaces(module)


def _modes(module: nn.Module) -> list[NamedTuple]:
    held = find(module)
    return list(held[1].cache) if held is not None and isinstance(held[1], AttentionForward) else []


# ---- the forward of all


def uses(module: nn.Module, name: str) -> bool:
    """Whether the class's forward, or what it wraps, looks up a global function of this name."""
    forward = type(module).forward
    functions = (innermost(forward), inspect.unwrap(forward))
    return any(name in getattr(getattr(function, "__code__", None), "co_names", ()) for function in functions)


def against_other_globals(module: nn.Module) -> str | None:
    """Why the class's forward cannot be run with other globals."""
    wrapped = f"{type(module).__name__}.forward {UNKNOWN}"
    return replacement(module) or (wrapped if innermost(type(module).forward) is None else None)


class AttentionForward(WrappedForward):
    """A module's own forward, an attention's as a rule, whose code sees ours under the names of the modes in
    `cache`. torch.compile traces into it."""

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
