"""Attention modules, patched per instance through the global names their class's forward looks up: rotary
embeddings, and on CPUs attention itself (cpu_attention.py)."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import attention as attention_op
from ..ops import transformed
from .blocks import replacement
from .cpu_attention import in_fp32, in_tiles
from .forwards import find, install, remove
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .weights import slow_products
from .wrappers import UNKNOWN, WrappedForward, innermost

__all__ = [
    "AttentionForward",
    "CpuAttention",
    "AttentionMode",
    "against_other_globals",
    "around_of",
    "hold_modes",
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


class AttentionMode(NamedTuple):
    """The dtypes in whose place attention is computed in fp32; what stands around the attention function, as
    `surround` takes it; and whether torch's SDPA becomes ours where that serves a call."""

    slow: tuple[torch.dtype, ...] = ()
    around: Callable[..., Any] | None = None
    tiled: bool = False

    name = _FUNCTIONS

    @property
    def patched(self) -> bool:
        """Whether there is more to it than `around`."""
        return bool(self.slow) or self.tiled

    def replace(self, stock: Any) -> Any:
        """What the module's forward finds under `name`."""
        return _Interfaces(stock, self)


def _install(module: nn.Module, modes: list[NamedTuple]) -> None:
    install(module, AttentionForward, with_around(module, modes))


def with_around(module: nn.Module, modes: list[NamedTuple]) -> tuple[NamedTuple, ...]:
    """The modes, and what stands around the module's attention function, which stays there."""
    around = module.__dict__.get(_AROUND)
    if around is None:
        return tuple(modes)
    own = next((mode for mode in modes if isinstance(mode, AttentionMode)), AttentionMode())
    others = (mode for mode in modes if not isinstance(mode, AttentionMode))
    return (*others, own._replace(around=around))


# ---- attention on a CPU


class CpuAttention(Rewrite):
    """Modules whose class's forward asks transformers' `ALL_ATTENTION_FUNCTIONS` for its function, where
    torch's 16-bit attention is slow: in bf16 tiles of our own on CPUs with bf16 products, else in fp32 where
    torch's 16-bit products are naive loops. None where no weight is in 16 bits.

    2 x 256 tokens, 9 heads of 64, 3 of keys, forward and backward, one thread: 12 ms of torch's bf16 are 2.9
    in tiles (Emerald Rapids), 13 are 3.4 (Zen 5); 75 ms are 12 in fp32 (Zen 3); `python -m
    benchmarks.bench_attention`.
    """

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's. The module's forward turns by our rotary function too, where `Rotary` found that."""
        mode = context.shared.get(CpuAttention)
        if mode is None:
            mode = context.shared[CpuAttention] = _mode_of(context.model)
        if not mode.patched or not uses(module, _FUNCTIONS) or context.excluded(name):
            return None
        reason = against_other_globals(module) or _no_interfaces(module)
        row = block_row(name, "attention", "tiled_attention" if mode.tiled else "fp32_attention", reason)
        if reason:
            return Finding(module, row)
        rotary = context.forward_of(module, AttentionForward)
        modes = [each for each in (rotary.made_of if rotary else ()) if not isinstance(each, AttentionMode)]
        return Finding(module, row, AttentionForward, with_around(module, [*modes, mode]))


def _mode_of(model: nn.Module) -> AttentionMode:
    """What attention in the 16-bit dtypes of the model's weights on the CPU is to become."""
    there = {p.dtype for p in model.parameters() if p.device.type == "cpu"}
    if torch.bfloat16 in there and attention_op.config.available():
        return AttentionMode(tiled=True)
    slow = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if slow_products(dtype))
    return AttentionMode(slow if there & set(slow) else ())


def _no_interfaces(module: nn.Module) -> str | None:
    functions = innermost(type(module).forward).__globals__.get(_FUNCTIONS)
    return (
        None if callable(getattr(functions, "get_interface", None)) else f"{_FUNCTIONS} has no get_interface"
    )


class _Interfaces:
    """transformers' attention functions as a mode says: the eager and the SDPA one in fp32, torch's SDPA
    ours, something around each; all else of it as it is."""

    def __init__(self, stock: Any, mode: AttentionMode) -> None:
        self._stock, self._mode = stock, mode

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function, mode = self._stock.get_interface(name, default), self._mode
        kind = "eager" if function is default else "sdpa" if _is_sdpa(name, function) else "other"
        if mode.tiled and kind == "sdpa":
            function = functools.partial(in_tiles, function)
        if mode.around is not None:
            function = functools.partial(mode.around, function, kind)
        return functools.partial(in_fp32, function, mode.slow) if mode.slow and kind != "other" else function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __getitem__(self, name: str) -> Any:
        return self._stock[name]


def _is_sdpa(name: str, function: Callable[..., Any]) -> bool:
    return name == "sdpa" and function.__module__.startswith("transformers.")


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
    alone = [
        mode._replace(around=None) if isinstance(mode, AttentionMode) else mode for mode in _modes(module)
    ]
    modes = [mode for mode in alone if not isinstance(mode, AttentionMode) or mode.patched]
    if modes:
        _install(module, modes)
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
        _AROUND in module.__dict__ and len(modes) == 1 and not getattr(modes[0], "patched", True)
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
        surrounded = any(isinstance(mode, AttentionMode) and mode.around is not None for mode in self.cache)
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
            elif isinstance(mode, AttentionMode) and mode.around is not None:
                scope[name] = AttentionMode(around=mode.around).replace(source[name])


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
