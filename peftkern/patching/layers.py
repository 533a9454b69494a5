"""Decoder layers of the usual pre-norm form: the residual additions run inside the norms' kernels, in both
directions.

A layer is recognized by what its class's forward does with stand-ins for its children. Only straight-line
code that names nothing but its
children is looked at: what it does once, it always does.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import transformed
from .blocks import ON_CPU, NormForward, name_of_eps, replacement
from .forwards import find
from .hooks import has_hooks
from .rebuilt import REBUILT, rebuilding
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .whole_layers import WholeLayer
from .wrappers import UNKNOWN, WrappedForward, innermost

__all__ = ["DecoderLayers", "Half", "LayerForward", "LayerMode", "joined", "layer_mode"]


class Half(NamedTuple):
    """One of a layer's two steps: s + after(block(norm(s))).

    hidden: the keyword by which the block gets the norm's output, None: its first argument; keywords: the
    block's, each with the layer's parameter that it passes on; rest: whether the layer's further keyword
    arguments go to the block too; parts: the block returns a tuple, of which the first counts; after: what
    the block's output runs through (dropout).
    """

    norm: str
    block: str
    hidden: str | None
    keywords: tuple[tuple[str, str], ...]
    rest: bool
    parts: bool
    after: tuple[str, ...]


class LayerMode(NamedTuple):
    """What a layer's forward does. as_tuple: it returns a tuple of one."""

    first: Half
    second: Half
    as_tuple: bool


# ---- running


class LayerForward(WrappedForward):
    """A decoder layer; `cache` holds its LayerMode. What its class's forward is wrapped in (gradient
    checkpointing) is kept around ours."""

    __slots__ = ("_inner", "_whole")

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None, cache: LayerMode) -> None:
        self._inner = innermost(type(module).forward)
        super().__init__(module, previous, cache)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._inner = innermost(type(state[0]).forward)
        super().__setstate__(state)

    def inside(self, stock: types.FunctionType) -> Callable[..., Any] | None:
        """The layer with the additions inside the norms, while its class's forward is the one that was
        recognized."""
        self._whole = None
        return _forward(stock, self) if stock is self._inner else None

    def whole(self) -> WholeLayer:
        """The layer as one function, and what its calls have prepared."""
        if self._whole is None:
            self._whole = WholeLayer(self.cache)
        return self._whole

    def let_go(self) -> None:
        self._whole = None


def _forward(stock: types.FunctionType, own: LayerForward) -> Callable[..., Any]:
    """The layer's forward, whole or with the additions inside the norms; `stock` answers what it cannot be
    called with."""
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    mode: LayerMode = own.cache
    required, takes_rest = len(names) - len(defaults), any(p.kind is p.VAR_KEYWORD for p in parameters)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if transformed():  # what is traced or exported is the layer's own program
            return stock(module, *args, **kwargs)
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        rest = {name: value for name, value in kwargs.items() if name not in names}
        twice = any(name in kwargs for name in names[: len(args)])
        if (
            len(args) > len(names)
            or twice
            or (rest and not takes_rest)
            or any(name not in given for name in names[:required])
        ):
            return stock(module, *args, **kwargs)  # which says what is wrong with the call
        compiling = torch.compiler.is_compiling()
        stream = None if compiling else own.whole()(module, given[names[0]], given, rest)
        if stream is None:
            added, stream = _step(module, mode.first, given[names[0]], None, given, rest)
            added, stream = _step(module, mode.second, added, stream, given, rest)
            stream = stream + added
        return (stream,) if mode.as_tuple else stream

    return forward


def _step(
    module: nn.Module,
    half: Half,
    x: Tensor,
    residual: Tensor | None,
    given: dict[str, Any],
    rest: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """What the half's block adds to the stream, and the stream that it adds it to: residual + x, or x
    alone."""
    children = module._modules
    norm, block = children[half.norm], children[half.block]
    y, stream = joined(norm, x, residual)
    keywords = {name: given[source] for name, source in half.keywords}
    if half.rest:
        keywords.update(rest)
    args = (y,) if half.hidden is None else ()
    if half.hidden is not None:
        keywords[half.hidden] = y
    if REBUILT in module.__dict__:
        with rebuilding(norm, y, stream):
            out = block(*args, **keywords)
    else:
        out = block(*args, **keywords)
    out = out[0] if half.parts else out
    for name in half.after:
        out = children[name](out)
    return out, stream


def joined(norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(s) and s = residual + x. A norm that is watched by hooks is called, and so is one whose forward is
    not ours."""
    held = find(norm)
    if held is not None and held[0] == "forward" and type(held[1]) is NormForward and not has_hooks(norm):
        return held[1].joined(x, residual)
    s = x if residual is None else residual + x
    return norm(s), s


# ---- recognizing


class DecoderLayers(Rewrite):
    """Layers of the pre-norm form whose norms run ours. Elements of a ModuleList with a norm and two blocks
    of their own are listed whatever they are, others where they are recognized."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's."""
        if not _is_layer(module) or context.excluded(name):
            return None
        mode = layer_mode(module, lambda norm: context.forward_of(norm, NormForward) is not None)
        if isinstance(mode, LayerMode):
            return Finding(module, block_row(name, "layer", "add_rms_norm"), LayerForward, mode)
        if DecoderLayers not in context.shared:
            context.shared[DecoderLayers] = _listed(context.model)
        if id(module) not in context.shared[DecoderLayers]:
            return None
        return Finding(module, block_row(name, "layer", "add_rms_norm", mode))


def _listed(model: nn.Module) -> set[int]:
    """The elements of the model's ModuleLists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return {id(child) for module in lists for child in module.children()}


def _is_layer(module: nn.Module) -> bool:
    norms = [
        child
        for child in module.children()
        if name_of_eps(child) is not None and isinstance(getattr(child, "weight", None), Tensor)
    ]
    return bool(norms) and sum(bool(child._modules) for child in module.children()) >= 2


def layer_mode(
    module: nn.Module, is_ours: Callable[[nn.Module | None], bool] | None = None
) -> LayerMode | str:
    """What the class's forward does, or why ours cannot take its place; is_ours: whether a norm runs ours,
    default: now."""
    replaced, kind = replacement(module), type(module).__name__
    if replaced:
        return replaced
    norms = {name for name, child in module._modules.items() if (is_ours or _ours)(child)}
    if not norms:
        return "its norms do not run rms_norm"
    inner = innermost(type(module).forward)
    if inner is None:
        return f"{kind}.forward {UNKNOWN}"
    if not _straight(inner, module):
        return f"{kind}.forward does more than call its children and add"
    for parts in (True, False):
        modes = [_probe(inner, module, dtype, parts, norms) for dtype in (torch.float32, torch.bfloat16)]
        if modes[0] is not None and modes[0] == modes[1]:
            return modes[0]
    return f"{kind}.forward is not h + attention(norm(h)), then h + mlp(norm(h))"


def _ours(norm: nn.Module | None) -> bool:
    held = find(norm) if norm is not None else None
    return held is not None and type(held[1]) is NormForward


def _straight(function: types.FunctionType, module: nn.Module) -> bool:
    """Code without branches, whose only names are the module's children: it cannot but do the same at every
    call."""
    code, parameters = function.__code__, inspect.signature(function).parameters.values()
    plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_KEYWORD) for p in parameters)
    branches = any(
        step.opcode in dis.hasjrel or step.opcode in dis.hasjabs for step in dis.get_instructions(code)
    )
    return plain and not branches and not code.co_freevars and set(code.co_names) <= module._modules.keys()


class _Called(NamedTuple):
    """A call of a stand-in."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


def _probe(
    function: types.FunctionType, module: nn.Module, dtype: torch.dtype, parts: bool, norms: set[str]
) -> LayerMode | None:
    """The mode that explains, bit for bit, what the function does to random rows with stand-ins for the
    children; None where none does.

    The second call, the attention's, gives a tuple where `parts` says so. Every other argument of the layer
    is an object of its own.
    """
    names, rest = _parameters(function)
    given = {name: object() for name in names[1:] + rest}
    x, children, trace = _random(dtype, 0), module._modules, []

    def stand_in(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            value = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            out = value * _random(dtype, 1 + 2 * len(trace)) + _random(dtype, 2 + 2 * len(trace))
            trace.append(_Called(name, args, kwargs, out))
            return (out, None) if parts and len(trace) == 2 else out

        return called

    stub = types.SimpleNamespace(**{name: stand_in(name) for name in children})
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = function(stub, x, **given)
            return _explained(result, x, trace, given, rest, parts, norms)
    except Exception:  # it wants what the stand-ins have not: no layer of this form
        return None


def _parameters(function: types.FunctionType) -> tuple[list[str], list[str]]:
    """The names of its parameters without self, and one more name for further keyword arguments where it
    takes them."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return names, ["peftkern_probe"] if any(p.kind is p.VAR_KEYWORD for p in parameters) else []


def _random(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed), **ON_CPU).to(dtype)


def _explained(
    result: Any,
    x: Tensor,
    trace: list[_Called],
    given: dict[str, Any],
    rest: list[str],
    parts: bool,
    norms: set[str],
) -> LayerMode | None:
    as_tuple = isinstance(result, tuple) and len(result) == 1
    result = result[0] if as_tuple else result
    second = next((i for i, call in enumerate(trace) if i and call.name in norms), 0)
    halves, stream = [], x
    for index, calls in enumerate((trace[:second], trace[second:])):
        half = _half(calls, given, rest, parts and index == 0, norms)
        if (
            half is None
            or not torch.equal(calls[0].args[0], stream)
            or (index == 0 and calls[0].args[0] is not x)
        ):
            return None
        halves.append(half)
        stream = calls[0].args[0] + calls[-1].out
    used = [call.name for call in trace]
    if (
        len(set(used)) < len(used)
        or not isinstance(result, Tensor)
        or result.dtype != x.dtype
        or not torch.equal(result, stream)
    ):
        return None
    return LayerMode(*halves, as_tuple)


def _half(
    calls: list[_Called], given: dict[str, Any], rest: list[str], parts: bool, norms: set[str]
) -> Half | None:
    """The calls of a norm, of a block on what it gave, and of modules one on the other's output."""
    if len(calls) < 2 or calls[0].name not in norms or len(calls[0].args) != 1 or calls[0].kwargs:
        return None
    norm, block, *after = calls
    hidden = next((name for name, value in block.kwargs.items() if value is norm.out), None)
    positional = (norm.out,) if hidden is None else ()
    if len(block.args) != len(positional) or any(
        a is not b for a, b in zip(block.args, positional, strict=True)
    ):
        return None
    sources = {id(value): name for name, value in given.items()}
    keywords = {name: sources.get(id(value)) for name, value in block.kwargs.items() if name != hidden}
    passes = bool(rest) and keywords.pop(rest[0], None) == rest[0]
    chain = zip(calls[1:], after, strict=False)
    if None in keywords.values() or any(
        len(call.args) != 1 or call.kwargs or call.args[0] is not was.out for was, call in chain
    ):
        return None
    return Half(
        norm.name,
        block.name,
        hidden,
        tuple(keywords.items()),
        passes,
        parts,
        tuple(call.name for call in after),
    )
