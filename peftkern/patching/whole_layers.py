"""Decoder layers of the usual kind that run as one function in training on a CPU: norms, projections, rotary
embedding, attention and a gated MLP, all of which run ours.

What stands between the projections is asked of the attention's own forward (attention_form.py). Whatever a
call brings that this does not cover runs part by part."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.decoder_layer import DecoderLayer, Norm, Seen
from ..ops import attention as attention_op
from ..ops import undispatched
from ..runtime import backends
from .attention import AttentionForward, AttentionMode
from .attention_form import CACHES, PROJECTIONS, Form, attention_form
from .blocks import NormForward
from .cpu_attention import STOCK
from .hooks import direct, running
from .linears import PlannedForward
from .mlp import GatedMLPForward
from .plans import Plan
from .rebuilt import REBUILT
from .rotary import RopeMode
from .watch import Watch

__all__ = ["WholeLayer"]

_OLD_NAMES = {"hidden_states", "position_embeddings", "attention_mask", *CACHES}
_IMPLEMENTATION = "_attn_implementation_internal"  # of a configuration: which function it asks for


class _Parts(NamedTuple):
    """The forwards of a layer's parts, all of them ours."""

    norms: tuple[NormForward, NormForward]
    attention: AttentionForward
    mlp: GatedMLPForward
    linears: tuple[PlannedForward, ...]


class _Ready(NamedTuple):
    """A layer described for calls to come, as long as what is watched holds. k: of its input; form: the
    attention's; find, function: how the attention's function is looked up, and what was found."""

    watch: Watch
    layer: DecoderLayer
    k: int
    attention: nn.Module
    form: Form
    find: Callable[..., Any]
    function: Any


class WholeLayer:
    """Of one layer: what a call has prepared, for as long as nothing that it was made of has changed."""

    __slots__ = ("form", "mode", "ready", "shape")

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.form: tuple[Any, Form | None] = None, None  # of which function of the class, and what it is
        self.ready: _Ready | None = None
        self.shape: Any = None  # of an x without a mask whose heads the kernel takes

    def __call__(self, module: nn.Module, x: Tensor, given: dict[str, Any], rest: dict[str, Any]) -> Any:
        """The layer's output; None where it has to be run part by part."""
        if not _trains(x):
            return None
        ready = self.ready
        if ready is None or ready.k != x.shape[-1] or not ready.watch.holds():
            ready, self.shape = self._prepared(module, x), None
            self.ready = ready
            if ready is None:
                return None
        call = _arguments(self.mode.first, given, rest)
        if call is None or ready.find("sdpa", None) is not ready.function:
            return None
        kept, attention = call.pop(ready.form.cache, None), ready.attention
        cos, sin = call.pop("position_embeddings", None) or (None, None)
        mask = call.pop("attention_mask", None)
        if not _angles(x, cos, sin, ready.layer.width) or not _empty(kept, attention):
            return None
        if not _says_nothing(call, ready.function) or not self._attends(x, ready, mask):
            return None
        seen = Seen(mask, mask is None and bool(attention.is_causal))
        y, k, v = ready.layer(x, cos, sin, seen, kept is not None)
        if kept is not None:
            _fill(kept, attention.layer_idx, k, v)
        return y

    def _attends(self, x: Tensor, ready: _Ready, mask: Any) -> bool:
        """Whether the native kernel takes the heads."""
        (b, s, _), width, shape = x.shape, ready.layer.width, x.shape
        if mask is None and shape == self.shape:
            return True
        heads = [x.new_empty(()).expand(b, n // width, s, width) for n in ready.layer.parts[0].spec.n]
        if mask is not None and (type(mask) is not Tensor or mask.dim() != 4 or not mask.is_cpu):
            return False
        found = attention_op.config.native(*heads, mask, ready.layer.scale)
        self.shape = shape if found and mask is None else None
        return found

    def _prepared(self, module: nn.Module, x: Tensor) -> _Ready | None:
        """For calls with x's dtype and last size; None where the layer, or what it is made of, is of another
        kind or cannot be watched."""
        parts = self._parts(module)
        if parts is None:
            return None
        watch, attention = Watch(), parts.attention.module
        watch.module(module)
        watch.entry(module.__dict__, REBUILT)
        watch.entry(module._modules, *(name for half in self.mode[:2] for name in (half.norm, half.block)))
        found, form = _function(parts.attention, watch), self.form[1]
        norms, activation = [norm.operands(x) for norm in parts.norms], parts.mlp.now()
        watch.entry(attention.__dict__, *form.reads)
        if found is None or activation is None or None in norms or not _watched(parts, norms, watch):
            return None
        if form.further & _meant(found[1]):
            return None
        layer = _described(x, parts, norms, activation)
        return None if layer is None else _Ready(watch, layer, x.shape[-1], attention, form, *found)

    def _parts(self, module: nn.Module) -> _Parts | None:
        """None where one of them is not ours, is watched, or the layer does more."""
        first, second = self.mode.first, self.mode.second
        if first.after or second.after or second.keywords or second.rest or second.hidden is not None:
            return None
        if REBUILT in module.__dict__ or not direct(module):
            return None
        children = module._modules
        found = [running(children[name]) for name in (first.norm, first.block, second.norm, second.block)]
        if [type(forward) for forward in found] != _KINDS:
            return None
        norm, attention, norm_2, mlp = found
        if not (norm.bare() and norm_2.bare() and mlp.bare()) or self._form(attention) is None:
            return None
        inside, outside = attention.module._modules, mlp._linears()
        linears = [running(inside[name]) for name in PROJECTIONS]
        if outside is None or not all(isinstance(forward, PlannedForward) for forward in linears):
            return None
        return _Parts((norm, norm_2), attention, mlp, (*linears, *outside))

    def _form(self, forward: AttentionForward) -> Form | None:
        """The attention's, as it is now; a forward that had none of this kind is not asked again."""
        seen = type(forward.module).forward
        if self.form[0] is not seen or self.form[1] is not None:
            self.form = seen, attention_form(forward.module)
        return self.form[1]


_KINDS = [NormForward, AttentionForward, NormForward, GatedMLPForward]


def _watched(parts: _Parts, norms: Sequence[Any], watch: Watch) -> bool:
    """Whether all that the parts are made of can be watched, and is from now on; a norm that is trained has
    gradients that the layer does not make."""
    attention, mlp = parts.attention.module, parts.mlp.module
    watch.module(attention)
    watch.function(type(attention))
    watch.entry(attention._modules, *PROJECTIONS)
    watch.entry(mlp._modules, *GatedMLPForward.children)
    for norm, (weight, _, mode) in zip(parts.norms, norms, strict=True):
        watch.entry(norm.module._parameters, "weight")
        watch.entry(norm.module.__dict__, mode.eps_name)
        watch.place(weight)
        watch.frozen(weight)
    if any(weight.requires_grad for weight, _, _ in norms):
        return False
    return all(forward.watch(watch) for forward in (*parts.norms, parts.mlp, *parts.linears))


def _function(forward: AttentionForward, watch: Watch) -> tuple[Callable[..., Any], Any] | None:
    """How the attention looks up its function and what it finds, where that is torch's SDPA, which ours
    stands for, with nothing dropped and nothing put around it."""
    module, names, forward_of = forward.module, {}, forward._stock.__globals__
    forward._refresh()
    for mode, (name, stock, ours) in zip(forward.cache, forward._replacements, strict=True):
        watch.entry(forward_of, name)
        if forward.scope[name] is not ours:
            return None
        names[type(mode)] = mode, stock
    if names.keys() != {RopeMode, AttentionMode}:
        return None
    mode, functions = names[AttentionMode]
    config = module.config
    watch.entry(module.__dict__, "training")
    watch.entry(config.__dict__, _IMPLEMENTATION)
    dropped = module.training and module.attention_dropout
    if not mode.tiled or mode.slow or mode.around is not None or dropped:
        return None
    if config.__dict__.get(_IMPLEMENTATION) != "sdpa" or config._attn_implementation != "sdpa":
        return None
    function = functions.get_interface("sdpa", None)
    if not getattr(function, "__module__", "").startswith("transformers."):
        return None
    return functions.get_interface, function


def _trains(x: Tensor) -> bool:
    """Whether x is a batch of bf16 sequences on the CPU, in training, that nobody traces or casts."""
    if type(x) is not Tensor or x.dtype != torch.bfloat16 or not x.is_cpu or x.dim() != 3:
        return False
    if not torch.is_grad_enabled() or x.shape[1] < attention_op.config.FEWEST_QUERIES or not x.shape[0]:
        return False
    if not undispatched(x) or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled():
        return False
    if F.scaled_dot_product_attention is not STOCK or torch._C._len_torch_function_stack():
        return False  # somebody looks at what attention does
    return backends.select(x) == "cpu" and attention_op.config.available()


def _arguments(half: Any, given: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any] | None:
    """The attention's keyword arguments but its input; None where one is an old name of another."""
    found = {name: given[source] for name, source in half.keywords}
    if half.rest:
        found.update(rest)
    return None if any(name in rest for name in _OLD_NAMES) else found


def _angles(x: Tensor, cos: Any, sin: Any, width: int) -> bool:
    """Whether they turn whole heads of every position."""
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)) or cos.dim() != 3:
        return False
    if cos.requires_grad or sin.requires_grad or not cos.dtype == sin.dtype == x.dtype:
        return False
    alike = cos.shape == sin.shape and cos.is_cpu and sin.is_cpu
    return alike and cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == (x.shape[1], width)


def _says_nothing(others: dict[str, Any], function: types.FunctionType) -> bool:
    """Whether none of an attention's other arguments means anything to its function."""
    meant = _meant(function)
    return not any(
        name in meant and value is not None and not (name == "output_attentions" and value is False)
        for name, value in others.items()
    )


_meanings: dict[Any, frozenset[str]] = {}


def _meant(function: types.FunctionType) -> frozenset[str]:
    """The names of what a function of attention reads of its keyword arguments."""
    code = function.__code__
    if code not in _meanings:
        named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        asked = (value for value in code.co_consts if isinstance(value, str))
        _meanings[code] = frozenset((*named, *asked))
    return _meanings[code]


def _empty(cache: Any, attention: nn.Module) -> bool:
    """Whether there is no cache, or one that will hold the keys and values just as they are: transformers'
    growing one, with nothing in it for this layer."""
    if cache is None:
        return True
    known = sys.modules.get("transformers.cache_utils")
    if known is None or type(cache) is not known.DynamicCache or getattr(cache, "offloading", False):
        return False
    index, layers = attention.layer_idx, cache.layers
    if index >= len(layers):
        return cache.layer_class_to_replicate is known.DynamicLayer
    return type(layers[index]) is known.DynamicLayer and layers[index].get_seq_length() == 0


_GROWING = {"keys", "values", "is_initialized", "device", "dtype"}


def _fill(cache: Any, index: int, k: Tensor, v: Tensor) -> None:
    """`cache.update` of a layer with nothing in it, without the copies that its concatenation makes: they
    take a hundredth of a step of a small model. A layer that keeps more than transformers' growing ones have
    kept so far fills itself."""
    nothing = k.new_empty((k.shape[0], k.shape[1], 0, k.shape[3]))
    cache.update(nothing, nothing, index)
    layer = cache.layers[index]
    if vars(layer).keys() <= _GROWING:
        layer.keys, layer.values = k, v
    else:
        cache.update(k, v, index)


def _described(
    x: Tensor, parts: _Parts, norms: Sequence[Any], options: dict[str, Any]
) -> DecoderLayer | None:
    attention = parts.attention.module
    width, scale = attention.head_dim, attention.scaling
    inner = [forward.work(x) for forward in parts.linears[:3]]
    sizes = [getattr(forward.module, "in_features", None) for forward in (parts.linears[3], parts.linears[6])]
    like = [x.new_empty((1,)).expand(*x.shape[:-1], size) for size in sizes]
    outer = parts.linears[3].work(like[0])
    mlp = parts.mlp._plans(x, list(parts.linears[4:]))
    plans = [(plan, x) for plan in inner] + [(outer, like[0])]
    if mlp is None or any(type(plan) is not Plan or not plan.can_be_held(of) for plan, of in plans):
        return None
    if not all(plan.can_be_held(x) for plan in mlp) or any(
        plan.member.weight.shape[0] % width for plan in inner
    ):
        return None
    layer = DecoderLayer(
        x,
        tuple(Norm(weight, eps, mode.offset, mode.cast) for weight, eps, mode in norms),
        [plan.member for plan in (*inner, outer)],
        [plan.member for plan in mlp],
        width=width,
        scale=scale,
        activation=options["activation"],
    )
    return layer if layer.served else None
