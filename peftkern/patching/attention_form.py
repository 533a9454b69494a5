"""What an attention module's forward does between its projections, asked of its class with stand-ins for its
children and for the functions that it looks up."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .wrappers import innermost

__all__ = ["CACHES", "PROJECTIONS", "Form", "attention_form"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
CACHES = ("cache", "past_key_values")  # names of its parameter
_ROTARY, _FUNCTIONS = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"
# What the forward may name besides what the module holds: shapes, the cache, how its function is looked up.
_NAMES = {"shape", "view", "transpose", "reshape", "contiguous", "update", "get_interface"}
_NAMES |= {"_attn_implementation", "eager_attention_forward", _ROTARY, _FUNCTIONS}
_NAMES |= {"getattr", "sliding_window"}  # of the configuration, for the attention's function
_GIVEN = {"hidden_states", "position_embeddings", "attention_mask"}
_DEPRECATION = "transformers.utils.deprecation"  # whose wrappers rename arguments


class Form(NamedTuple):
    """cache: the parameter by which the forward gets one; reads: the module's attributes that it names;
    further: keyword arguments of its own that it gives to the attention's function."""

    cache: str
    reads: tuple[str, ...]
    further: frozenset[str]


def attention_form(module: nn.Module) -> Form | None:
    """Of a module whose class's forward is o(attention(rope(q, k), v)) of its projections, heads of
    `head_dim`, as the module is now; else None."""
    forward = innermost(type(module).forward)
    if forward is None or not _renamed(type(module).forward) or set(module._modules) != set(PROJECTIONS):
        return None
    held = ("head_dim", "scaling", "attention_dropout", "layer_idx", "config", "is_causal")
    if any(name not in module.__dict__ for name in held) or type(module.scaling) is not float:
        return None
    if not set(forward.__code__.co_names) <= {*_NAMES, *module.__dict__, *module._modules}:
        return None
    parameters = forward.__code__.co_varnames[: forward.__code__.co_argcount]
    caches = [name for name in CACHES if name in parameters]
    if len(caches) != 1 or set(parameters) != {"self", *_GIVEN, *caches}:
        return None
    further: set[str] = set()
    for training in (False, True):
        for cached in (False, True):
            if not _probe(module, forward, caches[0] if cached else None, training, further):
                return None
    reads = (*held, *(name for name in forward.__code__.co_names if name in module.__dict__))
    return Form(caches[0], tuple(dict.fromkeys(reads)), frozenset(further))


def _renamed(function: Any) -> bool:
    """Whether all that is wrapped around a forward renames arguments."""
    inner = innermost(function)
    while function is not inner:
        if getattr(function, "__globals__", {}).get("__name__") != _DEPRECATION:
            return False
        function = function.__wrapped__
    return True


def _probe(
    module: nn.Module, forward: types.FunctionType, cache: str | None, training: bool, further: set[str]
) -> bool:
    """Whether the forward does with stand-ins what is expected, with and without a cache; adds to
    `further`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    width, (b, s) = module.head_dim, (2, 3)
    sizes = [module._modules[name] for name in PROJECTIONS[:3]]
    heads = [getattr(linear, "out_features", 0) // width for linear in sizes]
    x, cos, sin, mask, other = random(b, s, 4), random(1, s, width), random(1, s, width), object(), object()
    made = {name: random(b, s, n * width) for name, n in zip(PROJECTIONS, heads, strict=False)}
    made["o_proj"] = random(b, s, 4)
    turned = [random(b, n, s, width) for n in heads[:2]]
    stored, attended = [random(b, heads[1], s, width) for _ in range(2)], random(b, s, heads[0], width)
    right, order = [], []

    def as_heads(name: str) -> Tensor:
        return made[name].view(b, s, -1, width).transpose(1, 2)

    def projection(name: str) -> Callable[[Tensor], Tensor]:
        def project(rows: Tensor) -> Tensor:
            order.append(name)
            right.append(_one(rows, attended.reshape(b, s, -1)) if name == "o_proj" else rows is x)
            return made[name]

        return project

    def rotary(q: Tensor, k: Tensor, given_cos: Tensor, given_sin: Tensor) -> tuple[Tensor, Tensor]:
        order.append("rope")
        right.append(_one(q, as_heads("q_proj")) and _one(k, as_heads("k_proj")))
        right.append(given_cos is cos and given_sin is sin)
        return turned[0], turned[1]

    def update(k: Tensor, v: Tensor, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        order.append("cache")
        right.append(k is turned[1] and _one(v, as_heads("v_proj")) and index == module.layer_idx)
        return stored[0], stored[1]

    def attend(
        of: Any, q: Tensor, k: Tensor, v: Tensor, given: Any, *, dropout: float, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        order.append("attention")
        keys = k is (stored[0] if cache else turned[1])
        values = v is stored[1] if cache else _one(v, as_heads("v_proj"))
        right.append(of is stub and q is turned[0] and keys and values and given is mask)
        right.append(dropout == (0.25 if training else 0.0) and scaling == module.scaling)
        right.append(rest.pop("other", None) is other)
        further.update(rest)
        return attended, None

    def get_interface(name: str, default: Any) -> Callable[..., Any]:
        right.append(name == module.config._attn_implementation)
        return attend

    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    held |= dict(training=training, attention_dropout=0.25)
    stub = types.SimpleNamespace(**held, **{name: projection(name) for name in PROJECTIONS})
    scope = dict(forward.__globals__) | {_ROTARY: rotary}
    scope[_FUNCTIONS] = types.SimpleNamespace(get_interface=get_interface)
    function = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    function.__kwdefaults__ = forward.__kwdefaults__
    given = {} if cache is None else {cache: types.SimpleNamespace(update=update)}
    try:
        with torch.no_grad():
            out = function(
                stub,
                hidden_states=x,
                position_embeddings=(cos, sin),
                attention_mask=mask,
                other=other,
                **given,
            )
    except Exception:  # it wants what the stand-ins have not: no attention of this form
        return False
    wanted = ["rope", *(["cache"] if cache else []), "attention", "o_proj"]
    return (
        all(right)
        and sorted(order[:3]) == sorted(PROJECTIONS[:3])
        and order[3:] == wanted
        and isinstance(out, tuple)
        and out[0] is made["o_proj"]
    )


def _one(got: Any, expected: Tensor) -> bool:
    """Whether it is the same numbers at the same place."""
    if not isinstance(got, Tensor) or (got.shape, got.stride()) != (expected.shape, expected.stride()):
        return False
    return got.data_ptr() == expected.data_ptr() or torch.equal(got, expected)
